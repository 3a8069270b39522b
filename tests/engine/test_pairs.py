"""Interleaved pairs of two checkouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentkit_engine.benchmarks import pairs
from agentkit_engine.benchmarks.errors import BenchmarkError
from agentkit_engine.benchmarks.record import make_record

ROOT = Path(__file__).parents[2]
WORKER = """\
import os, sys
from pathlib import Path
room = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
print(f'"{room / "agentkit_engine/__init__.py"}"', flush=True)
for turn, line in enumerate(sys.stdin):
    with Path(os.environ["LOG"]).open("a") as file:
        print(room.parent.name, line.strip(), file=file)
    print(json_seconds(room.parent.name, turn), flush=True)
"""


@pytest.fixture
def checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Checkouts whose processes answer with fixed times: `new` takes 1 s, then 2, 3, ...; `old` twice as long."""
    script = tmp_path / "worker.py"
    seconds = "def json_seconds(name, turn):\n    return (turn + 1) * (2 if name == 'old' else 1)\n"
    script.write_text(seconds + WORKER)
    monkeypatch.setattr(pairs, "WORKER", script)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    old, new = tmp_path / "old", tmp_path / "new"
    for each in (old, new):
        (each / "engine").mkdir(parents=True)
    return old, new


def test_the_result_is_the_median_ratio_of_runs_in_turn(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    [measured] = pairs.measure(*checkouts, 4, ["prefill"])
    assert measured.value == 2.0 and measured.spread == 0.0
    assert measured.outputs == "4 interleaved pairs, the middle half from 2.000 to 2.000; medians 7 and 3.5 CPU-s"
    record = make_record(measured, machine="", commit="", command="")
    assert record.target == "value >= 0.95" and record.met
    order = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert order == ["old", "new", *["old", "new", "new", "old"] * 2]


def test_a_slower_checkout_misses_the_goal(checkouts: tuple[Path, Path]) -> None:
    old, new = checkouts
    [measured] = pairs.measure(new, old, 2, ["training"])
    assert measured.value == 0.5 and not make_record(measured, machine="", commit="", command="").met


def test_a_folder_without_the_package_is_refused(checkouts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.WORKER.write_text("""print('"/elsewhere/agentkit_engine/__init__.py"')""")
    with pytest.raises(BenchmarkError, match="old has no agentkit_engine; /elsewhere/agentkit_engine"):
        list(pairs.measure(*checkouts, 1, ["prefill"]))


def test_a_side_that_ends_is_an_error(checkouts: tuple[Path, Path]) -> None:
    pairs.WORKER.write_text("raise SystemExit(3)")
    with pytest.raises(BenchmarkError, match=r"the process of .*old ended with exit code 3"):
        list(pairs.measure(*checkouts, 1, ["prefill"]))


@pytest.mark.slow
def test_every_task_runs_in_this_checkout() -> None:
    measured = list(pairs.measure(ROOT, ROOT, 1, list(pairs.TASKS)))
    assert len(measured) == len(pairs.TASKS) and all(each.value > 0 for each in measured)
