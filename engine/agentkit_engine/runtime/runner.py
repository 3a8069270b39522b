"""One forward for a ragged batch of live sequences, with the same bits in any batch.

`compiled.py` runs it on a CPU with Numba, `eager.py` in plain torch everywhere else. In both, a row's bits do not
depend on its neighbours.

With `exact=False` the runner skips the probing of matrix products and lets the library use all threads. The bits then
depend on the batch; only forks and restored sessions, which see the same forwards, still agree.

Dimension key: `runtime/__init__.py` and `model/__init__.py`.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext, suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from agentkit_engine.model.decoder import Decoder
from agentkit_engine.runtime.eager import EagerLayers
from agentkit_engine.runtime.segments import Computed, Segment
from agentkit_engine.runtime.state import Pools
from agentkit_engine.runtime.threads import OneThread

T = TypeVar("T")
logger = logging.getLogger(__name__)

NUMERICS = 3
"""Version of the numerics. Increment it with every change to a bit of a forward's output: stored states of another
version are not used."""


class Layers(Protocol):
    """A decoder's packed weights over `Pools`."""

    def __call__(self, segments: Seq[Segment], firsts: Seq[int]) -> Computed:
        """Write the state of the segments' tokens and return the output rows, of each segment from its `firsts` on."""

    def mtp_draft(self, streams_BMD: Tensor, ids_B: Seq[int]) -> list[int]:
        """See `Runner.mtp_draft`."""


def can_compile(device: torch.device) -> bool:
    """Return whether this device has compiled kernels; plain torch computes on all others."""
    if device.type != "cpu":
        return False
    try:
        import agentkit_kernels.cpu  # noqa: F401
    except ImportError as error:
        logger.warning("forwards will be slow: the compiled kernels cannot be loaded: %s", error)
        return False
    return True


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


class Runner:
    """A decoder's layers, packed once for forwards over `Pools`. Not differentiable."""

    def __init__(self, decoder: Decoder, pools: Pools, *, exact: bool = True, compiled: bool | None = None) -> None:
        """`compiled` selects compiled kernels; None selects them where they exist."""
        self.pools, self.exact = pools, exact
        self._on_one_thread = OneThread()
        self.layers: Layers = self._compute(lambda: self._packed(decoder, compiled))

    def _packed(self, decoder: Decoder, compiled: bool | None) -> Layers:
        with torch.inference_mode(False), torch.no_grad():  # a packed decoder can still be trained
            if can_compile(self.pools.device) if compiled is None else compiled:
                from agentkit_engine.runtime.compiled import CompiledLayers

                return CompiledLayers(decoder, self.pools, exact=self.exact)
            return EagerLayers(decoder, self.pools, exact=self.exact)

    def step(self, segments: Seq[Segment], *, all_rows: bool = False) -> Computed:
        """Extend every segment's sequence by its ids and draft, for which `Pools.reserve` has made room.

        An exact runner uses one torch thread, because with several the library divides a product by its number of rows.

        Returns:
            Logits and streams of each segment's last id and draft; with `all_rows` a row for every id.
        """
        firsts = [0 if all_rows else len(segment.ids) - 1 for segment in segments]
        computed = self._compute(lambda: self.layers(segments, firsts))
        for segment in segments:
            segment.sequence.written = max(segment.sequence.written, segment.sequence.length + len(segment))
            segment.sequence.length += len(segment.ids)
        return computed

    def mtp_draft(self, streams_BMD: Tensor, ids_B: Seq[int]) -> list[int]:
        """Return the MTP block's guess at the id after each of `ids`; `streams` are those of the ids before them.

        The block sees no earlier position, as at the start of a text, so it has no state to keep between forwards, to
        roll back, to fork or to save. The next forward checks each guess.
        """
        return self._compute(lambda: self.layers.mtp_draft(streams_BMD, ids_B))

    def _compute(self, function: Callable[[], T]) -> T:
        def here() -> T:
            with torch.inference_mode(), nullcontext() if self.pools.device.type == "cpu" else self.pools.device:
                return function()

        return self._on_one_thread(here) if self.exact else here()
