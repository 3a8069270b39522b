"""Measurements on a GPU: their rehearsal on a CPU, and what becomes of a part that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from agentkit_kernels.gpu.record import Goal, Measurement, PeerResult, Record, Skipped, table

ROOT = Path(__file__).parents[2]
NOT_ON_A_BORROWED_GPU = (
    "anyio",
    "flash_mla",
    "jinja2",
    "llguidance",
    "numba",
    "pydantic",
    "rich",
    "tokenizers",
    "typer",
    "yaml",
)


def run(*arguments: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "kernels"), str(ROOT / "engine"), *([str(folder)] if folder else [])]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    )


def read(folder: Path, name: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return fields


def test_a_rehearsal_compares_outputs_and_needs_few_packages(tmp_path: Path) -> None:
    """Packages that a GPU's machine may lack are hidden here."""
    for name in NOT_ON_A_BORROWED_GPU:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n")
    out = tmp_path / "out"
    options = ["--rehearse", "--out", str(out), "--only", "sparse-prefill,kernels-per-layer,tiers,restore"]
    finished = run("-m", "agentkit_engine.benchmarks.gpu", *options, folder=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "these times mean nothing" in finished.stdout
    for name, goal in (("sparse-prefill", "H6"), ("kernels-per-layer", "H3"), ("tiers", "H14"), ("restore", "H14")):
        record = read(out, name)
        assert (record["status"], record["goal"], record["rehearsal"]) == ("done", goal, True)
        assert record["machine"]["torch"] == torch.__version__ and record["measurements"]
    [prefill] = read(out, "sparse-prefill")["measurements"]
    assert prefill["launches"]["_attend_kernel"] == 1 and prefill["floor_us"] > 0
    assert all(peer["outputs"].startswith("largest difference") for peer in prefill["peers"])
    assert "| sparse-prefill H6 |" in finished.stdout
    [skipped] = read(out, "sparse-prefill")["skipped"]
    assert skipped == {"what": "FlashMLA, sparse prefill", "why": "cannot be imported: ModuleNotFoundError: flash_mla"}


FAULTY = """
import os, sys, threading
from agentkit_kernels.gpu.record import Goal, Measurement

def dies(bench):
    yield Measurement("before", 1.0, Goal("us"))
    os._exit(11)

def raises(bench):
    yield Measurement("before", 1.0, Goal("us"))
    raise ValueError("a kernel is wrong")

def differs(bench):
    import torch
    from agentkit_kernels.gpu.bench import Peer
    from agentkit_kernels.triton.norm import rms_norm
    x, weight = bench.floats(2, 16), torch.ones(16)
    peers = [Peer("broken", lambda: x.view(3)), Peer("another function", lambda: x * 5)]
    yield bench.measure("norm", lambda: rms_norm(x, weight, 1e-6), Goal("us"), bytes=64, peers=peers)

def launches_nothing(bench):
    yield bench.measure("nothing", lambda: bench.floats(1), Goal("us"), bytes=1)

def is_late(bench):
    yield Measurement("before", 1.0, Goal("us"))
    bench._deadline = 0.0
    yield bench.measure("late", lambda: None, Goal("us"), bytes=1)

def is_late_comparing(bench):
    from agentkit_kernels.gpu.correctness import correctness
    bench._deadline = 0.0
    yield from correctness(bench)

def hangs(bench):
    yield Measurement("before", 1.0, Goal("us"))
    threading.Event().wait()

def works(bench):
    yield Measurement("after", 2.0, Goal("us", 3.0, 1.0))

if __name__ == "__main__":
    from agentkit_kernels.gpu import command
    out, *names = sys.argv[1:]
    command.SECONDS = 0.01  # a rehearsal has another limit
    if names == ["hangs"]:
        command.REHEARSAL_SECONDS = 1
    parts = [command.Part(name, "H0", f"faulty:{name}") for name in names]
    sys.exit(command.main("faulty", parts, ["--rehearse", "--out", out]))
"""
FAULTS = ("dies", "raises", "differs", "launches_nothing", "is_late", "is_late_comparing", "works")


def test_a_part_that_fails_leaves_its_measurements_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    finished = run(str(tmp_path / "faulty.py"), str(tmp_path / "out"), *FAULTS, folder=tmp_path)
    assert finished.returncode == 1, finished.stderr
    records = {file.stem: read(tmp_path / "out", file.stem) for file in (tmp_path / "out").iterdir()}
    states = {name: (record["status"], len(record["measurements"])) for name, record in records.items()}
    assert states == {
        "dies": ("failed", 1), "raises": ("failed", 1), "differs": ("failed", 0), "launches_nothing": ("failed", 0),
        "is_late": ("cut", 1), "is_late_comparing": ("cut", 1), "works": ("done", 1),
    }  # fmt: skip
    assert "status 11" in records["dies"]["error"] and "a kernel is wrong" in records["raises"]["error"]
    assert "another function: largest difference" in records["differs"]["error"]
    assert "no kernel was launched" in records["launches_nothing"]["error"]
    assert records["works"]["measurements"][0]["good_met"] and not records["works"]["measurements"][0]["moonshot_met"]


def test_a_rehearsal_that_hangs_is_ended(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    finished = run(str(tmp_path / "faulty.py"), str(tmp_path / "out"), "hangs", folder=tmp_path)
    assert finished.returncode == 1, finished.stderr
    record = read(tmp_path / "out", "hangs")
    assert record["status"] == "failed" and "ended after 1 s" in record["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    finished = run("-m", "agentkit_kernels.gpu", "--out", str(tmp_path))
    assert finished.returncode == 2 and not [*tmp_path.iterdir()]
    assert "finds no GPU" in finished.stderr and "--rehearse" in finished.stderr


def test_an_interpreter_that_was_left_on_is_an_error() -> None:
    finished = run("-m", "agentkit_kernels.gpu", TRITON_INTERPRET="1")
    assert finished.returncode == 2 and "unset it" in finished.stderr


def test_an_unknown_part_is_an_error_that_lists_the_parts() -> None:
    finished = run("-m", "agentkit_kernels.gpu", "--rehearse", "--only", "sparse-decod")
    assert (
        finished.returncode == 2 and "no part sparse-decod; choose from correctness, sparse-decode" in finished.stderr
    )


def test_every_launched_kernel_has_a_check() -> None:
    from agentkit_kernels.gpu.catalogue import kernels
    from agentkit_kernels.gpu.correctness import CHECKS

    assert CHECKS.keys() == kernels().keys()
    assert kernels()["attention"] == ["_attend_kernel", "_merge_kernel", "_store_kernel"]
    assert kernels()["indexer"] == ["_index_merge", "_index_scan", "_index_stream"]
    names = [name for of_file in kernels().values() for name in of_file]
    assert len(names) == len(set(names)), "launches are counted by name"


def test_every_goal_of_the_table_has_a_part() -> None:
    from agentkit_engine.benchmarks.gpu.__main__ import PARTS

    assert {part.goal for part in PARTS} - {""} == {f"H{number}" for number in range(1, 16)}
    assert PARTS[0].name == "correctness"
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_the_table_has_the_best_peer_and_the_share_of_the_floor(tmp_path: Path) -> None:
    record = Record("moe", "H9", rehearsal=False)
    peers = [PeerResult("slow", 10.0), PeerResult("fast", 300.0), PeerResult("missing", skipped="not here")]
    record.add(Measurement("T=512", 400.0, Goal("TFLOPS", 350, 550), 0.02, us=50.0, floor_us=20.0, peers=peers))
    record.add(Skipped("another", "there is no such library"))
    record.status = "done"
    record.write(tmp_path)
    calls = Record("kernels-decode", "", rehearsal=False, status="cut", error="the part's time is over")
    calls.add(Measurement("norm", 3.0, Goal("us"), us=3.0, floor_us=1.5))
    calls.add(Measurement("rope", 9.0, Goal("us"), us=9.0, floor_us=0.9))
    calls.write(tmp_path)
    assert table(read(tmp_path, name) for name in ("moe", "kernels-decode")).splitlines()[2:] == [
        "| moe H9 | T=512 | 400 TFLOPS | 2% | 40% | 300 fast | 350 met | 550 missed |",
        "| moe H9 | another | skipped: there is no such library | | | | | |",
        "| kernels-decode | 2 results; least of its floor: rope, 10% | | | 30% in the middle | | | |",
        "| kernels-decode | | cut: the part's time is over | | | | | |",
    ]
