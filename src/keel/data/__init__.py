"""Data files and the values read from them: prompts, comparisons, examples and batches."""
