"""The only place that knows about devices, optional packages and megatron-core's need for CUDA."""
