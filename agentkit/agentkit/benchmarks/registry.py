"""The benchmarks of the loop: one function each, which yields its measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agentkit.benchmarks.calls import Load, parallel_calls
from agentkit.benchmarks.overhead import overhead
from agentkit.benchmarks.sandboxes import Scale, sandboxes
from agentkit.benchmarks.sharing import Shape, sharing
from agentkit_engine.benchmarks.record import Measurement


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the benchmarks.

    Attributes:
        repeats: Timed runs.
        turns: Turns of the run in turn-overhead.
        rendered: Turns in which the peer of turn-overhead is timed.
        sharing: Trajectories of shared-prefill.
        calls: Agents and calls of parallel-calls.
        scale: Commands and files of sandboxes.
    """

    repeats: int
    turns: int
    rendered: int
    sharing: Shape
    calls: Load
    scale: Scale


FULL = Sizes(
    repeats=3,
    turns=1000,
    rendered=20,
    sharing=Shape(trajectories=64, at_once=32, turns=30, head=20_000),
    calls=Load(agents=32, calls=128, call_s=0.05, at_once=64),
    scale=Scale(
        commands=200,
        cancellations=100,
        openings=10,
        snapshots=5,
        forks=8,
        files=2_000,
        file_bytes=50_000,
        overlaid=50_000,
    ),
)
QUICK = Sizes(
    repeats=1,
    turns=4,
    rendered=2,
    sharing=Shape(trajectories=3, at_once=2, turns=3, head=300),
    calls=Load(agents=2, calls=6, call_s=0.001, at_once=4),
    scale=Scale(commands=3, cancellations=2, openings=1, snapshots=1, forks=2, files=200, file_bytes=20, overlaid=100),
)

BENCHMARKS: dict[str, Callable[[Sizes], Iterator[Measurement]]] = {
    "turn-overhead": lambda sizes: overhead(sizes.turns, sizes.rendered, sizes.repeats),
    "shared-prefill": lambda sizes: sharing(sizes.sharing),
    "parallel-calls": lambda sizes: parallel_calls(sizes.calls, sizes.repeats),
    "sandboxes": lambda sizes: sandboxes(sizes.scale),
}
"""The names that `--only` accepts, in the order in which they run."""
