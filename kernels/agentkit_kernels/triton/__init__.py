"""Triton kernels for NVIDIA and AMD GPUs, one file per operation, named as in `agentkit_kernels.reference`."""
