"""Train a policy from rewards (`keel train`): setup, training steps, checkpoints and logs."""
