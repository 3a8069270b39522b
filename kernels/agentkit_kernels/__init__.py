"""Triton kernels for the engine. None yet: the engine runs on its plain-torch operations."""
