"""Latent Compression Learning (NeurIPS 2024) pre-training on megatron-core."""

__version__ = "0.2.0"
