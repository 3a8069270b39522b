"""Kernels for the engine's forward: loops for CPUs in `cpu.py`. There are no Triton kernels yet."""
