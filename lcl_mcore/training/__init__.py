"""The training loop: step, optimizer, schedule, checkpoints, metrics, signals."""
