"""A run's record on disk: settings, metrics, answers, checkpoints. Whatever looks at a run reads these files."""
