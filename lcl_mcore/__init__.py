"""Latent Compression Learning (NeurIPS 2024) pre-training on megatron-core."""

from lcl_mcore.distributed import late_compile

__version__ = "0.1.0"

late_compile.install()
