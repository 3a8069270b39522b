"""The memory that weights need, checked before any is allocated: a file can claim terabytes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from agentkit_engine.errors import ModelTooLargeError
from agentkit_engine.weights.names import TensorSpec
from agentkit_engine.weights.safetensors_file import StoredTensor
from agentkit_engine.weights.stored_rows import StoredRows, find_packed

GIB = 1 << 30


def available_memory(device: torch.device | None = None) -> int:
    """Return the bytes of memory that this machine can still give to a process, or those that are free on a GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(
    folder: Path,
    expected: Mapping[str, TensorSpec],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    packed: Mapping[str, StoredRows],
    expert_cache_bytes: int | None = None,
    *,
    device: torch.device | None = None,
    devices: int = 1,
) -> None:
    """Raise an error if the weights do not fit on the device, by default a CPU.

    With `expert_cache_bytes`, routed experts take at most this much; the others of a GPU are in host memory. Each of
    several GPUs, `devices`, needs its share of the packed ones; processes on a CPU share its memory, which must hold
    all of them.

    Raises:
        ModelTooLargeError: names what is needed, what there is, and the forms of this model that would fit.
    """
    on_gpu = device is not None and device.type == "cuda"
    devices = devices if on_gpu else 1
    if on_gpu and expert_cache_bytes is not None:
        host, experts = available_memory(), sum(rows.nbytes for rows in packed.values() if len(rows.shape) == 3)
        if experts > host:
            raise ModelTooLargeError(
                folder,
                f"expert_cache_bytes keeps its experts in host memory, which needs {experts / GIB:.1f} GiB, has "
                f"{host / GIB:.1f} GiB; use a machine with more, or more devices",
            )
    needed = _needed(expected, dtype, packed, expert_cache_bytes, devices=devices)
    available = available_memory(device)
    if needed <= available:
        return
    place = "in host memory" if on_gpu else "on disk"
    as_stored = find_packed(expected, stored, int8=False, group_rows=0)
    forms = {
        "loaded as it is stored, without a dtype": _needed(expected, torch.bfloat16, as_stored, devices=devices),
        'loaded with dtype="int8"': _needed(
            expected, torch.bfloat16, find_packed(expected, stored, int8=True, group_rows=0), devices=devices
        ),
        f"loaded with expert_cache_bytes=2**30, its experts {place},": _needed(
            expected, torch.bfloat16, as_stored, 1 << 30, devices=devices
        ),
        "converted to FP8 and FP4 (agentkit convert)": sum(map(_official_bytes, expected.values())),
    }
    fitting = [f"{form} it needs {size / GIB:.1f} GiB" for form, size in forms.items() if size <= available]
    remedy = "; or ".join(fitting) or f"the smallest form of it needs {min(*forms.values(), needed) / GIB:.1f} GiB"
    raise ModelTooLargeError(
        folder, f"needs {needed / GIB:.1f} GiB of memory for its weights, has {available / GIB:.1f} GiB; {remedy}"
    )


def _needed(
    expected: Mapping[str, TensorSpec],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    packed: Mapping[str, StoredRows],
    expert_cache_bytes: int | None = None,
    *,
    devices: int = 1,
) -> int:
    kept = {"f32": torch.float32, "i64": torch.int64}
    experts = sum(rows.nbytes for rows in packed.values() if len(rows.shape) == 3) // devices
    total = sum(rows.nbytes for rows in packed.values() if len(rows.shape) == 2)
    total += experts if expert_cache_bytes is None else min(experts, expert_cache_bytes)
    for tensor in expected.values():
        if tensor.parameter not in packed:
            own = dtype if isinstance(dtype, torch.dtype) else dtype[tensor.parameter]
            total += math.prod(tensor.shape) * kept.get(tensor.storage, own).itemsize
    return total


def _official_bytes(tensor: TensorSpec) -> int:
    bits = {"bf16": 16, "f32": 32, "i64": 64, "fp8": 8, "fp4": 4.25, "int8": 8}[tensor.storage]
    return int(math.prod(tensor.shape) * bits / 8)
