"""The loop's benchmarks at their smallest: they run, compare, and count tokens as their names say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from agentkit import Message, Segment
from agentkit.benchmarks.__main__ import main
from agentkit.benchmarks.goals import GOALS
from agentkit.benchmarks.sharing import Counts
from agentkit_engine.benchmarks.goals import ELSEWHERE


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [*arguments])


def test_the_loop_and_what_trajectories_share_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "results" / "cpu.json"
    result = run("--quick", "--only", "C1,C13,C14", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert [record["goal"] for record in records] == ["C13"] * 3 + ["C14"] * 3
    assert all(record["outputs"] for record in records)
    scripted, through, again = records[:3]
    assert (scripted["unit"], scripted["good"], scripted["moonshot"]) == ("us/turn", "value <= 500", "value <= 100")
    assert scripted["ratio"] and through["value"] > 0
    assert (again["value"], again["met"], again["moonshot_met"]) == (0, True, True)
    prefilled, without, rate = records[3:]
    assert 1 <= prefilled["value"] <= 1.02 < without["peer_value"]
    assert rate["peer_value"] <= rate["value"] < 100
    assert prefilled["command"] == "python -m agentkit.benchmarks --only C14 --quick"


def test_a_name_that_no_room_knows_is_an_error() -> None:
    result = run("--only", "C14,C99")
    assert result.exit_code == 2
    message = " ".join(result.output.replace("│", " ").split())
    assert "unknown goal 'C99'; there are C13, C14, and elsewhere C1," in message


def test_the_engine_knows_which_goals_are_measured_here() -> None:
    assert tuple(GOALS) == ELSEWHERE


@dataclass
class Said:
    segments: Sequence[Segment]
    messages: Sequence[Message] = ()


def test_unique_tokens_are_the_fed_nodes_of_a_trie() -> None:
    first = Said(
        [
            Segment("prompt", (1, 2, 3)),
            Segment("sampled", (4, 5), (0.0, 0.0)),
            Segment("prompt", (6,)),
            Segment("sampled", (7,), (0.0,)),
        ]
    )
    second = Said([Segment("prompt", (1, 2, 9)), Segment("sampled", (4,), (0.0,)), Segment("prompt", (6,))])
    assert Counts.of([first]) == Counts(unique=4, prompts=3 + 6)
    assert Counts.of([first, second]) == Counts(unique=4 + 2, prompts=3 + 6 + 3 + 5)
