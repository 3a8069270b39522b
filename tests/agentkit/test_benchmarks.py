"""The benchmarks of the loop at their smallest sizes: they run, compare outputs, and count tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from agentkit import Message, TokenSegment
from agentkit.benchmarks.__main__ import main
from agentkit.benchmarks.registry import BENCHMARKS
from agentkit.benchmarks.sharing import Counts
from agentkit_engine.benchmarks.registry import ELSEWHERE
from agentkit_environments import available_backends


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [*arguments])


def test_the_quick_benchmarks_write_their_records(tmp_path: Path) -> None:
    out = tmp_path / "results" / "cpu.json"
    result = run("--quick", "--only", "decode,turn-overhead,shared-prefill,parallel-calls", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert [record["benchmark"] for record in records] == (
        ["parallel-calls"] + ["shared-prefill"] * 3 + ["turn-overhead"] * 3
    )
    assert all(record["outputs"] for record in records)
    calls, *records = records
    assert calls["value"] >= calls["peer_value"] == 2 * 6 * 0.001 / 4 and calls["target"] == "value <= 0.0045"
    scripted, through, again = records[3:]
    assert (scripted["unit"], scripted["target"], scripted["stretch"]) == ("us/turn", "value <= 500", "value <= 100")
    assert scripted["ratio"] and through["value"] > 0
    assert (again["value"], again["met"], again["stretch_met"]) == (0, True, True)
    prefilled, without, rate = records[:3]
    assert 1 <= prefilled["value"] <= 1.02 < without["peer_value"]
    assert rate["peer_value"] <= rate["value"] < 100
    assert prefilled["command"] == "python -m agentkit.benchmarks --only shared-prefill --quick"


@pytest.mark.sandbox
def test_sandboxes_are_measured_on_the_backends_that_work(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "sandboxes", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = {record["what"]: record for record in json.loads(out.read_text())}
    works = [backend for backend, reason in available_backends().items() if reason is None]
    assert {what.partition(":")[0] for what in records} == {*works}
    for backend in works:
        assert records[f"{backend}: beyond the time of a command itself, p50 of 3"]["value"] > 0
        cancelled = records[f"{backend}: from a cancellation to the last process dead, longest of 2"]
        assert cancelled["value"] > 0 and cancelled["outputs"] == "no process is left after any of them"
        for world in ("4e-05 MB in 2 files", "0.004 MB in 200 files"):
            forked = records[f"{backend}: fork(2) of a world of {world}, and a command in each"]
            assert forked["value"] > 0 and (forked["stretch"] == "value <= 2500") == (backend != "unsafe-local")


def test_an_unknown_benchmark_is_an_error() -> None:
    result = run("--only", "shared-prefill,C99")
    assert result.exit_code == 2
    message = " ".join(result.output.replace("│", " ").split())
    expected = "expected turn-overhead, shared-prefill, parallel-calls, sandboxes, or in the other rooms decode,"
    assert f"unknown benchmark 'C99'; {expected}" in message


def test_the_engine_lists_the_benchmarks_of_the_loop() -> None:
    assert tuple(BENCHMARKS) == ELSEWHERE


@dataclass
class Said:
    segments: Sequence[TokenSegment]
    messages: Sequence[Message] = ()
    turns: int = 0


def test_unique_tokens_are_the_fed_nodes_of_a_trie() -> None:
    first = Said(
        [
            TokenSegment("prompt", (1, 2, 3)),
            TokenSegment("sampled", (4, 5), (0.0, 0.0)),
            TokenSegment("prompt", (6,)),
            TokenSegment("sampled", (7,), (0.0,)),
        ]
    )
    second = Said(
        [TokenSegment("prompt", (1, 2, 9)), TokenSegment("sampled", (4,), (0.0,)), TokenSegment("prompt", (6,))]
    )
    assert Counts.of([first]) == Counts(unique=4, prompts=3 + 6)
    assert Counts.of([first, second]) == Counts(unique=4 + 2, prompts=3 + 6 + 3 + 5)
