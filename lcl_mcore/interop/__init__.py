"""Weights in the names of other packages: released checkpoints, timm, open_clip and transformers."""
