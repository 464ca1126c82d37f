"""Learning from labelled rows: the loop of `keel sft`, `keel reward` and `keel dpo`, and what differs between them."""
