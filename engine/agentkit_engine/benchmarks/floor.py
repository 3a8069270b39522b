"""The floor of a step: the time of its products with weights, and of nothing else.

The step runs once while the runtime's product routines are recorded, so that the products need no list of their own.
Then the same routines multiply rows of the same shapes with the same weights. Attention scores and index scores are
products of activations, not of weights: they belong to the step, not to its floor.

Dimension key: `agentkit_kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import torch

from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median, seconds, threads
from agentkit_engine.runtime.scheduler import Scheduler
from agentkit_kernels.cpu import loops
from agentkit_kernels.cpu.linear import Stacked, Weight
from agentkit_kernels.cpu.loops import Floats, Ints, Weights

DECODE_GOAL, PREFILL_GOAL = 1.35, 1.5
"""Goals: the time of a step of decoding, and of a prefill, over that of its products."""


class Floor:
    """The products with weights in everything that was computed inside `recording`; a call repeats them.

    Attributes:
        products: Number of products.
        multiply_adds: Multiply-adds in them.
    """

    def __init__(self) -> None:
        self.products = self.multiply_adds = 0
        self._calls: list[Callable[[], object]] = []
        self._rows: dict[tuple[int, ...], Floats] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the products of the `cpu` backend, in any engine of this process."""
        multiply, multiply_groups = Weight.multiply, Weight.multiply_groups
        multiply_stacked, mix_experts = Stacked.multiply, loops.mix_experts

        def recorded_multiply(weight: Weight, x_NK: Floats, out_NX: Floats, column: int = 0) -> None:
            call = partial(multiply, weight, self._like(x_NK.shape), out_NX, column)
            self._add(call, len(weight.matrices), x_NK.size * weight.outputs)
            multiply(weight, x_NK, out_NX, column)

        def recorded_multiply_groups(weight: Weight, x_NGK: Floats, out_NX: Floats) -> None:
            groups = x_NGK.shape[1]
            self._add(
                partial(multiply_groups, weight, self._like(x_NGK.shape), out_NX),
                groups,
                x_NGK.size * weight.outputs // groups,
            )
            multiply_groups(weight, x_NGK, out_NX)

        def recorded_multiply_stacked(stacked: Stacked, x_PK: Floats, counts_E: Sequence[int]) -> Floats:
            call = partial(multiply_stacked, stacked, self._like(x_PK.shape), counts_E)
            self._add(call, sum(count > 0 for count in counts_E), x_PK.size * stacked.outputs)
            return multiply_stacked(stacked, x_PK, counts_E)

        def recorded_mix_experts(
            x_ND: Floats, experts_NA: Ints, weights_NA: Floats, w13_EDX: Weights, w2_EID: Weights, *rest: Any
        ) -> None:
            hidden_1I = self._like((1, w2_EID.shape[1]))
            call = partial(_multiply_experts, self._like(x_ND.shape), hidden_1I, experts_NA, w13_EDX, w2_EID)
            self._add(call, 2 * experts_NA.size, experts_NA.size * (w13_EDX[0].size + w2_EID[0].size))
            mix_experts(x_ND, experts_NA, weights_NA, w13_EDX, w2_EID, *rest)

        with (
            patch.object(Weight, "multiply", recorded_multiply),
            patch.object(Weight, "multiply_groups", recorded_multiply_groups),
            patch.object(Stacked, "multiply", recorded_multiply_stacked),
            patch.object(loops, "mix_experts", recorded_mix_experts),
        ):
            yield

    @torch.inference_mode()
    def __call__(self) -> None:
        for call in self._calls:
            call()

    def _add(self, call: Callable[[], object], products: int, multiply_adds: int) -> None:
        self._calls.append(call)
        self.products += products
        self.multiply_adds += multiply_adds

    def _like(self, shape: tuple[int, ...]) -> Floats:
        if shape not in self._rows:
            self._rows[shape] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
        return self._rows[shape]


def beside_products(
    scheduler: Scheduler,
    benchmark: str,
    what: str,
    run: Callable[[], object],
    repeats: int,
    *,
    goal: float | None,
    steps: int = 1,
) -> Measurement:
    """Measure the products of `run`, in which `scheduler` computes `steps` steps, alternately with `run` itself.

    Both use one thread.

    The measurement's ratio is the time of a whole step over that of its products; `goal` is the most it should be.
    """
    floor = Floor()
    with threads(1, scheduler):
        with floor.recording():
            run()
        floor()  # compiles
        runs = [(seconds("CPU-s", run), seconds("CPU-s", floor)) for _ in range(repeats)]
    whole, bare = (Median.of([1e3 * each[side] / steps for each in runs]) for side in (0, 1))
    count, multiply_adds = floor.products // steps, floor.multiply_adds / steps / 1e6
    return Measurement(
        benchmark,
        f"bare matrix products of {what}, one thread",
        bare.value,
        "ms",
        bare.spread,
        "all of it, these products included",
        whole.value,
        higher_is_better=False,
        stretch=Bound("ratio", "<=", goal) if goal else None,
        outputs=f"{count} products of {multiply_adds:.1f} M multiply-adds: the same weights, routines and row counts",
    )


@numba.njit(error_model="numpy", fastmath={"contract"})
def _multiply_experts(x_ND: Floats, hidden_1I: Floats, experts_NA: Ints, w13_EDX: Weights, w2_EID: Weights) -> None:
    """The products of `loops.mix_experts`. Not cached on disk, because Numba would not notice changes of `loops.py`."""
    gate_up_1X, down_1D = np.empty((1, w13_EDX.shape[2]), np.float32), np.empty((1, w2_EID.shape[2]), np.float32)
    for n in range(experts_NA.shape[0]):
        for a in range(experts_NA.shape[1]):
            expert = experts_NA[n, a]
            loops.multiply(x_ND[n : n + 1], w13_EDX[expert], 0, gate_up_1X.shape[1], gate_up_1X, 0)
            loops.multiply(hidden_1I, w2_EID[expert], 0, down_1D.shape[1], down_1D, 0)
