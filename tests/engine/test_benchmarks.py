"""The benchmarks at their smallest: they run, compare what both sides computed, and keep their records in order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from agentkit_engine.benchmarks import goals, peers, runtime_goals
from agentkit_engine.benchmarks.__main__ import main
from agentkit_engine.benchmarks.command import chosen_goals
from agentkit_engine.benchmarks.errors import OutputsDifferError, PeerMissingError
from agentkit_engine.benchmarks.record import Bound, Measurement, Record, make_record, merge_records, table
from agentkit_engine.sampler import SampledToken

FIELDS = {
    *("goal", "what", "value", "unit", "spread", "peer", "peer_value", "ratio", "good", "moonshot"),
    *("met", "moonshot_met", "outputs", "machine", "commit", "command"),
}


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [*arguments])


def make(goal: str = "C1", what: str = "decode", **fields: Any) -> Record:
    measurement = Measurement(goal, what, fields.pop("value", 6.0), "tokens/s", **fields)
    return make_record(measurement, machine="a machine", commit="abc", command="a command")


@pytest.mark.filterwarnings("default")
def test_decode_and_parity_write_records_of_compared_outputs(tmp_path: Path) -> None:
    out = tmp_path / "results" / "cpu.json"
    result = run("--quick", "--only", "C4,C2,C1", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert [record["goal"] for record in records[:2]] == ["C1", "C1"]
    assert len({(record["goal"], record["what"]) for record in records}) == len(records)
    for record in records:
        assert record.keys() == FIELDS
        assert record["outputs"]
        assert record["command"] == f"python -m agentkit_engine.benchmarks --only {record['goal']} --quick"
    decoded = next(record for record in records if record["unit"] == "tokens/CPU-s")
    assert decoded["peer"].startswith("transformers ")
    assert decoded["ratio"] == pytest.approx(decoded["value"] / decoded["peer_value"])
    assert decoded["good"] == "ratio >= 2" and decoded["met"] is (decoded["ratio"] >= 2)
    parity, *same = [record for record in records if record["goal"] == "C4"]
    assert 0 < parity["value"] < 1e-4 and parity["met"]
    assert len(same) == 8 and all(record["value"] == 0 and record["moonshot_met"] for record in same)
    together = [record for record in records if record["goal"] == "C2"]
    assert [record["unit"] for record in together] == ["tokens/CPU-s", "tokens/s"]
    assert together[1]["good"] == "ratio >= 1" and "bit for bit what each says alone" in together[1]["outputs"]


def test_what_the_runtime_saves_is_measured_beside_doing_without(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "C6,C7,C8,C9,C10,C16", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert list(dict.fromkeys(record["goal"] for record in records)) == ["C6", "C7", "C8", "C9", "C10", "C16"]
    assert all(record["ratio"] and record["peer"] and record["outputs"] for record in records)
    stored = next(record for record in records if record["goal"] == "C10")
    assert 0.9 < stored["value"] < 1.2 < stored["peer_value"]  # every span is written once
    assert stored["met"] and "; 2 tokens computed again" in stored["outputs"]


def test_long_sessions_and_what_exactness_costs(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "exact,64K,1M", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert [record["goal"] for record in records] == ["1M"] * 3 + ["64K"] * 3 + ["exact"] * 4
    held, _, restored = records[:3]
    assert held["value"] == pytest.approx(1, abs=0.3) and restored["ratio"] > 0
    assert "bit for bit" in held["outputs"]


def test_all_goals_are_those_that_do_not_take_a_night() -> None:
    assert set(goals.GOALS) - set(chosen_goals(None, goals.GOALS, (), goals.NIGHTLY)) == {"1M"}


def test_a_goal_of_another_room_is_left_to_it(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "C13", "--out", str(out))
    assert (result.exit_code, result.output) == (0, "") and not out.exists()


def test_what_a_grammar_costs_and_saves(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "C11,C12", "--out", str(out))
    assert result.exit_code == 0, result.output
    alone, together, *saved = json.loads(out.read_text())
    for cost, sessions in ((alone, 1), (together, 32)):
        assert cost["goal"] == "C11" and "a vocabulary of 129280" in cost["what"] and cost["value"] > 0
        assert f"{sessions} sessions" in cost["what"]
    assert [record["goal"] for record in saved] == ["C12", "C12"]
    assert all(record["met"] for record in saved)


def test_an_unknown_goal_is_named_with_those_there_are() -> None:
    result = run("--only", "C1,C99")
    assert result.exit_code == 2
    message = " ".join(result.output.replace("│", " ").split())
    assert "unknown goal 'C99'; there are C1, C2, C3," in message and "and elsewhere C13, C14" in message


def test_a_failing_goal_is_reported_and_keeps_its_old_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    out = tmp_path / "cpu.json"
    merge_records(out, "C15", [make("C15")])
    before = out.read_text()
    result = run("--quick", "--only", "C15", "--out", str(out))
    assert result.exit_code == 1
    assert "pip install transformers" in result.output
    assert out.read_text() == before


def test_a_missing_peer_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PeerMissingError, match=r"pip install transformers=="):
        peers.import_transformers()


def test_outputs_that_differ_are_an_error() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0])
    logprobs = logits.log_softmax(-1)
    assert "1 tokens" in peers.compare_tokens([SampledToken(2, float(logprobs[2]))], [logits])
    with pytest.raises(OutputsDifferError, match="largest"):
        peers.compare_tokens([SampledToken(2, float(logprobs[2]) - 0.01)], [logits])
    with pytest.raises(OutputsDifferError, match="largest"):
        peers.compare_tokens([SampledToken(1, float(logprobs[1]))], [logits])


def test_rerunning_a_goal_replaces_its_records_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    merge_records(path, "C15", [make("C15")])
    merge_records(path, "tiny", [make("tiny")])
    merge_records(path, "C3", [make("C3", "first"), make("C3", "second")])
    merge_records(path, "C3", [make("C3", "third", value=1.0)])
    kept = [(record["goal"], record["what"]) for record in json.loads(path.read_text())]
    assert kept == [("C3", "third"), ("C15", "decode"), ("tiny", "decode")]


@pytest.mark.parametrize(
    ("fields", "ratio", "met"),
    [
        ({"peer_value": 2.0, "good": Bound("ratio", ">=", 3)}, 3.0, True),
        ({"peer_value": 2.0, "good": Bound("ratio", ">=", 3), "higher_is_better": False}, 1 / 3, False),
        ({"good": Bound("value", "<=", 5)}, None, False),
        ({"good": Bound("ratio", ">=", 1)}, None, False),
        ({}, None, None),
    ],
)
def test_bounds(fields: dict[str, Any], ratio: float | None, met: bool | None) -> None:
    record = make(**fields)
    assert record.ratio == ratio and record.met is met
    assert table([record]).row_count == 1


def test_held_bytes_counts_shared_storage_once_and_spare_capacity() -> None:
    storage = torch.zeros(100)
    assert goals.held_bytes({"a": [storage[:10]], "b": (storage[50:],)}) == 400


def test_bytes_per_token_of_tiny_v4() -> None:
    assert runtime_goals.bytes_per_token(peers.tiny_v4()) == 196
