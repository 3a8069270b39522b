"""One device as the parts see it: random data, clocks, floors, and comparisons with peers.

A time on a GPU is that of one call replayed from a CUDA graph, between two events, after the L2 cache was overwritten.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from agentkit_kernels.calls import FLASH, Shapes
from agentkit_kernels.gpu.record import Goal, Measurement, PeerResult, Skipped, Unit
from agentkit_kernels.triton.launch import INTERPRET, LAUNCHES

T = TypeVar("T")

BANDWIDTH = 4.8e12
"""Bytes per second of an H200's memory."""
FLOPS = {"bf16": 989e12, "fp8": 1979e12}
"""Floating-point operations per second of an H200's tensor cores, dense."""
TOY = Shapes("toy", 128, 2, 96, 32, 64, 2, 128, 16, 4, 32, 8, 4, 3, 8, 2, 64, 96)
"""Shapes of a rehearsal, small because the interpreter takes a millisecond per program; head sizes are no powers of
two."""
_FLUSH_BYTES = 512 << 20
"""More than any GPU's last cache."""


class OutputsDifferError(Exception):
    """A kernel's output differs from its twin's or a peer's by more than the tolerance."""


class OutOfTimeError(Exception):
    """A part's time is over."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The median of repeated times, (max - min) / median, and whether a CUDA graph was replayed."""

    us: float
    spread: float
    graph: bool = False

    @property
    def note(self) -> str:
        """A remark on how the time was measured; empty if it is that of a graph."""
        return "" if self.graph else "launched from Python"


@dataclass(frozen=True, slots=True)
class Peer:
    """Another computation of the same result.

    Attributes:
        name: With its settings.
        run: Computes it.
        graph: Whether a CUDA graph can capture it.
        compare: False if its outputs cannot be compared one by one.
    """

    name: str
    run: Callable[[], object]
    graph: bool = True
    compare: bool = True


class Bench:
    """A GPU, or with `rehearse` a CPU and Triton's interpreter. Also a `calls.Make`."""

    def __init__(self, *, rehearse: bool, seconds: float = 240.0) -> None:
        """`seconds` is the time after which no measurement begins.

        Raises:
            RuntimeError: `rehearse` does not agree with TRITON_INTERPRET.
        """
        if rehearse != INTERPRET:
            raise RuntimeError(f"a {'rehearsal needs' if rehearse else 'GPU cannot use'} TRITON_INTERPRET=1")
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.shapes = TOY if rehearse else FLASH
        self.generator: torch.Generator | None = torch.Generator(self.device).manual_seed(0)
        self._deadline = time.monotonic() + seconds
        self._flush: Tensor | None = None

    def without_memory(self) -> Bench:
        """Return the bench of a GPU that makes tensors without memory, to count what a forward would launch."""
        made = copy(self)
        made.rehearse, made.device, made.shapes, made.generator = False, torch.device("meta"), FLASH, None
        return made

    def pick(self, full: T, toy: T) -> T:
        """Return the size for a GPU or for a rehearsal."""
        return toy if self.rehearse else full

    # --- data ---

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return normal values; codes between 0.5 and 3.75 as FP8, which no 8-bit dtype reads as NaN."""
        if dtype.itemsize == 1:
            codes = torch.randint(
                0x30, 0x48, shape, generator=self.generator, device=self.device, dtype=torch.uint8
            )  # fmt: skip
            return codes.view(dtype)
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def ints(self, values: Sequence[int] | range, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return these integers."""
        if isinstance(values, range):
            return torch.arange(values.start, values.stop, values.step, dtype=dtype, device=self.device)
        return torch.tensor(values, dtype=dtype, device=self.device)

    def below(self, bound: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return random integers from 0 to `bound` - 1."""
        return torch.randint(bound, shape, generator=self.generator, device=self.device, dtype=dtype)

    def distinct(self, rows: int, count: int, bounds: Tensor) -> Tensor:
        """Return `count` distinct random integers per row, each below the row's bound, in increasing order."""
        most = int(bounds.max())
        draws = torch.rand(rows, most, generator=self.generator, device=self.device)
        draws.masked_fill_(self.ints(range(most)) >= bounds[:, None], -1.0)
        return draws.topk(count, dim=1).indices.sort(dim=1).values

    # --- time ---

    def compiled(self, function: Callable[..., T]) -> Callable[..., T]:
        """Return the function compiled by torch; in a rehearsal, which has no compiler, the function itself."""
        return function if self.rehearse else torch.compile(function, dynamic=False)

    def synchronise(self) -> None:
        """Wait for the device."""
        if not self.rehearse:
            torch.cuda.synchronize()

    def check_time(self) -> None:
        """Raises OutOfTimeError if the part's time is over."""
        if time.monotonic() > self._deadline:
            raise OutOfTimeError("the part's time is over")

    def time(self, run: Callable[[], object], *, graph: bool = True) -> Timing:
        """Return the device time of one call."""
        if self.rehearse:
            start = time.perf_counter()
            run()
            return Timing(1e6 * (time.perf_counter() - start), 0.0)
        run()
        replay = run
        if graph:
            try:
                replay = self.captured(run)
            except RuntimeError:  # it waits for the device, which a graph cannot hold
                torch.cuda.synchronize()
                graph = False
        first = self._microseconds(replay, 2)[-1]
        times = self._microseconds(replay, max(3, min(30, round(1e6 / first))))
        median = statistics.median(times)
        return Timing(median, (max(times) - min(times)) / median, graph)

    def wall(self, run: Callable[[], object]) -> Timing:
        """Return the wall time of one call, from an idle device to an idle device."""
        self.check_time()
        times = []
        for _ in range(self.pick(5, 1)):
            self.synchronise()
            start = time.perf_counter()
            run()
            self.synchronise()
            times.append(1e6 * (time.perf_counter() - start))
        median = statistics.median(times)
        return Timing(median, (max(times) - min(times)) / median)

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """Return a function that replays one call from a CUDA graph; in a rehearsal, `run` itself."""
        if self.rehearse:
            return run
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _microseconds(self, run: Callable[[], object], repeats: int) -> list[float]:
        if self._flush is None:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        events = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            for _ in range(repeats)
        ]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events]

    # --- results ---

    def measure(
        self,
        what: str,
        run: Callable[[], object],
        goal: Goal,
        *,
        bytes: int,
        flops: int = 0,
        rate: str = "bf16",
        peers: Sequence[Peer] = (),
        tolerance: float = 2e-2,
        graph: bool = True,
        value: Callable[[float], float] | None = None,
        note: str = "",
    ) -> Measurement:
        """Compare the outputs of `run` and its peers, and time them.

        Args:
            what: Its name in the table.
            run: Launches the kernels that are measured.
            goal: A time, TFLOPS or the share of the floor; with `value`, any unit.
            bytes: The least that any implementation moves.
            flops: Of the formula.
            rate: Key of `FLOPS`.
            peers: A peer that fails is skipped with its reason.
            tolerance: Of the largest difference over the largest value.
            graph: Whether a CUDA graph can capture `run`.
            value: Turns microseconds into the goal's unit.
            note: Kept in the record.

        Raises:
            OutputsDifferError: A peer's output differs by more than `tolerance`, or `run` launched no kernel.
            OutOfTimeError: The part's time is over.
        """
        self.check_time()
        floor = floor_us(bytes, flops, rate)
        convert = value or (lambda us: _value(goal.unit, us, floor, flops))
        before, start = LAUNCHES.copy(), time.perf_counter()
        output = run()
        once = Timing(1e6 * (time.perf_counter() - start), 0.0)
        launches = dict(LAUNCHES - before)
        if not launches:
            raise OutputsDifferError(f"{what}: no kernel was launched")
        results = []
        for peer in peers:
            try:
                outputs = ""
                theirs = peer.run()
                if peer.compare:
                    error = difference(output, theirs)
                    outputs = f"largest difference {error:.1e} of the largest value"
                    if not error <= tolerance:
                        raise OutputsDifferError(f"{what}: {peer.name}: {outputs}; the tolerance is {tolerance:.0e}")
                del theirs
                timing = self.time(peer.run, graph=peer.graph)
                outputs = "; ".join(filter(None, (outputs, timing.note)))
                results.append(PeerResult(peer.name, convert(timing.us), timing.spread, outputs))
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                results.append(PeerResult(peer.name, skipped=_short(error)))
        del output
        timing = once if self.rehearse else self.time(run, graph=graph)
        note = "; ".join(filter(None, (note, timing.note)))
        return Measurement(what, convert(timing.us), goal, timing.spread, timing.us, floor, results, launches, note)


