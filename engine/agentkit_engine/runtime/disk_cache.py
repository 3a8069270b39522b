"""Checkpoints on disk, for later processes and for more checkpoints than memory holds.

A checkpoint is stored as *frames*: one per full span, which all checkpoints with the same prefix share, and one for the
tail (the slot's rows and the open span). Frames are appended to segment files. Every process writes its own segments
and reads those of all processes, so no locks are needed: an incomplete frame counts as absent, and one that was cut off
by a crash stays absent. Data is checked before it is used: the folder's owner and mode and a signature with the user's
own key (`cache_folder.py`), then names, shapes and dtypes against the running model's.

Nothing depends on the cache. Damaged, foreign or missing state is computed again, and after a failed write the cache
logs one warning and stops writing.

    frame = MAGIC, header bytes (u32), payload bytes (u64), digest of the payload, signature, header, payload

The signature covers everything before it, and the header; a header with a wrong signature is not parsed. Both hashes
are keyed BLAKE2b of 16 bytes. The header is JSON, the payload a safetensors file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import re
import secrets
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from agentkit_engine.errors import CacheFolderError, OutOfMemoryError, WorkerLostError
from agentkit_engine.runtime import cache_folder
from agentkit_engine.runtime.cache_folder import DIGEST_BYTES, Seal
from agentkit_engine.runtime.prefix_cache import IdChain
from agentkit_engine.runtime.saved import layout
from agentkit_engine.runtime.state import SPAN, Pools, Sequence
from agentkit_engine.untrusted import open_regular

logger = logging.getLogger(__name__)

MAGIC = b"AKCACHE2"
_FRAME = struct.Struct(f"<8sIQ{DIGEST_BYTES}s{DIGEST_BYTES}s")
SEGMENT_BYTES = 64 << 20
"""A segment larger than this, or than a quarter of the budget, is closed; the budget removes whole segments."""
BACKLOG_BYTES = 256 << 20
"""While more than this waits to be written, new checkpoints are not stored."""
MAX_HEADER_BYTES = 1 << 14
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    """A frame's location: segment name, offset and sizes. `fixed` holds the bytes before the header."""

    segment: str
    start: int
    fixed: bytes
    header_bytes: int
    payload_bytes: int

    @property
    def payload_start(self) -> int:
        return self.start + _FRAME.size + self.header_bytes


@dataclass(frozen=True, slots=True)
class StoredTail:
    """A checkpoint on disk: its length, its largest length so far, and the ids after its last full span."""

    length: int
    written: int
    tail: tuple[int, ...]
    place: _Place


@dataclass(slots=True)
class _Scan:
    """The offset up to which a segment has been read, and whether reading may continue."""

    end: int = 0
    readable: bool = True


@dataclass(slots=True)
class DiskStats:
    """Counts since the start of this process; bytes are those of whole frames."""

    written_bytes: int = 0
    read_bytes: int = 0
    loaded: int = 0
    damaged: int = 0
    not_stored: int = 0


