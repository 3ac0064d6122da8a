"""Measurements: synthetic batches, the speed of a training step, and the GPU report."""
