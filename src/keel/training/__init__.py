"""The policy loop of `keel train`: settings to parts, one step, checkpoints, and what a run records."""
