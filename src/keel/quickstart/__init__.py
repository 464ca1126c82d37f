"""The embedded world of `keel quickstart`: customer support, no network, no download."""
