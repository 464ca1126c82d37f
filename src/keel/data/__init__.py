"""What flows between the parts: prompts, preferences, examples, batches."""
