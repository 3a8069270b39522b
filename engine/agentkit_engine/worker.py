"""The process of one rank of an engine on several devices, started by `runtime/workers.py`: `worker.py FD`.

Rank 0 sends an `Assignment` over the socket with this file descriptor, and then pairs of changes to the pools and a
call: ("take_part", part) or ("read_rows", slot, spans). The worker answers each call, and ends when the socket closes.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress

import torch

from agentkit_engine.engine import read_decoder
from agentkit_engine.garbage import skip_collection_at_exit
from agentkit_engine.model.forward import Computed
from agentkit_engine.runtime.expert_parallel import experts_of
from agentkit_engine.runtime.parallel import RankRunner, join
from agentkit_engine.runtime.runner import choose_backend
from agentkit_engine.runtime.state import Pools
from agentkit_engine.runtime.workers import Assignment, Channel, Failure


def main(channel: Channel) -> int:
    """Compute until rank 0 closes the channel; return the exit code."""
    try:
        _serve(channel)
    except (EOFError, ConnectionError):
        return 0
    except Exception:
        with suppress(OSError):
            channel.send(Failure(traceback.format_exc()))
        return 1
    return 0


def _serve(channel: Channel) -> None:
    mine: Assignment = channel.receive()
    placement, device = mine.placement, mine.placement.device_of(mine.rank)
    if mine.exact:
        torch.set_num_threads(1)
    skip_collection_at_exit()
    decoder, _ = read_decoder(
        placement.folder,
        device=device,
        backend=choose_backend(mine.backend, device),
        dtype=placement.dtype,
        expert_cache_bytes=placement.limits.expert_cache_bytes,
        devices=placement.devices,
        experts=experts_of(mine.rank, placement.devices, mine.experts),
    )
    channel.send("loaded")
    group = join(placement, mine.rank, mine.rendezvous)
    pools = Pools(
        decoder.spec, slots=mine.slots, spans=mine.spans, device=device, kv_cache_dtype=placement.kv_cache_dtype
    )
    runner = RankRunner(
        decoder,
        pools,
        group,
        exact=mine.exact,
        backend=mine.backend,
        limits=placement.limits,
        quantize_activations=placement.quantize_activations,
    )
    channel.send("ready")
    while True:
        changes, (call, *arguments) = channel.receive()
        for change, *rows in changes:
            getattr(pools, change)(*rows)
        if call == "take_part":
            output = runner.take_part(*arguments)
            channel.send(None if output is None else Computed(*(rows.clone().cpu() for rows in output)))
        else:
            channel.send(pools.read_rows(*arguments))


if __name__ == "__main__":
    sys.exit(main(Channel(int(sys.argv[1]))))
