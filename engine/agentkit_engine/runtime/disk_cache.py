"""Checkpoints on disk, for sessions of later processes and for more of them than memory holds.

A checkpoint is stored as *frames*: one for each full span, shared by all that begin alike and written once, and one for
the tail (the slot's rows and the open span). Frames are appended to segment files. Every process writes files of its
own and reads everybody's, so nobody waits for a lock: a frame that is not whole yet is simply not there, and one that
was torn by a crash never will be. What is read is checked against its checksum before it is believed.

The disk is a cache and nothing depends on it: what is damaged, foreign or gone is computed again, and when the disk
refuses to write there is one warning and no more writing.

    frame = MAGIC, header bytes (u32), payload bytes (u64), blake2b of header and payload (16 bytes), header, payload

The header is JSON, the payload a safetensors file.
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
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from agentkit_engine.errors import OutOfMemoryError
from agentkit_engine.runtime.prefix_cache import IdChain
from agentkit_engine.runtime.saved import layout
from agentkit_engine.runtime.state import SPAN, Pools, Sequence

logger = logging.getLogger(__name__)

MAGIC = b"AKCACHE1"
_FRAME = struct.Struct("<8sIQ16s")
SEGMENT_BYTES = 64 << 20
"""A segment beyond this, or beyond a quarter of the budget, is closed; whole segments are what the budget removes."""
BACKLOG_BYTES = 256 << 20
"""With this much waiting to be written, further checkpoints are not stored."""
MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a frame is."""

    path: Path
    start: int
    header_bytes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class StoredTail:
    """A checkpoint on disk: its length, the most tokens its rings ever held, the ids behind its last full span."""

    length: int
    written: int
    tail: tuple[int, ...]
    place: _Place


