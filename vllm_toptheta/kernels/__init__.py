"""Attention kernels: tensors in, tensors out."""
