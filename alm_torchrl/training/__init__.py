"""Training: the update, the Trainer, checkpoints and exact resume."""
