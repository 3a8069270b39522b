"""One forward for a ragged batch of live sequences, with the same bits in any batch.

The model is `model/forward.py`, computed by a backend of `agentkit_kernels`. In all of them a row's bits do not depend
on its neighbours.

With `exact=False` a backend may choose kernels by the number of rows, and plain torch uses all its threads. The bits
then depend on the batch; only forks and restored sessions, which see the same forwards, still agree. The `cpu` backend
is always exact.

Dimension key: `runtime/__init__.py` and `model/__init__.py`.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from agentkit_engine.errors import BackendUnavailableError, DeviceUnavailableError
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.model.forward import Computed as ModelOutput
from agentkit_engine.model.forward import Forward
from agentkit_engine.runtime.architecture import check_architecture
from agentkit_engine.runtime.graphs import Capture, CudaCapture, Graphs
from agentkit_engine.runtime.scheduled import Computed, ScheduledTokens
from agentkit_engine.runtime.state import SPAN, Pools, rows_of
from agentkit_engine.runtime.threads import OneThread
from agentkit_kernels.ops import Ops, Plan
from agentkit_kernels.reference import Reference
from agentkit_kernels.reference.activations import QuantizedReference

if TYPE_CHECKING:
    from agentkit_engine.sampler import DeviceSampler

T = TypeVar("T")
Backend = Literal["reference", "cpu", "triton"]
BACKENDS = ("auto", *get_args(Backend))
logger = logging.getLogger(__name__)

NUMERICS = 7
"""Version of the numerics. Increment it with every change to a bit of a forward's output: stored states of another
version are not used."""


def choose_backend(backend: str, device: torch.device) -> Backend:
    """Return the backend for a device; `auto` is `triton` on a GPU and `cpu` on a CPU, or `reference` without those.

    Raises:
        ValueError: there is no such backend, or it does not run on the device.
        BackendUnavailableError: a library that the backend needs is missing or broken.
        DeviceUnavailableError: Triton's kernels do not support the GPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f'no backend "{backend}"; choose one of {", ".join(BACKENDS)}')
    on_cpu = device.type == "cpu"
    if backend == "cpu" and not on_cpu:
        raise ValueError(f'backend="cpu" needs a CPU: its kernels do not run on device={str(device)!r}')
    chosen = cast(Backend, backend if backend != "auto" else "cpu" if on_cpu else "triton")
    try:
        if chosen != "reference":
            import_module(f"agentkit_kernels.{chosen}.backend")
        if chosen == "triton" and on_cpu and not import_module("agentkit_kernels.triton.launch").INTERPRET:
            raise ValueError(
                'backend="triton" needs a GPU: pass device="cuda". To test its kernels without one, set '
                "TRITON_INTERPRET=1 before Python starts, which runs them a thousand times slower"
            )
        if chosen == "triton" and device.type == "cuda":
            check_architecture(device)
    except (ImportError, DeviceUnavailableError) as error:
        if backend == "auto":
            logger.warning("forwards will be slow: the %s backend cannot be used: %s", chosen, error)
            return "reference"
        if isinstance(error, DeviceUnavailableError):
            raise
        package = "numba" if chosen == "cpu" else '"agentkit-harness[triton]"'
        raise BackendUnavailableError(
            f'backend="{chosen}" cannot be loaded: {error}; pip install {package}, or use backend="reference"'
        ) from error
    return chosen


