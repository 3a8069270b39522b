"""A slice of DeepSeek-V4-Flash on a GPU: `python -m agentkit_engine.benchmarks.gpu [--rehearse] [--only NAME,...]`.

`slice.py` makes and measures it; `agentkit_kernels.gpu` has the command line, the clocks and the kernels' own parts.
"""
