"""Find out if the CPU kernels are already compiled for this machine. Numba keeps them on disk, by processor."""

from __future__ import annotations

from numba.core.registry import cpu_target

from agentkit_kernels.cpu import loops, panels

KERNELS = (
    *(getattr(loops, name) for name in ("attend", "compress", "connect", "heads", "rms_norm", "route", "swiglu")),
    panels.multiply,
    panels.choose,
)
"""Kernels that a forward of any length calls; the others are compiled with them, or right after."""


def is_compiled() -> bool:
    """Return whether a forward can start without waiting for the compiler.

    The function reads Numba's cache folder through names that Numba does not document. If a version lacks these names,
    the result is False, which only causes an extra line on the terminal.
    """
    try:
        processor = cpu_target.target_context.codegen().magic_tuple()
        for kernel in KERNELS:
            index = kernel._cache._cache_file._load_index()  # empty when its source changed
            if not any(processor in key for key in index):
                return False
    except (AttributeError, OSError, ValueError):
        return False
    return True
