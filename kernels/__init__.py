"""Fused contrastive loss and its references; needs torch, uses Triton where present."""