@dataclass(slots=True)
class _Scan:
    """How far a segment has been read, and whether anything more can be."""

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
        """Open or make the cache; frames of another model or layout are in another folder, and left alone.

        `budget_bytes` bounds the segments of this model: the ones unused for longest are removed.
        """
        self.folder = folder / f"{model[:16]}-{layout(pools)}"
        self.pools, self.budget_bytes = pools, budget_bytes
        self.stats = DiskStats()
        self._spans: dict[bytes, _Place] = {}
        self._tails: dict[bytes, list[StoredTail]] = {}
        self._scans: dict[Path, _Scan] = {}
        self._stored: set[bytes] = set()  # keys this process has handed to its writer
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Tensor]] | None] = queue.SimpleQueue()
        self._backlog = 0
        self._lock = threading.Lock()  # of `_backlog`
        self._failed = False
        self._segment: BinaryIO | None = None
        self._writer: threading.Thread | None = None
        self._refresh()

    # Reading, on the model thread.

    def find(self, ids: Seq[int], chain: IdChain, *, above: int) -> StoredTail | None:
        """The longest checkpoint of `ids` with more than `above` and fewer than all of them, if there is one."""
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
        """A sequence with that state; None when a part of it is gone or damaged.

        Raises:
            OutOfMemoryError: there is no slot or not enough spans for it.
        """
        keys = chain.upto(ids, stored.length // SPAN)[1:]
        places = [self._spans.get(key) for key in keys]
        parts = [self._read(place) if place else None for place in (*places, stored.place)]
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
        for span, part in zip(sequence.spans, whole, strict=False):
            for index, entries in enumerate(self.pools.entries):
                if (name := f"entries.{index}") in part:
                    entries[span] = part[name].to(entries.device)
        for index, tail in enumerate(self.pools.tails):
            tail[sequence.slot] = whole[-1][f"tail.{index}"].to(tail.device)
        sequence.length, sequence.written = stored.length, stored.written
        self.stats.loaded += 1
        return sequence

    # Writing: snapshots on the model thread, files on another.

    def store(self, ids: Seq[int], chain: IdChain, sequence: Sequence) -> None:
        """Have the state of `sequence`, which holds the first of `ids`, written soon; what is there is not repeated."""
        if self._failed or self._backlog > BACKLOG_BYTES:
            self.stats.not_stored += 1
            return
        full = sequence.length // SPAN
        nodes = chain.upto(ids, full)
        for key, span in zip(nodes[1:], sequence.spans, strict=False):
            if key not in self._spans and key not in self._stored:
                self._put({"kind": "span", "key": key.hex()}, key, self._entries(span))
        key = chain.key(ids, sequence.length)
        if key in self._stored:
            return
        tensors = {f"tail.{index}": tail[sequence.slot].cpu().clone() for index, tail in enumerate(self.pools.tails)}
        if sequence.length % SPAN:
            tensors |= self._entries(sequence.spans[full])
        header = {"kind": "tail", "key": nodes[-1].hex(), "length": sequence.length, "written": sequence.written}
        self._put(header | {"tail": list(ids[full * SPAN : sequence.length])}, key, tensors)

    def close(self) -> None:
        """Write what waits and stop. The cache can be used again afterwards."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()
            self._writer = None

    def _entries(self, span: int) -> dict[str, Tensor]:
        return {f"entries.{index}": entries[span].cpu().clone() for index, entries in enumerate(self.pools.entries)}

    def _put(self, header: dict[str, Any], key: bytes, tensors: dict[str, Tensor]) -> None:
        self._stored.add(key)
        with self._lock:
            self._backlog += sum(tensor.nbytes for tensor in tensors.values())
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="agentkit_engine: disk cache", daemon=True)
            self._writer.start()
        self._queue.put((header, tensors))

    def _write_all(self) -> None:
        """The writer thread: frames in the order they came, until None comes."""
        while (job := self._queue.get()) is not None:
            header, tensors = job
            try:
                if not self._failed:
                    self._write(header, save(tensors))
            except OSError as error:
                self._failed = True
                logger.warning("the disk cache stops writing to %s: %s", self.folder, error)
            finally:
                with self._lock:
                    self._backlog -= sum(tensor.nbytes for tensor in tensors.values())
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _write(self, header: dict[str, Any], payload: bytes) -> None:
        if self._segment is None or self._segment.tell() > min(SEGMENT_BYTES, self.budget_bytes // 4):
            if self._segment is not None:
                self._segment.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}.segment"
            self._segment = (self.folder / name).open("xb")
        text = json.dumps(header, separators=(",", ":")).encode()
        frame = _FRAME.pack(MAGIC, len(text), len(payload), _digest(text, payload))
        self._segment.write(frame + text + payload)
        self._segment.flush()
        self.stats.written_bytes += len(frame) + len(text) + len(payload)
        self._keep_to_budget()

    def _keep_to_budget(self) -> None:
        """Remove the segments unused for longest, but for the one being written."""
        sizes: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("*.segment"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            sizes.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in sizes)
        for _, size, path in sorted(sizes):
            if total <= self.budget_bytes:
                return
            if self._segment is None or path.name != Path(self._segment.name).name:
                path.unlink(missing_ok=True)
                total -= size

    # The index.

    def _refresh(self) -> None:
        """Take in frames that were added since, by whomever, and forget segments that are gone."""
        try:
            found = sorted(path for path in self.folder.iterdir() if path.suffix == ".segment")
        except OSError:  # not made yet, or no folder: then writing will say so
            found = []
        for path in self._scans.keys() - set(found):
            del self._scans[path]
            self._forget_segment(path)
        for path in found:
            scan = self._scans.setdefault(path, _Scan())
            if scan.readable:
                try:
                    if path.stat().st_size > scan.end:
                        self._scan(path, scan)
                except OSError:
                    scan.readable = False

    def _scan(self, path: Path, scan: _Scan) -> None:
        with path.open("rb") as file:
            for header, place in _frames(file, path, scan):
                key = bytes.fromhex(header["key"])
                if header["kind"] == "span":
                    self._spans[key] = place
                else:
                    tail = StoredTail(header["length"], header["written"], tuple(header["tail"]), place)
                    self._tails.setdefault(key, []).append(tail)

    def _read(self, place: _Place) -> dict[str, Tensor] | None:
        """The tensors of a frame, if they are what was written."""
        try:
            with place.path.open("rb") as file:
                file.seek(place.start)
                frame = file.read(_FRAME.size + place.header_bytes + place.payload_bytes)
            os.utime(place.path)
            header = frame[_FRAME.size : _FRAME.size + place.header_bytes]
            payload = frame[_FRAME.size + place.header_bytes :]
            expected = _FRAME.pack(MAGIC, len(header), place.payload_bytes, _digest(header, payload))
            if frame[: _FRAME.size] != expected:
                raise ValueError("checksum")
            self.stats.read_bytes += len(frame)
            return load(payload)
        except (OSError, ValueError, SafetensorError):
            self.stats.damaged += 1
            self._forget(place)
            return None

    def _forget(self, place: _Place) -> None:
        self._spans = {key: other for key, other in self._spans.items() if other != place}
        self._tails = {
            key: kept for key, tails in self._tails.items() if (kept := [t for t in tails if t.place != place])
        }

    def _forget_segment(self, path: Path) -> None:
        self._stored.clear()  # what was in it may be stored again
        self._spans = {key: place for key, place in self._spans.items() if place.path != path}
        self._tails = {
            key: kept for key, tails in self._tails.items() if (kept := [t for t in tails if t.place.path != path])
        }


# The folder as a whole, for people who look after it.

_MODEL_FOLDER = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
_SEGMENT_NAME = re.compile(r"\d{20}-\d+-[0-9a-f]{8}\.segment")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What a cache folder holds of one model and layout.

    Attributes:
        name: The name of its folder there: the start of the model's fingerprint, and the layout.
        segments, bytes: Its files, and their size.
        spans, checkpoints: Frames that are whole, and what they are.
        damaged: Frames with a wrong checksum, and segments that cannot be read to their end. The last frame of a
            segment that a process is writing at this moment counts too.
    """

    name: str
    segments: int
    bytes: int
    spans: int
    checkpoints: int
    damaged: int


def survey(folder: Path) -> list[StoredModel]:
    """What is in a cache folder, by name of model; every byte is read and checked. Foreign files are passed over.

    Raises:
        OSError: the folder is not there, or a file cannot be read.
    """
    models = []
    for name, paths in sorted(_segments(folder).items()):
        size = spans = checkpoints = damaged = 0
        for path in paths:
            with path.open("rb") as file:
                scan = _Scan()
                for header, place in _frames(file, path, scan):
                    if not _is_whole(file, place):
                        damaged += 1
                    elif header["kind"] == "span":
                        spans += 1
                    else:
                        checkpoints += 1
                end = os.fstat(file.fileno()).st_size
            size += end
            damaged += scan.end < end
        models.append(StoredModel(name, len(paths), size, spans, checkpoints, damaged))
    return models


def prune(folder: Path, budget_bytes: int) -> tuple[int, int]:
    """Remove the segments of all models unused for longest, until `budget_bytes` are left at most.

    Foreign files are left alone. A process that uses the cache meanwhile computes again what it does not find.

    Returns:
        How many segments were removed, and how many bytes are left.

    Raises:
        OSError: the folder is not there, or a file cannot be removed.
    """
    status = {path: path.stat() for paths in _segments(folder).values() for path in paths}
    left, removed = sum(each.st_size for each in status.values()), 0
    for path in sorted(status, key=lambda path: (status[path].st_mtime_ns, path)):
        if left <= budget_bytes:
            break
        path.unlink(missing_ok=True)
        left -= status[path].st_size
        removed += 1
    return removed, left


def _segments(folder: Path) -> dict[str, list[Path]]:
    """The segments below a cache folder, by name of model; names that the cache does not give are foreign."""
    return {
        model.name: sorted(path for path in model.iterdir() if _SEGMENT_NAME.fullmatch(path.name) and path.is_file())
        for model in folder.iterdir()
        if _MODEL_FOLDER.fullmatch(model.name) and model.is_dir()
    }


def _is_whole(file: BinaryIO, place: _Place) -> bool:
    """Whether a frame's checksum is that of its header and payload."""
    file.seek(place.start)
    frame = file.read(_FRAME.size + place.header_bytes + place.payload_bytes)
    header, payload = frame[_FRAME.size :][: place.header_bytes], frame[_FRAME.size + place.header_bytes :]
    return frame.startswith(_FRAME.pack(MAGIC, place.header_bytes, place.payload_bytes, _digest(header, payload)))


def _digest(header: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(header + payload, digest_size=16).digest()


def _frames(file: BinaryIO, path: Path, scan: _Scan) -> Iterator[tuple[dict[str, Any], _Place]]:
    """The whole frames from `scan.end` on; ends at one that is not whole, and for good at what is no frame."""
    size = os.fstat(file.fileno()).st_size
    while size - scan.end >= _FRAME.size:
        file.seek(scan.end)
        magic, header_bytes, payload_bytes, _ = _FRAME.unpack(file.read(_FRAME.size))
        if magic != MAGIC or header_bytes > MAX_HEADER_BYTES:
            scan.readable = False
            logger.warning("%s is no segment of the disk cache from byte %d on; that part is skipped", path, scan.end)
            return
        end = scan.end + _FRAME.size + header_bytes + payload_bytes
        if end > size:
            return
        try:
            header = json.loads(file.read(header_bytes))
            place = _Place(path, scan.end, header_bytes, payload_bytes)
            checked = {"kind": header["kind"], "key": header["key"]}
            if header["kind"] == "tail":
                checked |= {"length": int(header["length"]), "written": int(header["written"])}
                checked |= {"tail": [int(token_id) for token_id in header["tail"]]}
            elif header["kind"] != "span":
                raise ValueError(header["kind"])
            bytes.fromhex(checked["key"])
        except (ValueError, KeyError, TypeError):
            scan.readable = False
            logger.warning("%s holds a damaged frame at byte %d; the rest is skipped", path, scan.end)
            return
        scan.end = end
        yield checked, place
