"""Compiles every Triton kernel for GPUs that are not there, and reads its cost from what comes out.

`python -m agentkit_kernels.aot` compiles the calls that each file in `agentkit_kernels.triton` lists, through the
launchers that users run, for the GPUs in `targets.py`. It shows that a kernel compiles for a part, fits its shared
memory, spills no registers, uses tensor cores and loads wide vectors. It shows nothing about time, bank conflicts or
races, nor that results are right on a device.
"""
