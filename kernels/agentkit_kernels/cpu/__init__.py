"""The operations on a CPU: loops compiled by Numba, and the library's matrix products.

One file per operation, named as in `reference`; `loops.py` has all compiled loops. Nothing is padded or masked for
exactness, because the loops and the products (`linear.py`) compute each row by itself. Arrays are numpy arrays.
"""

from agentkit_kernels.cpu.backend import Cpu

__all__ = ["Cpu"]
