"""The processes of an engine on several devices; `parallel.py` explains what they do.

Rank 0 starts them and talks to each over a socket. They end when that closes, and all together when one of them fails.
"""

from __future__ import annotations

import math
import pickle
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from agentkit_engine.errors import WorkerLostError
from agentkit_engine.runtime.runner import CpuLimits
from agentkit_engine.runtime.state import KVCacheDtype

TIMEOUT_S = 300.0
"""Seconds that a rank waits for another: more than the longest forward, in which kernels may have to be compiled."""
END_S = 5.0
"""Seconds for a worker to end by itself."""

Change = tuple[Any, ...]
"""The name of a method of `Pools` that changes rows, and its arguments."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices and the folder from which all ranks load a model.

    Attributes:
        devices: Their number, W.
        folder: The model's folder, which each worker reads.
        device: The device of rank 0; with GPUs, rank r has the r-th after it.
        dtype, kv_cache_dtype, quantize_activations: See `Engine.load`.
        limits: Limits of each rank's `cpu` backend.
    """

    devices: int
    folder: Path
    device: torch.device
    dtype: torch.dtype | None
    kv_cache_dtype: KVCacheDtype = "auto"
    quantize_activations: bool = False
    limits: CpuLimits = field(default_factory=CpuLimits)
    timeout_s: float = TIMEOUT_S

    def device_of(self, rank: int) -> torch.device:
        return self.device if self.device.type == "cpu" else torch.device("cuda", (self.device.index or 0) + rank)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A worker's rank, and what it needs to compute its part."""

    rank: int
    placement: Placement
    rendezvous: str
    exact: bool
    backend: str
    slots: int
    spans: int
    experts: int


@dataclass(frozen=True, slots=True)
class Failure:
    """The last message of a worker that ends because of an error."""

    traceback: str


class Channel:
    """A socket between rank 0 and a worker that carries Python objects."""

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)

    def send(self, what: object) -> None:
        self._connection.send_bytes(pickle.dumps(what))  # `Connection.send` would put tensors into shared memory

    def receive(self) -> Any:
        """Raises EOFError if the other end is closed."""
        return pickle.loads(self._connection.recv_bytes())

    def poll(self, timeout_s: float | None) -> bool:
        """Return whether there is something to receive, after waiting for it."""
        return self._connection.poll(timeout_s)

    def close(self) -> None:
        self._connection.close()


class Worker:
    """A worker's process, and the channel to it.

    Attributes:
        changes: Changes to its pools that go with the next call.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self.changes: list[Change] = []
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(timeout_s), 0))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agentkit_engine.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C reaches rank 0 only
            )
        self.channel = Channel(ours.detach())
        self._failed: str | None = None

    def call(self, *call: object) -> None:
        """Send the changes and a call, whose answer is to be received; see `agentkit_engine.worker`."""
        changes, self.changes = self.changes, []
        self.channel.send((changes, call))

    def receive(self, *, patiently: bool = False) -> Any:
        """Return the answer to what was sent last.

        Raises:
            WorkerLostError: the worker failed or, unless `patiently`, did not answer in time.
            EOFError: it ended.
        """
        if not self.channel.poll(None if patiently else self.timeout_s):
            raise WorkerLostError(f"rank {self.rank} did not answer for {self.timeout_s} s")
        answer = self.channel.receive()
        if isinstance(answer, Failure):
            self._failed = answer.traceback
            raise WorkerLostError(f"rank {self.rank} failed")
        return answer

    def ending(self) -> str | None:
        """Return why the worker ended; None if it still runs after a moment."""
        try:
            while self._failed is None and self.channel.poll(END_S / 10):
                answer = self.channel.receive()
                self._failed = answer.traceback if isinstance(answer, Failure) else None
        except (EOFError, OSError):
            self.process.wait()
        if self._failed is not None:
            return f"rank {self.rank} failed:\n{self._failed}"
        code = self.process.poll()
        return None if code is None else f"the process of rank {self.rank} ended with exit code {code}"


class Workers:
    """The workers of one engine. They end with this object, and with this process."""

    def __init__(self, placement: Placement) -> None:
        """Start the processes; the caller sends each its `Assignment`."""
        self.each = [Worker(rank, placement.timeout_s) for rank in range(1, placement.devices)]
        self._end = weakref.finalize(self, _end, self.each)
        self._lost: str | None = None

    @contextmanager
    def talk(self) -> Iterator[None]:
        """Talk to workers within the block; an error in it ends all, because they may be waiting for each other.

        Raises:
            WorkerLostError: there was an exception in the block, or in an earlier one.
        """
        if self._lost is not None:
            raise WorkerLostError(f"{self._lost}; load the model again")
        try:
            yield
        except BaseException as error:
            endings = [ending for worker in self.each if (ending := worker.ending()) is not None]
            # a rank that was killed has the shortest: others fail because its connections close
            self._lost = min(endings, key=len, default=f"a forward on several devices failed: {error!r}")
            for worker in self.each:
                worker.process.kill()
            self._end()
            if not isinstance(error, Exception):
                raise
            raise WorkerLostError(f"{self._lost}; load the model again") from error

    def close(self) -> None:
        """End the processes."""
        self._lost = self._lost or "the engine was closed"
        self._end()


def _end(workers: Seq[Worker]) -> None:
    for worker in workers:
        worker.channel.close()
    for worker in workers:
        try:
            worker.process.wait(END_S)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
