"""Read a run folder without torch: that of a running, finished or dead run, from this machine or another."""
