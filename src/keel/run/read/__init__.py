"""Read a run folder. Works on a run that has ended badly and on another machine's run, without torch."""
