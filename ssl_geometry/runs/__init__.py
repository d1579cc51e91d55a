"""Run directories: made, found again, continued under SLURM; their checkpoints, and the networks in them."""
