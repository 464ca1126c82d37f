"""From prompts to scored answers."""