class DiskCache:
    """The checkpoints of one model in one folder, shared by any number of processes."""

    def __init__(self, folder: Path, pools: Pools, *, model: str, budget_bytes: int) -> None:
        """Open or create the cache; frames of other models and layouts are in other folders and stay untouched.

        `budget_bytes` bounds this model's segments; the least recently used are removed first.

        Raises:
            CacheFolderError: others may write to the folder, or the user's key cannot be used.
        """
        cache_folder.check_usable(folder)
        self._root, self._name = folder, f"{model[:16]}-{layout(pools)}"
        self.folder = folder / self._name
        self._seal = Seal(cache_folder.user_key(), self._name.encode())
        self.pools, self.budget_bytes = pools, budget_bytes
        self.stats = DiskStats()
        self._spans: dict[bytes, _Place] = {}
        self._tails: dict[bytes, list[StoredTail]] = {}
        self._scans: dict[str, _Scan] = {}
        self._stored: set[bytes] = set()  # keys this process has handed to its writer
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Tensor]] | None] = queue.SimpleQueue()
        self._backlog = 0
        self._lock = threading.Lock()  # guards `_backlog`
        self._failed = False
        self._segment: BinaryIO | None = None
        self._segment_name = ""
        self._writer: threading.Thread | None = None
        self._refresh()

    # Reading, on the model thread.

    def find(self, ids: Seq[int], chain: IdChain, *, above: int) -> StoredTail | None:
        """Return the longest checkpoint of more than `above` and fewer than all of `ids`, or None."""
        self._refresh()
        full = (len(ids) - 1) // SPAN
        for spans in range(full, above // SPAN - 1, -1):
            node = chain.upto(ids, full)[spans]
            fitting = [
                stored
                for stored in self._tails.get(node, ())
                if above < stored.length < len(ids) and stored.tail == tuple(ids[spans * SPAN : stored.length])
            ]
            if fitting:
                return max(fitting, key=lambda stored: stored.length)
        return None

    def load(self, stored: StoredTail, ids: Seq[int], chain: IdChain) -> Sequence | None:
        """Return a sequence with that state; None if a part of it is gone or damaged.

        Raises:
            OutOfMemoryError: there is no free slot, or not enough free spans.
        """
        keys = chain.upto(ids, stored.length // SPAN)[1:]
        places = [self._spans.get(key) for key in keys]
        parts = [self._read(place, self._span_tensors) if place else None for place in places]
        tail = self._tail_tensors | (self._span_tensors if stored.length % SPAN else {})
        parts.append(self._read(stored.place, tail))
        if any(part is None for part in parts):
            self._forget(stored.place)
            return None
        sequence = self.pools.open()
        try:
            self.pools.reserve(sequence, stored.length)
        except OutOfMemoryError:
            self.pools.close(sequence)
            raise
        whole = [part for part in parts if part is not None]
        for index, part in enumerate(whole):
            stacked = {name: rows[None] if name.startswith("entries") else rows for name, rows in part.items()}
            self.pools.write(sequence, index, stacked)
        sequence.length, sequence.written = stored.length, stored.written
        self.stats.loaded += 1
        return sequence

    # Writing: snapshots on the model thread, files on another.

    def store(self, ids: Seq[int], chain: IdChain, sequence: Sequence) -> None:
        """Queue the state of `sequence`, which holds the first of `ids`, for writing; stored parts are skipped."""
        if self._failed or self._backlog > BACKLOG_BYTES:
            self.stats.not_stored += 1
            return
        with suppress(WorkerLostError):  # then the state is gone
            self._store(ids, chain, sequence)

    def _store(self, ids: Seq[int], chain: IdChain, sequence: Sequence) -> None:
        full = sequence.length // SPAN
        nodes = chain.upto(ids, full)
        for index, key in enumerate(nodes[1:]):
            if key not in self._spans and key not in self._stored:
                self._put({"kind": "span", "key": key.hex()}, key, self._frame(sequence, index, index + 1, tail=False))
        key = chain.key(ids, sequence.length)
        if key in self._stored:
            return
        tensors = self._frame(sequence, full, -(-sequence.length // SPAN), tail=True)
        header = {"kind": "tail", "key": nodes[-1].hex(), "length": sequence.length, "written": sequence.written}
        self._put(header | {"tail": list(ids[full * SPAN : sequence.length])}, key, tensors)

    def close(self) -> None:
        """Write everything queued and stop the writer. The cache can be used again afterwards."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()
            self._writer = None

    @property
    def _span_tensors(self) -> dict[str, Tensor]:
        """Tensors with the shapes and dtypes of a span's frame."""
        return {f"entries.{index}": entries[0] for index, entries in enumerate(self.pools.entries)}

    @property
    def _tail_tensors(self) -> dict[str, Tensor]:
        return {f"tail.{index}": tail[0] for index, tail in enumerate(self.pools.tails)}

    def _frame(self, sequence: Sequence, first: int, last: int, *, tail: bool) -> dict[str, Tensor]:
        """Return the state of at most one span, without the spans' dimension."""
        rows = self.pools.read(sequence, first, last, tail=tail)
        return {name: part[0] if name.startswith("entries") else part for name, part in rows.items()}

    def _put(self, header: dict[str, Any], key: bytes, tensors: dict[str, Tensor]) -> None:
        self._stored.add(key)
        with self._lock:
            self._backlog += sum(tensor.nbytes for tensor in tensors.values())
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="agentkit_engine: disk cache", daemon=True)
            self._writer.start()
        self._queue.put((header, tensors))

    def _write_all(self) -> None:
        """Run the writer thread: write frames in order until None arrives."""
        while (job := self._queue.get()) is not None:
            header, tensors = job
            try:
                if not self._failed:
                    self._write(header, save(tensors))
            except (OSError, CacheFolderError) as error:
                self._failed = True
                logger.warning("disk cache: writing to %s failed, so nothing more is stored: %s", self.folder, error)
            finally:
                with self._lock:
                    self._backlog -= sum(tensor.nbytes for tensor in tensors.values())
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _write(self, header: dict[str, Any], payload: bytes) -> None:
        with cache_folder.open_folder(self._root, self._name, create=True) as folder:
            if self._segment is None or self._segment.tell() > min(SEGMENT_BYTES, self.budget_bytes // 4):
                if self._segment is not None:
                    self._segment.close()
                self._segment_name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}.segment"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._segment = os.fdopen(os.open(self._segment_name, flags, 0o600, dir_fd=folder), "wb")
            text = json.dumps(header, separators=(",", ":")).encode()
            fixed = _FRAME.pack(MAGIC, len(text), len(payload), _digest(self._seal, payload), bytes(DIGEST_BYTES))
            fixed = fixed[:-DIGEST_BYTES] + self._seal.sign(fixed[:-DIGEST_BYTES] + text)
            self._segment.write(fixed + text + payload)
            self._segment.flush()
            self.stats.written_bytes += len(fixed) + len(text) + len(payload)
            self._keep_to_budget(folder)

    def _keep_to_budget(self, folder: int) -> None:
        """Remove the least recently used segments, except the one being written."""
        found = [(status.st_mtime_ns, status.st_size, name) for name, status in cache_folder.segments(folder)]
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total <= self.budget_bytes:
                return
            if name != self._segment_name or self._segment is None:
                with suppress(FileNotFoundError):  # another process removed it
                    os.unlink(name, dir_fd=folder)
                total -= size

    # The index.

    def _refresh(self) -> None:
        """Index frames added since by any process, and forget segments that are gone."""
        try:
            with cache_folder.open_folder(self._root, self._name) as folder:
                found = {name: status.st_size for name, status in cache_folder.segments(folder)}
                for name in self._scans.keys() - found.keys():
                    del self._scans[name]
                    self._forget_segment(name)
                for name in sorted(found):
                    scan = self._scans.setdefault(name, _Scan())
                    if scan.readable and found[name] > scan.end:
                        self._scan(folder, name, scan)
        except (OSError, CacheFolderError):  # missing, or not safe to read; writing reports the reason
            for name in list(self._scans):
                del self._scans[name]
                self._forget_segment(name)

    def _scan(self, folder: int, name: str, scan: _Scan) -> None:
        try:
            with open_regular(name, follow=False, dir_fd=folder) as file:
                for header, place in _frames(file, name, scan, self._seal):
                    self._add(header, place)
        except OSError:
            scan.readable = False
            return
        if not scan.readable:
            logger.warning(
                "%s/%s is damaged or not signed with this user's key from byte %d on; the rest is skipped",
                *(self.folder, name, scan.end),
            )

    def _add(self, header: dict[str, Any], place: _Place) -> None:
        """Index a frame with a valid signature, unless it does not fit this model."""
        key = bytes.fromhex(header["key"])
        if header["kind"] == "span":
            self._spans[key] = place
            return
        tail = StoredTail(header["length"], header["written"], tuple(header["tail"]), place)
        spec = self.pools.spec
        fits = 0 < tail.length <= tail.written <= spec.max_position_embeddings and len(tail.tail) == tail.length % SPAN
        if fits and all(0 <= token_id < spec.vocab_size for token_id in tail.tail):
            self._tails.setdefault(key, []).append(tail)

    def _read(self, place: _Place, expected: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the tensors of a frame; None, and forget the frame, if they are damaged or do not fit this model."""
        try:
            if place.payload_bytes > sum(tensor.nbytes for tensor in expected.values()) + MAX_HEADER_BYTES:
                raise ValueError("size")
            with (
                cache_folder.open_folder(self._root, self._name) as folder,
                open_regular(place.segment, follow=False, dir_fd=folder) as file,
            ):
                if not cache_folder.is_own_file(os.fstat(file.fileno())):
                    raise ValueError("owner")
                frame = os.pread(file.fileno(), place.payload_start - place.start + place.payload_bytes, place.start)
                os.utime(file.fileno())
            payload = frame[_FRAME.size + place.header_bytes :]
            # Require the indexed signature, not just a valid one: another signed frame could be at this offset.
            if frame[: _FRAME.size] != place.fixed or not _holds(self._seal, place, [payload]):
                raise ValueError("checksum")
            self.stats.read_bytes += len(frame)
            found = load(payload)
            if {name: _form(tensor) for name, tensor in found.items()} != {
                name: _form(tensor) for name, tensor in expected.items()
            }:
                raise ValueError("names, shapes or dtypes")
            return found
        except (OSError, ValueError, SafetensorError, CacheFolderError):
            self.stats.damaged += 1
            self._forget(place)
            return None

    def _forget(self, place: _Place) -> None:
        self._spans = {key: other for key, other in self._spans.items() if other != place}
        self._tails = {
            key: kept for key, tails in self._tails.items() if (kept := [t for t in tails if t.place != place])
        }

    def _forget_segment(self, name: str) -> None:
        self._stored.clear()  # its frames may be stored again
        self._spans = {key: place for key, place in self._spans.items() if place.segment != name}
        self._tails = {
            key: kept for key, tails in self._tails.items() if (kept := [t for t in tails if t.place.segment != name])
        }


# Maintenance of a whole cache folder.


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The contents of a cache folder for one model and layout.

    Attributes:
        name: The name of its subfolder: the start of the model's fingerprint, and the layout.
        segments, bytes: The number of its files, and their total size.
        spans, checkpoints: The numbers of intact frames of each kind.
        damaged: The number of frames with a wrong checksum, plus segments that cannot be read to their end because they
            are truncated or the rest is not signed with this user's key. The last frame of a segment that a process is
            writing at this moment counts too.
    """

    name: str
    segments: int
    bytes: int
    spans: int
    checkpoints: int
    damaged: int


def survey(folder: Path) -> list[StoredModel]:
    """List the contents of a cache folder by model, reading and checking every byte; foreign files are skipped.

    Raises:
        CacheFolderError: the folder is not this user's own, or the user's key cannot be used.
        OSError: the folder does not exist, or a file cannot be read.
    """
    key = cache_folder.user_key()
    models = []
    for name in _models(folder):
        segments = size = spans = checkpoints = damaged = 0
        with cache_folder.open_folder(folder, name) as inside:
            for segment, status in sorted(cache_folder.segments(inside)):
                scan, seal = _Scan(), Seal(key, name.encode())
                segments, size = segments + 1, size + status.st_size
                with open_regular(segment, follow=False, dir_fd=inside) as file:
                    for header, place in _frames(file, segment, scan, seal):
                        if not _holds(seal, place, _chunks(file, place)):
                            damaged += 1
                        elif header["kind"] == "span":
                            spans += 1
                        else:
                            checkpoints += 1
                damaged += scan.end < status.st_size
        models.append(StoredModel(name, segments, size, spans, checkpoints, damaged))
    return models


def prune(folder: Path, budget_bytes: int) -> tuple[int, int]:
    """Remove the least recently used segments of all models until at most `budget_bytes` are left.

    Foreign files are left alone. A process that is using the cache computes missing state again.

    Returns:
        The number of removed segments, and of bytes left.

    Raises:
        CacheFolderError: the folder is not this user's own.
        OSError: the folder does not exist, or a file cannot be removed.
    """
    found: list[tuple[int, str, str, int]] = []
    for model in _models(folder):
        with cache_folder.open_folder(folder, model) as inside:
            found += [(at.st_mtime_ns, model, name, at.st_size) for name, at in cache_folder.segments(inside)]
    left, removed = sum(size for *_, size in found), 0
    for _, model, name, size in sorted(found):
        if left <= budget_bytes:
            break
        with cache_folder.open_folder(folder, model) as inside, suppress(FileNotFoundError):
            os.unlink(name, dir_fd=inside)
        left -= size
        removed += 1
    return removed, left


_MODEL_FOLDER = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")


def _models(folder: Path) -> list[str]:
    """Return the names of the model folders in a cache folder; other names are foreign."""
    with cache_folder.open_folder(folder) as inside, os.scandir(inside) as entries:
        return sorted(
            entry.name
            for entry in entries
            if _MODEL_FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        )


# Frames.


def _frames(file: BinaryIO, segment: str, scan: _Scan, seal: Seal) -> Iterator[tuple[dict[str, Any], _Place]]:
    """Yield the signed frames from `scan.end` on.

    Stops at an incomplete frame, and sets `scan.readable` to False at an unsigned one.
    """
    size = os.fstat(file.fileno()).st_size
    while size - scan.end >= _FRAME.size:
        fixed = os.pread(file.fileno(), _FRAME.size, scan.end)
        magic, header_bytes, payload_bytes, _, signature = _FRAME.unpack(fixed.ljust(_FRAME.size))
        if magic != MAGIC or header_bytes > MAX_HEADER_BYTES:
            scan.readable = False
            return
        place = _Place(segment, scan.end, fixed, header_bytes, payload_bytes)
        if place.payload_start > size:
            return
        header = os.pread(file.fileno(), header_bytes, scan.end + _FRAME.size)
        if not seal.signed(fixed[:-DIGEST_BYTES] + header, signature):
            scan.readable = False
            return
        if place.payload_start + payload_bytes > size:
            return
        scan.end = place.payload_start + payload_bytes
        yield json.loads(header), place


def _holds(seal: Seal, place: _Place, payload: Iterable[bytes]) -> bool:
    """Return whether the payload has the digest in the frame."""
    digest = hashlib.blake2b(key=seal.key, digest_size=DIGEST_BYTES)
    for chunk in payload:
        digest.update(chunk)
    return digest.digest() == place.fixed[-2 * DIGEST_BYTES : -DIGEST_BYTES]


def _chunks(file: BinaryIO, place: _Place) -> Iterator[bytes]:
    start, end = place.payload_start, place.payload_start + place.payload_bytes
    while start < end and (chunk := os.pread(file.fileno(), min(_CHUNK_BYTES, end - start), start)):
        yield chunk
        start += len(chunk)


def _digest(seal: Seal, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, key=seal.key, digest_size=DIGEST_BYTES).digest()


def _form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
