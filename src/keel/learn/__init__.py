"""From scored responses to updated weights."""
