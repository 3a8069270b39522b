"""A session in a file: its ids, and the state that was computed of them, so that going on costs no prefill.

The file is a safetensors file: `ids`, `fed` (1 for an id that was fed, 0 for one that was sampled), one `tail.N` per
tensor of a slot, one `entries.N` per tensor of the spans. Its metadata names the model and the layout of the state, and
a checksum of everything; a file that differs in any of these is refused, never misread. It is written beside its place
and moved there, so it is whole or not there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agentkit_engine.errors import SavedSessionError
from agentkit_engine.runtime.state import ROLLBACK, SPAN, Pools, Sequence

FORMAT = "agentkit-session/1"


def layout(pools: Pools) -> str:
    """What the state of a sequence looks like: another value means that its bytes mean something else."""
    shapes = [tuple(tensor.shape[1:]) for tensor in (*pools.tails, *pools.entries)]
    return hashlib.blake2b(repr((SPAN, ROLLBACK, shapes)).encode(), digest_size=8).hexdigest()


def write(path: Path, ids: Seq[int], fed: bytes, sequence: Sequence | None, pools: Pools, *, model: str) -> None:
    """Write a session. Without a sequence only the ids are kept.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    tensors = {"ids": torch.tensor(ids, dtype=torch.int32), "fed": torch.tensor(list(fed), dtype=torch.uint8)}
    if sequence is not None:
        spans = sequence.table[: -(-sequence.length // SPAN)]
        tensors |= {f"tail.{index}": tail[sequence.slot].cpu() for index, tail in enumerate(pools.tails)}
        tensors |= {f"entries.{index}": entries[spans].cpu() for index, entries in enumerate(pools.entries)}
    length, written = (0, 0) if sequence is None else (sequence.length, sequence.written)
    metadata = {"format": FORMAT, "model": model, "layout": layout(pools)}
    metadata |= {"length": str(length), "written": str(written)}
    metadata["checksum"] = _checksum(metadata, tensors)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata=metadata)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path, *, model: str, layout: str) -> tuple[list[int], bytes, dict[str, Tensor], int, int]:
    """The ids, which of them were fed, the state's tensors, its length, and the most tokens it ever held.

    Raises:
        SavedSessionError: not such a file, of another model or layout, or its content is damaged.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for name, expected in {"format": FORMAT, "model": model, "layout": layout}.items():
                if metadata.get(name) != expected:
                    raise SavedSessionError(path, f"{name} is {metadata.get(name)!r}, expected {expected!r}")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise SavedSessionError(path, f"not a whole safetensors file: {error}") from error
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(metadata, tensors):
        raise SavedSessionError(path, "its content does not match its checksum")
    ids: list[int] = tensors.pop("ids").tolist()
    fed = bytes(tensors.pop("fed").tolist())
    return ids, fed, tensors, int(metadata["length"]), int(metadata["written"])


def restore(pools: Pools, sequence: Sequence, tensors: dict[str, Tensor]) -> None:
    """Fill an open sequence that has the spans it needs."""
    for index, tail in enumerate(pools.tails):
        tail[sequence.slot] = tensors[f"tail.{index}"].to(tail.device)
    for index, entries in enumerate(pools.entries):
        entries[sequence.table[: sequence.num_spans]] = tensors[f"entries.{index}"].to(entries.device)


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(repr(sorted(metadata.items())).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(repr((name, tuple(tensors[name].shape))).encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
