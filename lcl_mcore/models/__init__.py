"""The LCL model on megatron-core layers: ViT, attention pool, causal LM."""
