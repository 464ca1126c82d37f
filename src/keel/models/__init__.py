"""What computes: policy, critic and reward model, on top of transformers."""
