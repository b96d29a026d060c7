"""CPU kernels: C++ in src/, how it is compiled (build.py) and called (native.py, prefill.py)."""
