"""The command line: one thin file per verb. Heavy imports happen inside functions, after the arguments are read."""
