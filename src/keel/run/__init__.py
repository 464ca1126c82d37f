"""The files of a run folder: settings, metrics, responses, checkpoints. All tools that show a run read these files."""
