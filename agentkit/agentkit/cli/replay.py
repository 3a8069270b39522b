"""`agentkit replay TRAJECTORY`: force the ids of a record through the model, and compare."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.model import load_model
from agentkit.cli.options import (
    DeviceFlag,
    DevicesFlag,
    ExpertCacheFlag,
    JsonFlag,
    KVCacheDtypeFlag,
    OtherModelFlag,
    ThreadsFlag,
    finite,
    packaged_models,
)
from agentkit.cli.terminal import visible


def command(
    trajectory: Annotated[
        Path, typer.Argument(metavar="TRAJECTORY", exists=True, dir_okay=False, help="A trajectory (.jsonl).")
    ],
    model: OtherModelFlag = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="Largest difference of log-probabilities that is accepted.")
    ] = 1e-3,
    device: DeviceFlag = None,
    devices: DevicesFlag = None,
    threads: ThreadsFlag = None,
    expert_cache_bytes: ExpertCacheFlag = None,
    kv_cache_dtype: KVCacheDtypeFlag = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Replay a trajectory of a model in this process: force its ids through the model, take tool results from the
    record, and name the first token or byte that differs.

    Exits with 0 if everything is equal, and log-probabilities differ by at most --tolerance, and with 1 if not. A
    record that ends before its run did is compared as far as it goes, and a note says so.
    """
    from agentkit.errors import ReplayError
    from agentkit.events import Outcome
    from agentkit.model import TokenSegment
    from agentkit.models.embedded import EmbeddedModel
    from agentkit.replayer import check_replayable, replay
    from agentkit.trajectory import Trajectory

    record = Trajectory.load(trajectory)
    check_replayable(record)
    name = model or record.header.model
    if model is None and name not in packaged_models():
        raise typer.BadParameter(f'the record is of a model "{name}"; give its folder', param_hint="--model")
    if not any(isinstance(each, TokenSegment) for each in record.records):
        raise ReplayError(
            f"{trajectory} has no ids, so there is nothing to compare: its run ended before its first prompt"
        )
    source = load_model(
        name,
        device=device,
        devices=devices,
        threads=threads,
        expert_cache_bytes=expert_cache_bytes,
        kv_cache_dtype=kv_cache_dtype,
        cache_dir=None,
        base_url=None,
    )
    assert isinstance(source, EmbeddedModel), "--model refuses a model behind an API"
    done = replay(record, source, tolerance=tolerance)
    complete = bool(record.records) and isinstance(record.records[-1], Outcome)
    if as_json:
        typer.echo(json.dumps({"same": done.same, "complete": complete, **asdict(done)}, indent=2))
    else:
        typer.echo(
            f"replayed {done.turns} turns, {done.tokens} ids, {done.sampled} of them sampled; log-probabilities differ "
            f"by at most {done.max_logprob_error:.3g}"
        )
        typer.echo("equal" if done.difference is None else visible(f"differs at {done.difference}"))
        if not complete:
            typer.echo("Note: the record ends before its run did; only what it has was compared.", err=True)
    return ExitCode.OK if done.same else ExitCode.UNSOLVED
