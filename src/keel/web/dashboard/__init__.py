"""The pages of `keel serve`, which show the runs below a folder."""
