"""Validation of the arguments of `Engine.load`. Each error names the value, the values accepted and a remedy."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path
from typing import cast, get_args

import torch

from agentkit_engine.errors import DeviceUnavailableError
from agentkit_engine.runtime.runner import CpuLimits
from agentkit_engine.runtime.state import KVCacheDtype
from agentkit_engine.spec import ModelSpec
from agentkit_kernels.packed import Format
from agentkit_kernels.reference.quantize import FP4_GROUP

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""Dtypes for weights, by the names that `dtype` accepts."""


def check_model(model: object) -> str | Path:
    """Return the model's name or path.

    Raises:
        TypeError: it is neither a str nor a path.
    """
    if isinstance(model, str):
        return model
    if isinstance(model, os.PathLike):
        return Path(model)
    raise TypeError(f'model must be a name such as "tiny" or the path of a folder, got {model!r}')


def check_device(device: object) -> torch.device:
    """Return the device, checked to exist on this machine.

    Raises:
        TypeError: it is neither a str nor a `torch.device`.
        ValueError: torch does not know the device, or the engine does not support its type.
        DeviceUnavailableError: it is a GPU that this torch does not see.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f'device must be a str such as "cpu" or "cuda:0", or a torch.device, got {device!r}')
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:N", got {device!r}') from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f'the engine runs on "cpu" and "cuda", got device={str(found)!r}')
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise DeviceUnavailableError(
            f"device={str(found)!r} does not exist: torch {torch.__version__} sees {count} GPUs; "
            'use device="cpu", or install a GPU driver and a CUDA build of torch'
        )
    return found


def check_devices(devices: object, first: torch.device, gpus: int) -> int:
    """Return the number of devices, which are `first` and those after it, of the `gpus` that torch sees.

    Raises:
        TypeError: it is not an int.
        ValueError: it is below 1.
        DeviceUnavailableError: this machine has fewer GPUs.
    """
    if not isinstance(devices, int) or isinstance(devices, bool):
        raise TypeError(f"devices must be a whole number, got {devices!r}")
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}; leave it out to use one")
    start = first.index or 0
    if first.type == "cuda" and start + devices > gpus:
        raise DeviceUnavailableError(
            f"devices={devices} needs cuda:{start} to cuda:{start + devices - 1}, but torch sees {gpus} GPUs; use "
            f"devices={gpus - start}"
        )
    return devices


def check_dtype(dtype: object) -> torch.dtype | None:
    """Return the dtype for the weights; None chooses it from the stored weights.

    Raises:
        TypeError: it is neither a str, nor a `torch.dtype`, nor None.
        ValueError: the engine does not support this dtype.
    """
    if dtype is not None and not isinstance(dtype, str | torch.dtype):
        raise TypeError(f'dtype must be a str such as "bfloat16", a torch.dtype or None, got {dtype!r}')
    dtypes = DTYPES | {"int8": torch.int8}
    found = dtypes.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in dtypes.values():
        raise ValueError(f"dtype must be one of {', '.join(dtypes)} or None, got {str(dtype)!r}")
    return found


def check_backend_dtype(backend: str, dtype: torch.dtype | None) -> None:
    """Check that a backend can compute with weights held as this dtype.

    Raises:
        ValueError: it is `triton`, whose activations are float32 or bfloat16, and the dtype another one.
    """
    if backend == "triton" and dtype in (torch.float16, torch.float64):
        raise ValueError(
            f'dtype="{str(dtype).removeprefix("torch.")}" is not implemented by backend="triton", which computes in '
            'bfloat16 or float32; use dtype="bfloat16" or dtype="float32", or leave it out'
        )


def check_kv_cache_dtype(value: object) -> KVCacheDtype:
    """Return the format of the rows that sessions keep.

    Raises:
        TypeError: it is not a str.
        ValueError: there is no such format.
    """
    if not isinstance(value, str):
        raise TypeError(f'kv_cache_dtype must be a str such as "auto", got {value!r}')
    for known in get_args(KVCacheDtype):
        if value == known:
            return cast(KVCacheDtype, known)
    raise ValueError(f'no kv_cache_dtype "{value}"; choose one of {", ".join(get_args(KVCacheDtype))}')


def check_flag(name: str, value: object) -> bool:
    """Return the flag.

    Raises:
        TypeError: it is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_quantization(spec: ModelSpec, formats: Set[Format]) -> None:
    """Check that activations can be quantised for a model whose matrices are packed in these formats.

    Raises:
        ValueError: there are no FP8 or FP4 matrices, or others too, or index keys do not fit into FP4.
    """
    if not formats or not formats <= {"fp8", "mxfp4"}:
        raise ValueError(
            "quantize_activations=True rounds the inputs of FP8 and FP4 matrices, but this model's are held as "
            f"{', '.join(sorted(formats)) or 'float32 or bfloat16'}; load a checkpoint in the official formats without "
            "dtype=, or leave quantize_activations out"
        )
    size = spec.index_head_dim
    indexed = any(layer.attention == "csa" for layer in spec.layers)
    if indexed and (size % FP4_GROUP or size & (size - 1)):
        raise ValueError(
            f"quantize_activations=True needs an index_head_dim that is a power of two of at least {FP4_GROUP}, and "
            f"this model's is {size}; leave it out"
        )


def check_bytes(name: str, value: object) -> int:
    """Return the number of bytes.

    Raises:
        TypeError: it is not an int.
        ValueError: it is below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number of bytes, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 byte, got {value}")
    return value


def check_host_cache_bytes(value: object, device: torch.device) -> int:
    """Return the number of bytes; 0 for None.

    Raises:
        TypeError: it is neither an int nor None.
        ValueError: it is negative, or the device is a CPU.
    """
    if value is None or (type(value) is int and value == 0):
        return 0
    held = check_bytes("host_cache_bytes", value)
    if device.type == "cpu":
        raise ValueError(
            "host_cache_bytes is for a GPU; on a CPU all state is in host memory already, so raise kv_cache_bytes"
        )
    return held


def check_limits(backend: str, threads: object, expert_cache_bytes: object) -> CpuLimits:
    """Return the limits of the `cpu` and `triton` backends.

    Raises:
        TypeError: one is neither an int nor None.
        ValueError: one is below 1, or given for another backend.
    """
    options = (("threads", threads, ("cpu",)), ("expert_cache_bytes", expert_cache_bytes, ("cpu", "triton")))
    for name, value, backends in options:
        if value is not None and backend not in backends:
            listed = " and ".join(f'backend="{each}"' for each in backends)
            raise ValueError(f'{name} is an option of {listed}, but the backend is "{backend}"; leave it out')
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool)):
        raise TypeError(f"threads must be a whole number or None, got {threads!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    held = None if expert_cache_bytes is None else check_bytes("expert_cache_bytes", expert_cache_bytes)
    return CpuLimits(threads, held)
