"""The built-in example of `keel quickstart`: customer support in a small artificial language, without a network."""
