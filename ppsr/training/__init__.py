"""Training and testing from options files: the loop, its options, checkpoints, processes and signals."""
