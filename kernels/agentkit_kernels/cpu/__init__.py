"""The operations on a CPU: loops compiled by Numba.

One file per operation, named as in `reference`; the compiled loops are in `loops.py`, those over panels of weights or
keys in `panels.py`. Nothing is padded or masked for exactness, because the loops and the products (`linear.py`)
compute each row by itself. Arrays are numpy arrays.
"""

from agentkit_kernels.cpu.backend import Cpu

__all__ = ["Cpu"]
