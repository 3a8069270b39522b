"""Compile every CPU kernel before the first token, once per machine.

Numba compiles a kernel on its first call and caches it on disk. Without a warm-up, the first prompt compiles some
kernels, a longer one others, and a later turn the rest: twenty seconds in pieces that look like a slow model.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch

from agentkit_engine.errors import OutOfMemoryError
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.runtime.runner import Runner, machine
from agentkit_engine.runtime.scheduled import ScheduledTokens

logger = logging.getLogger(__name__)

ROWS = 512
"""Rows of the prompt, enough for the code path in which each expert multiplies all its rows at once."""


def warm_up(runner: Runner, decoder: Decoder) -> None:
    """Run forwards that reach every kernel, unless an earlier process on this machine did; logs a warning first."""
    from agentkit_kernels.cpu import loops, panels

    kind = (runner.pools.kv_cache_dtype, type(runner.forward.ops).__name__)
    marker = _marker(decoder, [Path(loops.__file__), Path(panels.__file__)], loops.cache_folder(), kind)
    if marker is None or marker.exists():
        return
    logger.warning("compiling kernels for this CPU (once) ...")
    pools, spec = runner.pools, decoder.spec
    last = spec.max_position_embeddings - 2
    rows = min(ROWS, last)
    choosing = [(spec.index_topk + 1) * layer.compress_ratio for layer in spec.layers if layer.attention == "csa"]
    deep = max([rows, *(length for length in choosing if length <= last)])
    sequence = pools.open()
    try:
        pools.reserve(sequence, deep + 2)
        runner.step([ScheduledTokens(sequence, [0] * rows)])
        sequence.length = deep  # far enough that the indexer must choose among the entries; their content is irrelevant
        computed = runner.step([ScheduledTokens(sequence, [0], [0])])
        if decoder.mtp:
            runner.mtp_draft(computed.streams_RMD[:1], [0])
    except OutOfMemoryError:
        return  # not enough memory; kernels are then compiled on first use
    finally:
        pools.close(sequence)
    marker.touch()


def _marker(decoder: Decoder, sources: list[Path], folder: Path | None, kind: tuple[str, ...]) -> Path | None:
    """Return the file that marks all kernels for these layers, weights and kind of rows and operations as compiled;
    None without a cache folder."""
    if folder is None:
        return None
    layers = (*decoder.spec.layers, *decoder.spec.mtp_layers)
    kinds = sorted({(layer.attention, layer.router) for layer in layers})
    dtypes = sorted(
        {str(weight.dtype) for weight in decoder.parameters()} | {matrix.format for matrix in decoder.packed.values()}
    )
    # Numba identifies sources the same way
    stats = [(stat.st_mtime_ns, stat.st_size) for stat in map(Path.stat, sources)]
    key = repr((machine(torch.device("cpu")), kinds, dtypes, stats, kind))
    digest = hashlib.blake2b(key.encode(), digest_size=8)
    return folder / f"warm-{digest.hexdigest()}"
