"""Shared by all training loops: opening the run folder, handling interrupts, saving checkpoints."""
