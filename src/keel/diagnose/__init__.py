"""What a run folder says of its run. Reads files only, so it works on a dead run or another machine's."""
