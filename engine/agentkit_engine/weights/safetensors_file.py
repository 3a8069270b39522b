"""Safetensors files: a reader that loads one tensor at a time and names the faulty tensor in errors, and a writer.

The format is an 8-byte little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps.
Files are read, not mapped: a file that shrinks while it is read is an error here, but crashes the process under mmap.
Source: the safetensors format description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from agentkit_engine.errors import CheckpointError
from agentkit_engine.untrusted import open_regular, parse_json, shorten

MAX_HEADER_BYTES = 8 << 20
"""Enough for 50,000 tensors in one file; the official files hold 3,000 at most."""
_MAX_RANK = 8
_GIT_LFS = int.from_bytes(b"version ", "little")  # how the text of a pointer begins
_MAX_SIZE = 1 << 62

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
"""Dtypes in official checkpoints and saved sessions."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's location: `size` bytes from `start` in file `path`."""

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
    """Group tensors that are adjacent in a file into runs of at most `most_bytes`; a larger tensor is a run of its
    own."""
    found: list[list[StoredTensor]] = []
    for tensor in sorted(tensors, key=lambda tensor: (str(tensor.path), tensor.start)):
        follows = found and found[-1][0].path == tensor.path and found[-1][-1].end == tensor.start
        if follows and tensor.end - found[-1][0].start <= most_bytes:
            found[-1].append(tensor)
        else:
            found.append([tensor])
    return found


def write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors to a file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as exc:  # it has the operating system's error in its text only
        if (found := re.search(r"\(os error (\d+)\)", str(exc))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from exc


def read(run: Sequence[StoredTensor], *, ahead: bool = True) -> Iterator[Tensor]:
    """Yield the tensors of a run as stored, on the CPU. The system may read `ahead` what follows them in the file.

    Raises:
        CheckpointError: the file has become shorter since its header was read.
    """
    start = run[0].start
    bytes_X = torch.empty(run[-1].end - start, dtype=torch.uint8)
    with open_regular(run[0].path) as file:
        if not ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(start)
        found, memory = 0, bytes_X.numpy().data
        while found < len(memory) and (count := file.readinto(memory[found:])):
            found += count
    for tensor in run:
        if tensor.end - start > found:
            held = max(0, found + start - tensor.start)
            raise CheckpointError(tensor.path, f"found {held} bytes, expected {tensor.size}", tensor=tensor.name)
        dtype, own_X = DTYPES[tensor.dtype], bytes_X[tensor.start - start : tensor.end - start]
        if own_X.storage_offset() % dtype.itemsize:  # unaligned: it follows a tensor with smaller items
            own_X = own_X.clone()
        yield own_X.view(dtype).view(tensor.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, checked against each other and the file's size; reads no weights.

    Raises:
        CheckpointError: the file cannot be read, the header is corrupted, a tensor has an unknown dtype or a size that
            does not follow from dtype and shape, or the file is truncated, has gaps, or has bytes that belong to no
            tensor.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Like `read_header`, and also return the file's metadata strings."""
    try:
        with open_regular(path) as file:
            file_size = os.fstat(file.fileno()).st_size
            header_size = int.from_bytes(file.read(8), "little")
            if header_size == _GIT_LFS:
                raise CheckpointError(
                    path, "found a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
                )
            if file_size < 8 or header_size > min(file_size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    path,
                    f"corrupted or truncated: a header of {header_size} bytes in a file of {file_size}; "
                    f"expected a safetensors file, with a header of at most {MAX_HEADER_BYTES} bytes",
                )
            header = file.read(header_size)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    try:
        entries = parse_json(header)
        if not isinstance(entries, dict):
            raise ValueError(f"found {shorten(entries)}, expected an object")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"__metadata__: found {shorten(metadata)}, expected an object of strings")
        found = [_stored(path, name, entry, 8 + header_size) for name, entry in entries.items()]
    except ValueError as error:
        raise CheckpointError(path, f"corrupted safetensors header: {error}") from error

    end = 8 + header_size
    for tensor in sorted(found, key=lambda tensor: (tensor.start, tensor.size)):
        size = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        if tensor.start != end or tensor.size != size:
            shift = 8 + header_size
            raise CheckpointError(
                path,
                f"corrupted header: found bytes {tensor.start - shift} to {tensor.end - shift}, expected "
                f"{end - shift} to {end - shift + size} ({tensor}, right after the tensor before it)",
                tensor=tensor.name,
            )
        end = tensor.end
        if end > file_size:
            raise CheckpointError(
                path,
                f"truncated: expected its {size} bytes to end at byte {end}, found a file of {file_size} bytes",
                tensor=tensor.name,
            )
    if end != file_size:
        raise CheckpointError(path, f"found {file_size} bytes, expected {end}; the remaining bytes belong to no tensor")
    return {tensor.name: tensor for tensor in found}, metadata


def _stored(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    """Parse one entry of a header and check it in isolation.

    Raises:
        CheckpointError: the dtype is unknown.
        ValueError: the entry is not `{"dtype": ..., "shape": [...], "data_offsets": [start, stop]}`.
    """
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shorten(name)}: found {shorten(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            path,
            f"found dtype {shorten(dtype, quote=False)}, expected one of {', '.join(DTYPES)}; store weights as BF16, "
            "F16 or F32, of which `agentkit convert` makes FP8, FP4 or int8",
            tensor=name,
        )
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"{shorten(name)}: found shape {shorten(shape)}, expected at most {_MAX_RANK} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shorten(name)}: found data_offsets {shorten(offsets)}, expected [start, stop]")
    return StoredTensor(path, name, dtype, tuple(shape), data_start + offsets[0], offsets[1] - offsets[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)
