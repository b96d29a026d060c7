"""Checks and benchmarks for a machine with a GPU; docs/gpu.md says how to run them."""