def floor_us(bytes: int, flops: int = 0, rate: str = "bf16") -> float:
    """Return the least microseconds for these bytes and flops on an H200."""
    return 1e6 * max(bytes / BANDWIDTH, flops / FLOPS[rate])


def _value(unit: Unit, us: float, floor: float, flops: int) -> float:
    if unit == "TFLOPS":
        return flops / us / 1e6
    if unit == "of floor":
        return floor / us
    assert unit == "us", f"a value in {unit} needs a function"
    return us


def difference(ours: object, theirs: object) -> float:
    """Return the largest absolute difference of two tensors, or of the first of two tuples, over the largest value;
    infinity if a value is not finite."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return max(difference(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
    if ours.shape != theirs.shape:
        raise OutputsDifferError(f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}")
    mine, other = ours.float(), theirs.float()
    worst = (mine - other).abs().max() / other.abs().max().clamp(min=1e-30)
    return float(worst) if bool(worst.isfinite()) else float("inf")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def absent(library: str, module: str) -> Skipped:
    """Return why a peer that is no part of torch is not measured."""
    try:
        import_module(module)
    except Exception as error:  # libraries of kernels also fail to import in ways of their own
        return Skipped(library, f"cannot be imported: {_short(error)}")
    return Skipped(library, "can be imported, but this part has no call of it")


def machine(bench: Bench) -> dict[str, str]:
    """Return what the numbers depend on."""
    found: dict[str, Any] = {
        "device": "CPU, Triton's interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": _commit(),
    }
    if not bench.rehearse:
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory"] = f"{properties.total_memory / (1 << 30):.0f} GiB"
        found["target"] = str(triton.runtime.driver.active.get_current_target())
    return found


def _commit() -> str:
    """Return AGENTKIT_COMMIT, or the commit of this checkout, or `unknown`."""
    if commit := os.environ.get("AGENTKIT_COMMIT"):
        return commit
    try:
        return subprocess.run(
            ["git", "-C", Path(__file__).parent, "rev-parse", "--short=12", "HEAD"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
