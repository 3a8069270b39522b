"""Kernels, and a slice of DeepSeek-V4-Flash, on a GPU: `python -m agentkit_engine.benchmarks.gpu`, or `make gpu`.

`slice.py` makes and measures the slice. `agentkit_kernels.gpu` has the command line, the clocks and the other parts.
"""
