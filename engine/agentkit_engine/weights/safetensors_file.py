"""Reading one safetensors file, one tensor at a time, with errors that say which tensor is wrong.

The format is an 8-byte little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps.
Files are read, not mapped: a file that shrinks while it is being read is an error here and a crash of the process
under mmap. Source: the safetensors format description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from agentkit_engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I64": torch.int64,
}
"""The dtypes that official checkpoints use."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes are: `size` bytes from `start` of file `path`."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def runs(tensors: Iterable[StoredTensor], most_bytes: int) -> list[list[StoredTensor]]:
    """Tensors that lie one after the other in a file, together, up to so many bytes; a larger one by itself."""
    found: list[list[StoredTensor]] = []
    for tensor in sorted(tensors, key=lambda tensor: (str(tensor.path), tensor.start)):
        follows = found and found[-1][0].path == tensor.path and found[-1][-1].end == tensor.start
        if follows and tensor.end - found[-1][0].start <= most_bytes:
            found[-1].append(tensor)
        else:
            found.append([tensor])
    return found


def read(run: Sequence[StoredTensor]) -> Iterator[Tensor]:
    """The tensors of a run as stored, on the CPU.

    Raises:
        CheckpointError: the file is shorter than when its header was read.
    """
    start = run[0].start
    bytes_X = torch.empty(run[-1].end - start, dtype=torch.uint8)
    with run[0].path.open("rb", buffering=0) as file:
        file.seek(start)
        found, memory = 0, bytes_X.numpy().data
        while found < len(memory) and (count := file.readinto(memory[found:])):
            found += count
    for tensor in run:
        if tensor.end - start > found:
            held = max(0, found + start - tensor.start)
            raise CheckpointError(tensor.path, f"found {held} bytes, expected {tensor.size}", tensor=tensor.name)
        dtype, own_X = DTYPES[tensor.dtype], bytes_X[tensor.start - start : tensor.end - start]
        if own_X.storage_offset() % dtype.itemsize:  # behind a tensor of smaller items
            own_X = own_X.clone()
        yield own_X.view(dtype).view(tensor.shape)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def describe(error: ValidationError) -> str:
    """The first few problems of a validation, in one line."""
    problems = [f"{'.'.join(map(str, item['loc']))}: found {item['input']!r}, {item['msg']}" for item in error.errors()]
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, checked against each other and against the file's size; reads no weights.

    Raises:
        CheckpointError: the header is corrupted, a tensor has an unknown dtype or a size that does not follow from
            dtype and shape, or the file is truncated, has gaps, or has bytes that belong to no tensor.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if file_size < 8 or header_size > min(file_size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                path,
                f"corrupted or truncated: a header of {header_size} bytes in a file of {file_size}; "
                "expected a safetensors file",
            )
        header = file.read(header_size)
    try:
        entries = dict(json.loads(header))
        entries.pop("__metadata__", None)
        parsed = _ENTRIES.validate_python(entries)
    except ValidationError as error:
        raise CheckpointError(path, f"corrupted safetensors header: {describe(error)}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, f"corrupted safetensors header: {error}") from error

    data_start, end = 8 + header_size, 0
    tensors: dict[str, StoredTensor] = {}
    for name, entry in sorted(parsed.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in DTYPES:
            raise CheckpointError(path, f"found dtype {entry.dtype}, expected one of {', '.join(DTYPES)}", tensor=name)
        start, stop = entry.data_offsets
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if start != end or stop - start != size:
            raise CheckpointError(
                path,
                f"corrupted header: found bytes {start} to {stop}, expected {end} to {end + size} "
                f"({entry.dtype} {entry.shape}, right after the tensor before it)",
                tensor=name,
            )
        end = stop
        if data_start + end > file_size:
            raise CheckpointError(
                path,
                f"truncated: expected its {size} bytes to end at byte {data_start + end}, "
                f"found a file of {file_size} bytes",
                tensor=name,
            )
        tensors[name] = StoredTensor(path, name, entry.dtype, tuple(entry.shape), data_start + start, size)
    if data_start + end != file_size:
        raise CheckpointError(
            path, f"found {file_size} bytes, expected {data_start + end}: the rest belongs to no tensor"
        )
    return tensors
