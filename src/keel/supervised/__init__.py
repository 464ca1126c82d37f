"""Train from labelled rows: the loop shared by `keel sft`, `keel reward` and `keel dpo`, and the task of each."""
