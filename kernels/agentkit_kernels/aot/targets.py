"""The GPUs that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Target:
    """One GPU architecture.

    Attributes:
        backend: Triton's backend: `cuda` for NVIDIA, `hip` for AMD.
        arch: Compute capability times ten, or AMD's name of the architecture.
        warp_size: Threads that run in step.
        shared_bytes: Shared memory that one program can have. Sources: CUDA C++ Programming Guide, table "Technical
            Specifications per Compute Capability"; AMD CDNA 3 ISA, section "Local Data Share".
    """

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_bytes: int


SM_80 = Target("sm_80", "cuda", 80, 32, 163 * 1024)
"""A100."""
SM_90 = Target("sm_90", "cuda", 90, 32, 227 * 1024)
"""H100 and H200."""
SM_100 = Target("sm_100", "cuda", 100, 32, 227 * 1024)
"""B200."""
GFX942 = Target("gfx942", "hip", "gfx942", 64, 64 * 1024)
"""MI300X."""
TARGETS = {target.name: target for target in (SM_80, SM_90, SM_100, GFX942)}
