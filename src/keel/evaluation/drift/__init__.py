"""Test whether a run's reward models still apply to new prompts or responses (`keel drift`)."""