@dataclass(frozen=True, slots=True)
class CpuLimits:
    """Limits on what a backend uses of a machine.

    Attributes:
        threads: Threads that share the work; by default as many as there are cores.
        expert_cache_bytes: Memory for routed experts, which then stay in their files; by default all are in memory.
    """

    threads: int | None = None
    expert_cache_bytes: int | None = None

    def share(self, processes: int) -> CpuLimits:
        """Return the limits of one of several processes: as many threads, and an equal share of the memory."""
        held = self.expert_cache_bytes
        return CpuLimits(self.threads, None if held is None else held // processes)


def make_ops(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    limits: CpuLimits | None = None,
    *,
    processes: int = 1,
    quantize_activations: bool = False,
) -> Ops:
    """Return the operations of a backend for weights of this dtype; `processes` like this one share a CPU's cores."""
    if backend == "cpu":
        from agentkit_kernels.cpu.activations import QuantizedCpu
        from agentkit_kernels.cpu.backend import Cpu
        from agentkit_kernels.cpu.workers import Workers, available_cores

        limits = limits or CpuLimits()
        threads = limits.threads or max(1, available_cores() // processes)
        kind = QuantizedCpu if quantize_activations else Cpu
        return kind(Workers(threads), expert_cache_bytes=limits.expert_cache_bytes)
    if backend == "triton":
        from agentkit_kernels.triton.activations import QuantizedTriton
        from agentkit_kernels.triton.backend import Triton

        kept = None if limits is None else limits.expert_cache_bytes
        rows = torch.float32 if dtype == torch.float32 else torch.bfloat16
        return (QuantizedTriton if quantize_activations else Triton)(device, rows, expert_cache_bytes=kept)
    return QuantizedReference(device) if quantize_activations else Reference(device)


def machine(device: torch.device) -> tuple[str, ...]:
    """The libraries and the processor, on which the last bits of a result depend besides the model."""
    found = [torch.__version__, device.type, platform.machine(), torch.backends.cpu.get_cpu_capability()]
    if device.type == "cuda":
        found += [str(torch.version.cuda), torch.cuda.get_device_name(device)]
    with suppress(ImportError):
        import llvmlite.binding
        import numba

        found += [numba.__version__, llvmlite.binding.get_host_cpu_name()]
    return tuple(found)


def plan_of(scheduled: Seq[ScheduledTokens], *, all_rows: bool) -> tuple[Plan, list[int] | None]:
    """Return the plan of a forward, and the rows of its output; None for all of them."""
    lengths = [len(part) for part in scheduled]
    plan = Plan(
        [token_id for part in scheduled for token_id in (*part.ids, *part.draft)],
        lengths,
        [part.sequence.length for part in scheduled],
        [part.sequence.slot for part in scheduled],
        [part.sequence.spans for part in scheduled],
    )
    if all_rows or all(len(part.ids) == 1 for part in scheduled):
        return plan, None
    ends, wanted = accumulate(lengths), [len(part.draft) + 1 for part in scheduled]
    return plan, [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]


class Runner:
    """A decoder's weights, packed once for forwards over `Pools`. Not differentiable.

    Attributes:
        sampler: Samples on the backend's device; None if the host samples.
        graphs: Captured decoding steps, if the backend's device can replay them.
    """

    def __init__(
        self,
        decoder: Decoder,
        pools: Pools,
        *,
        exact: bool = True,
        backend: str = "auto",
        limits: CpuLimits | None = None,
        quantize_activations: bool = False,
        ops: Ops | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`ops` are the operations of the backend, or others over them; by default a new one's, within `limits`.

        Decoding steps are captured and replayed by `capture`; by default on a GPU, unless `ops` are given.
        """
        self.pools, self.exact = pools, exact
        self.backend = choose_backend(backend, pools.device)
        self._on_one_thread = OneThread() if exact and self.backend == "reference" else None
        waits = limits is not None and limits.expert_cache_bytes is not None  # for the choice of experts
        if capture is None and ops is None and self.backend == "triton" and pools.device.type == "cuda" and not waits:
            capture = CudaCapture(pools.device)
        dtype = decoder.embed.weight.dtype
        ops = ops or make_ops(self.backend, pools.device, dtype, limits, quantize_activations=quantize_activations)
        self.forward = self._compute(lambda: self._packed(decoder, ops))
        self.sampler: DeviceSampler | None = getattr(ops, "sample", None)
        self.graphs = None if capture is None else self.capture_with(capture)

    def capture_with(self, capture: Capture, **options: Any) -> Graphs:
        """Return graphs for sequences of any length, with the `options` of `Graphs`; the backend must be `triton`."""
        ops: Any = self.forward.ops
        longest = -(-self.pools.spec.max_position_embeddings // SPAN)
        options = {"spans": min(longest, self.pools.spans)} | options
        return self._compute(lambda: Graphs(self.forward, ops, capture, **options))

    def _packed(self, decoder: Decoder, ops: Ops) -> Forward:
        with torch.inference_mode(False), torch.no_grad():  # a packed decoder can still be trained
            states = [ops.state(pools) for pools in self.pools.layers]
            for layer in decoder.spec.mtp_layers:  # its tokens see no others, so they can share a ring
                kept = rows_of(layer, decoder.spec, self.pools.kv_cache_dtype)
                window = next(rows for rows in kept if rows.name == "window")
                states.append(ops.state({"window": ops.zeros((1, window.count, window.width), window.dtype)}))
            forward = Forward(decoder, ops, states)
            ops.settle(exact=self.exact, active=decoder.spec.num_experts_per_tok)
            return forward

    def step(self, scheduled: Seq[ScheduledTokens], *, all_rows: bool = False) -> Computed:
        """Extend every part's sequence by its ids and draft, for which `Pools.reserve` has made room.

        An exact forward in plain torch uses one thread, because with several the library divides a product by its
        number of rows.

        Returns:
            Logits and streams of each part's last id and draft; with `all_rows` a row for every id.
        """
        computed = self._forward(scheduled, all_rows=all_rows)
        for part in scheduled:
            sequence = part.sequence
            sequence.written = max(sequence.written, sequence.length + len(part))
            sequence.length += len(part.ids)
        return Computed(*computed)

    def _forward(self, scheduled: Seq[ScheduledTokens], *, all_rows: bool) -> ModelOutput:
        plan, rows = plan_of(scheduled, all_rows=all_rows)
        return self._compute(lambda: self._replayed(plan, rows) or self.forward(plan, rows))

    def _replayed(self, plan: Plan, rows: Seq[int] | None) -> ModelOutput | None:
        return None if self.graphs is None or rows is not None else self.graphs(plan)

    def mtp_draft(self, streams_BMD: Tensor, ids_B: Seq[int]) -> list[int]:
        """Return the MTP block's guess at the id after each of `ids`; `streams` are those of the ids before them.

        The block sees no earlier position, as at the start of a text, so it has no state to keep between forwards, to
        roll back, to fork or to save. The next forward checks each guess.
        """
        count = len(ids_B)
        plan = Plan(ids_B, [1] * count, [0] * count, [0] * count, [()] * count)
        ids: list[int] = self._compute(
            lambda: self.forward.draft(streams_BMD, plan).logits.cpu().numpy().argmax(-1)
        ).tolist()
        return ids

    def _compute(self, function: Callable[[], T]) -> T:
        def here() -> T:
            with torch.inference_mode():
                return function()

        return here() if self._on_one_thread is None else self._on_one_thread(here)
