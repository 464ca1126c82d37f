"""The command line: one module for each verb. Heavy imports happen inside functions, so that --help does not wait."""
