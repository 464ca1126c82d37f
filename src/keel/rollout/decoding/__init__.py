"""One more token for every row: forward passes of models while responses are sampled."""
