"""A session in a file: its ids and the state computed from them, so that continuing it needs no prefill.

The file is a safetensors file: `ids`, `fed` (1 for an id that was appended, 0 for one that was sampled), one `tail.N`
per tensor of a slot, one `entries.N` per tensor of the spans. Its metadata holds the model, the layout of the state and
a checksum of everything; a file that differs in any of these is rejected. Names, shapes, dtypes and lengths are checked
against the running model before any data is read. The file is written under another name and then renamed, so it is
complete or absent. Its mode is 0600, because token ids are text.

The checksum detects damage, not tampering: it has no key, so that a session can be opened on another machine. The state
in a file determines what the model generates. Open only files from people you trust, or append their ids to a new
session.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from torch import Tensor

from agentkit_engine.errors import CheckpointError, OutOfMemoryError, SavedSessionError
from agentkit_engine.runtime.state import ROLLBACK, SPAN, Pools, Sequence
from agentkit_engine.untrusted import open_regular, shorten
from agentkit_engine.weights import safetensors_file
from agentkit_engine.weights.safetensors_file import DTYPES

FORMAT = "agentkit-session/1"
_RUN_BYTES = 1 << 20


def layout(pools: Pools) -> str:
    """Return a hash of the state's layout; states with different values are incompatible."""
    rows = [list(kinds) for kinds in pools.rows]
    return hashlib.blake2b(repr((SPAN, ROLLBACK, rows)).encode(), digest_size=8).hexdigest()


def write(path: Path, ids: Seq[int], fed: bytes, sequence: Sequence | None, pools: Pools, *, model: str) -> None:
    """Write a session. Without a sequence only the ids are stored.

    Raises:
        OSError: the file cannot be written; an existing file is left as it was.
    """
    tensors = {"ids": torch.tensor(ids, dtype=torch.int32), "fed": torch.tensor(list(fed), dtype=torch.uint8)}
    if sequence is not None:
        spans = -(-sequence.length // SPAN)
        tensors |= pools.read(sequence, 0, spans)
        if not spans:
            tensors |= {
                f"entries.{index}": torch.empty((0, *entries.shape[1:]), dtype=entries.dtype)
                for index, entries in enumerate(pools.entries)
            }
    length, written = (0, 0) if sequence is None else (sequence.length, sequence.written)
    metadata = {"format": FORMAT, "model": model, "layout": layout(pools)}
    metadata |= {"length": str(length), "written": str(written)}
    metadata["checksum"] = _checksum(metadata, tensors)
    # A private folder, mode 0700, so that nobody can place a link where the file is about to be written.
    with tempfile.TemporaryDirectory(prefix=".agentkit-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        beside = Path(folder, "session")
        safetensors_file.write({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata)
        beside.chmod(0o600)
        beside.replace(path)


def read(path: Path, *, model: str, pools: Pools) -> tuple[list[int], bytes, dict[str, Tensor], int, int]:
    """Return the ids, which of them were appended, the state's tensors, its length, and its largest length so far.

    Raises:
        SavedSessionError: the file is not a saved session, belongs to another model or layout, or is damaged.
        OSError: the file cannot be read.
        OutOfMemoryError: its state exceeds all memory for sequences; none of it was read.
    """
    if path.exists() and not path.is_file():
        raise SavedSessionError(path, "not a regular file")
    open_regular(path).close()  # raises OSError for a file that cannot be opened
    try:
        stored, metadata = safetensors_file.read_header_and_metadata(path)
    except CheckpointError as error:
        raise SavedSessionError(path, f"not a whole safetensors file: {error}") from error
    for name, expected in {"format": FORMAT, "model": model, "layout": layout(pools)}.items():
        if metadata.get(name) != expected:
            raise SavedSessionError(path, f"{name} is {shorten(metadata.get(name))}, expected {expected!r}")
    count = stored["ids"].shape[0] if "ids" in stored and len(stored["ids"].shape) == 1 else 0
    most = pools.spec.max_position_embeddings
    if count > most:
        raise SavedSessionError(path, f"it holds {count} ids, but the model allows at most {most}")
    length, written = (_number(path, metadata, name, most) for name in ("length", "written"))
    if not (length <= count and length <= written and (length or not written)):
        raise SavedSessionError(
            path,
            f"length is {length} and written is {written}, expected a length of at most {count}, and written to be at "
            "least the length, and 0 if the length is",
        )
    spans = -(-length // SPAN)
    if spans > pools.spans:
        raise OutOfMemoryError(f"{path} needs {spans} spans, but only {pools.spans} exist; raise `kv_cache_bytes`")
    forms = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in stored.items()}
    for name, form in _forms(pools, count, length).items():
        if (found := forms.pop(name, None)) != form:
            raise SavedSessionError(path, f"tensor {name} is {found or 'missing'}, expected {form}")
    if forms:
        raise SavedSessionError(path, f"tensor {shorten(min(forms))} is unknown")

    tensors: dict[str, Tensor] = {}
    try:
        for run in safetensors_file.runs(stored.values(), _RUN_BYTES):
            tensors |= dict(zip([part.name for part in run], safetensors_file.read(run), strict=True))
    except CheckpointError as error:
        raise SavedSessionError(path, f"not a whole safetensors file: {error}") from error
    checksum = metadata.pop("checksum", None)
    if checksum != _checksum(metadata, tensors):
        raise SavedSessionError(path, "its content does not match its checksum")
    ids, fed = tensors.pop("ids"), tensors.pop("fed")
    if count and not 0 <= int(ids.min()) <= int(ids.max()) < pools.spec.vocab_size:
        raise SavedSessionError(path, f"it holds ids outside the vocabulary 0..{pools.spec.vocab_size - 1}")
    if count and int(fed.max()) > 1:
        raise SavedSessionError(path, "tensor fed holds values other than 0 and 1")
    return ids.tolist(), bytes(fed.tolist()), tensors, length, written


def _number(path: Path, metadata: Mapping[str, str], name: str, most: int) -> int:
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= most):
        raise SavedSessionError(path, f"{name} is {shorten(text)}, expected an integer from 0 to {most}")
    return int(text)


def _forms(pools: Pools, count: int, length: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the dtype and shape of every tensor in the file of a session of `count` ids, `length` of them computed."""
    forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "ids": (torch.int32, (count,)),
        "fed": (torch.uint8, (count,)),
    }
    if length:
        spans = -(-length // SPAN)
        forms |= {f"tail.{index}": (tail.dtype, tuple(tail.shape[1:])) for index, tail in enumerate(pools.tails)}
        forms |= {
            f"entries.{index}": (entries.dtype, (spans, *entries.shape[1:]))
            for index, entries in enumerate(pools.entries)
        }
    return forms


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(repr(sorted(metadata.items())).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(repr((name, tuple(tensors[name].shape))).encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
