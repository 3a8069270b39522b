"""The benchmarks at their smallest sizes: they run, compare both sides' outputs, and store their records in order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from agentkit_engine.benchmarks import caching, experts_on_disk, peers, registry
from agentkit_engine.benchmarks.__main__ import main
from agentkit_engine.benchmarks.command import chosen_benchmarks
from agentkit_engine.benchmarks.errors import OutputsDifferError, PeerMissingError
from agentkit_engine.benchmarks.floor import Floor
from agentkit_engine.benchmarks.random_checkpoint import random_decoder, tiny_v4, write_random_checkpoint
from agentkit_engine.benchmarks.record import BenchmarkRecord, Bound, Measurement, make_record, merge_records, table
from agentkit_engine.runtime import Request, Scheduler
from agentkit_engine.sampler import SampledToken

FIELDS = {
    *("benchmark", "what", "value", "unit", "spread", "peer", "peer_value", "ratio", "target", "stretch"),
    *("met", "stretch_met", "outputs", "machine", "commit", "command"),
}


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [*arguments])


def make(benchmark: str = "decode", what: str = "decode", **fields: Any) -> BenchmarkRecord:
    measurement = Measurement(benchmark, what, fields.pop("value", 6.0), "tokens/s", **fields)
    return make_record(measurement, machine="a machine", commit="abc", command="a command")


@pytest.mark.filterwarnings("default")
def test_decode_and_parity_write_records_of_compared_outputs(tmp_path: Path) -> None:
    out = tmp_path / "results" / "cpu.json"
    result = run("--quick", "--only", "parity,batch-decode,decode", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert [record["benchmark"] for record in records].count("decode") == 3
    assert len({(record["benchmark"], record["what"]) for record in records}) == len(records)
    for record in records:
        assert record.keys() == FIELDS
        assert record["outputs"]
        assert record["command"] == f"python -m agentkit_engine.benchmarks --only {record['benchmark']} --quick"
    decoded = next(r for r in records if r["benchmark"] == "decode" and r["unit"] == "tokens/CPU-s")
    assert decoded["peer"].startswith("transformers ")
    assert decoded["ratio"] == pytest.approx(decoded["value"] / decoded["peer_value"])
    assert decoded["target"] == "ratio >= 2" and decoded["met"] is (decoded["ratio"] >= 2)
    parity, *same = [record for record in records if record["benchmark"] == "parity"]
    assert 0 < parity["value"] < 1e-4 and parity["met"]
    assert len(same) == 8 and all(record["value"] == 0 and record["stretch_met"] for record in same)
    together = [record for record in records if record["benchmark"] == "batch-decode" and record["unit"] != "ms"]
    assert [record["unit"] for record in together] == ["tokens/CPU-s", "tokens/s"]
    assert together[1]["target"] == "ratio >= 1" and "bit for bit what each says alone" in together[1]["outputs"]
    floors = [record for record in records if record["what"].startswith("bare matrix products of a step, ")]
    assert [record["benchmark"] for record in floors] == ["batch-decode", "decode"]
    for bare in floors:
        assert bare["ratio"] == pytest.approx(bare["peer_value"] / bare["value"])
        assert bare["stretch"] == "ratio <= 1.35" and bare["stretch_met"] is (bare["ratio"] <= 1.35)
    assert [bare["outputs"].split(" of ")[0] for bare in floors] == ["228 products", "110 products"]


@pytest.mark.filterwarnings("default")
def test_prefill_is_measured_beside_its_products(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "prefill", "--out", str(out))
    assert result.exit_code == 0, result.output
    *speeds, bare = json.loads(out.read_text())
    assert [record["unit"] for record in speeds] == ["tokens/CPU-s", "x", "tokens/s"]
    assert bare["what"] == "bare matrix products of a prefill of 128 tokens, one thread"
    assert bare["stretch"] == "ratio <= 1.5" and bare["stretch_met"] is (bare["ratio"] <= 1.5)


@pytest.mark.parametrize("rows", [1, 20, 100])  # experts one token at a time, and all rows of an expert together
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_floor_holds_every_product_with_a_weight(rows: int, dtype: torch.dtype) -> None:
    spec = tiny_v4()
    decoder = random_decoder(spec).to(dtype)
    scheduler = Scheduler(decoder, kv_cache_bytes=1 << 24)
    request, floor = Request(peers.random_ids(spec, rows)), Floor()
    with floor.recording():
        scheduler.step([request])
    assert request.logits_V is not None
    expected = 0
    for name, weight in decoder.named_parameters():
        if weight.dim() == 3:  # all experts
            expected += rows * weight[0].numel() * spec.num_experts_per_tok
        elif name in ("head.weight", "hc_head_fn"):
            expected += weight.numel()
        elif weight.dim() == 2 and name != "embed.weight" and not name.endswith("ape"):
            expected += rows * weight.numel()
    assert floor.multiply_adds == expected
    floor()


def test_savings_are_measured_against_a_peer_without_them(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    names = ["scheduler", "prefix-lookup", "append-turn", "restore", "disk-writes", "speculation"]
    result = run("--quick", "--only", ",".join(names), "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert {record["benchmark"] for record in records} == set(names)
    assert all(record["ratio"] and record["peer"] and record["outputs"] for record in records)
    stored = next(record for record in records if record["benchmark"] == "disk-writes")
    assert 0.9 < stored["value"] < 1.2 < stored["peer_value"]  # every span is written once
    assert stored["met"] and "; 2 tokens computed again" in stored["outputs"]


def test_long_sessions_and_the_cost_of_exactness(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "exact,context-64k,context-1m", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    assert [record["benchmark"] for record in records] == ["context-1m"] * 3 + ["context-64k"] * 3 + ["exact"] * 4
    held, _, restored = records[:3]
    assert held["value"] == pytest.approx(1, abs=0.3) and restored["ratio"] > 0
    assert "bit for bit" in held["outputs"]


def test_experts_on_disk_answer_like_those_in_memory(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "experts-on-disk", "--out", str(out))
    assert result.exit_code == 0, result.output
    records = json.loads(out.read_text())
    read = [record["value"] for record in records if record["what"].startswith("experts read per decoded token")]
    assert len(read) == 2 and all(megabytes > 0 for megabytes in read)
    assert any("all experts in memory, bit for bit" in (record["outputs"] or "") for record in records)


def test_a_checkpoint_beyond_memory_must_use_many_experts_in_bounded_memory(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, spec := tiny_v4())
    measured = list(experts_on_disk.beyond_memory(tmp_path, spec, 1 << 20, 2))
    records = [make_record(each, machine="", commit="", command="") for each in measured]
    assert {record.benchmark for record in records} == {"experts-beyond-memory"}
    used = next(record for record in records if record.unit == "experts")
    assert used.target == "value >= 200" and used.met is (used.value >= 200) is False  # of 96
    peak = next(record for record in records if record.what.startswith("peak memory of the process"))
    assert peak.target == "ratio >= 0.8" and peak.met is False  # mostly torch
    assert 0 < (peak.peer_value or 0) < 0.1
    compared = next(record.outputs for record in records if record.what.startswith("decode, cold"))
    assert compared == "cold = cached; with 6 layers and 16 experts = all experts in memory, bit for bit"


def test_two_threads_answer_like_one(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "flash-width", "--out", str(out))
    assert result.exit_code == 0, result.output
    load, *both = json.loads(out.read_text())
    assert load["unit"] == "GB/s" and load["peer"] == "reading the files alone" and load["ratio"] > 0
    assert [record["peer"] for record in both] == ["the same on one thread"] * 4
    assert all("are equal" in record["outputs"] for record in both)


def test_nightly_benchmarks_run_only_when_named() -> None:
    chosen = chosen_benchmarks(None, registry.BENCHMARKS, (), registry.NIGHTLY)
    assert set(registry.BENCHMARKS) - set(chosen) == {"context-1m"}


def test_a_benchmark_of_another_room_is_skipped(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "turn-overhead", "--out", str(out))
    assert (result.exit_code, result.output) == (0, "") and not out.exists()


def test_costs_and_savings_of_a_grammar(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    result = run("--quick", "--only", "grammar-cost,forced-tokens", "--out", str(out))
    assert result.exit_code == 0, result.output
    *saved, alone, together = json.loads(out.read_text())
    for cost, sessions in ((alone, 1), (together, 32)):
        assert cost["benchmark"] == "grammar-cost" and "a vocabulary of 129280" in cost["what"] and cost["value"] > 0
        assert f"{sessions} sessions" in cost["what"]
    assert [record["benchmark"] for record in saved] == ["forced-tokens", "forced-tokens"]
    assert all(record["met"] for record in saved)


def test_an_unknown_benchmark_is_an_error_that_lists_the_known_ones() -> None:
    result = run("--only", "decode,C99")
    assert result.exit_code == 2
    message = " ".join(result.output.replace("│", " ").split())
    assert (
        "unknown benchmark 'C99'; expected decode, batch-decode, prefill," in message
        and "or in the other rooms turn-overhead, shared-prefill, parallel-calls" in message
    )


def test_a_failing_benchmark_is_reported_and_keeps_its_old_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    out = tmp_path / "cpu.json"
    merge_records(out, "cold-start", [make("cold-start")])
    before = out.read_text()
    result = run("--quick", "--only", "cold-start", "--out", str(out))
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


def test_rerunning_a_benchmark_replaces_its_records_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    merge_records(path, "cold-start", [make("cold-start")])
    merge_records(path, "tiny", [make("tiny")])
    merge_records(path, "prefill", [make("prefill", "first"), make("prefill", "second")])
    merge_records(path, "prefill", [make("prefill", "third", value=1.0)])
    kept = [(record["benchmark"], record["what"]) for record in json.loads(path.read_text())]
    assert kept == [("cold-start", "decode"), ("prefill", "third"), ("tiny", "decode")]


@pytest.mark.parametrize(
    ("fields", "ratio", "met"),
    [
        ({"peer_value": 2.0, "target": Bound("ratio", ">=", 3)}, 3.0, True),
        ({"peer_value": 2.0, "target": Bound("ratio", ">=", 3), "higher_is_better": False}, 1 / 3, False),
        ({"target": Bound("value", "<=", 5)}, None, False),
        ({"target": Bound("ratio", ">=", 1)}, None, False),
        ({}, None, None),
    ],
)
def test_bounds(fields: dict[str, Any], ratio: float | None, met: bool | None) -> None:
    record = make(**fields)
    assert record.ratio == ratio and record.met is met
    assert table([record]).row_count == 1


def test_held_bytes_counts_shared_storage_once_and_spare_capacity() -> None:
    storage = torch.zeros(100)
    assert registry.held_bytes({"a": [storage[:10]], "b": (storage[50:],)}) == 400


def test_bytes_per_token_of_tiny_v4() -> None:
    assert caching.bytes_per_token(tiny_v4()) == 196
