"""The GPUs that Triton's kernels support: those that they are compiled for, and later ones of NVIDIA."""

from __future__ import annotations

import torch

from agentkit_engine.errors import DeviceUnavailableError
from agentkit_kernels.aot.targets import TARGETS

OLDEST = min(target.arch for target in TARGETS.values() if isinstance(target.arch, int))
"""Compute capability of NVIDIA, times ten; older GPUs have no bfloat16 products."""
AMD = sorted(target.arch for target in TARGETS.values() if isinstance(target.arch, str))


def check_architecture(device: torch.device) -> None:
    """Check that Triton's kernels support a GPU.

    Raises:
        DeviceUnavailableError: it is too old, or an AMD GPU for which they are not compiled.
    """
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        found = f"sm_{properties.major}{properties.minor}"
        supported = 10 * properties.major + properties.minor >= OLDEST
    else:
        found = properties.gcnArchName.partition(":")[0]
        supported = found in AMD
    if not supported:
        raise DeviceUnavailableError(
            f'backend="triton" needs an NVIDIA GPU of sm_{OLDEST} or newer, or an AMD GPU of {", ".join(AMD)}, and '
            f'{str(device)!r} is {properties.name} ({found}); use backend="reference", or device="cpu"'
        )
