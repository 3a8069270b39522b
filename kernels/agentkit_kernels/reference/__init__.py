"""The operations in plain, differentiable torch, on any device: the twin of every other backend.

One file per operation, with its formula and source; `agentkit_kernels.ops` describes arguments and results. Training
and serving run the same code: with pools as state it continues live sequences, without it is differentiable, and both
give the same bits. Everything is float32.
"""

from agentkit_kernels.reference.backend import Reference, host_zeros

__all__ = ["Reference", "host_zeros"]
