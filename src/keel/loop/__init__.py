"""What surrounds the steps of every training loop: the run folder, interrupts, checkpoints."""
