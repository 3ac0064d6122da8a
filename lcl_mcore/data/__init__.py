"""Documents on disk to packed micro-batches, in an order that depends only on seed, mixture and data."""
