"""The dashboard: web pages of `keel serve` that show the runs below a folder."""
