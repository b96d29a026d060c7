"""Top-theta attention on GPUs, in Triton: the contract of `kernels.ops` for caches as GPUs hold
them."""
