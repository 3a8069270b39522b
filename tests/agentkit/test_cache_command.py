"""`agentkit cache`: what `info` reports about a folder, and what `prune` removes from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from agentkit.cli import app
from agentkit_engine import Engine
from agentkit_engine.runtime.state import SPAN


def agentkit(*arguments: str | Path, code: int = 0) -> typer.testing.Result:
    result = typer.testing.CliRunner().invoke(app, ["cache", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(agentkit(*arguments, "--json").stdout)
    return found


@pytest.fixture
def segments(tmp_path: Path) -> list[Path]:
    """Segments of one session each, oldest first. Only the oldest session is longer than a span."""
    engine = Engine.load("tiny", cache_dir=tmp_path)
    for length in (SPAN + 20, 30, 40):
        with engine.session() as session:
            session.append(range(length, 0, -1))
            next(session.generate())
        engine.flush()
    return sorted(tmp_path.rglob("*.segment"))


def test_info_counts_segments_spans_and_checkpoints(segments: list[Path], tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in segments)
    found = as_json("info", tmp_path)
    model = {"segments": 3, "bytes": size, "spans": 1, "checkpoints": 3, "damaged": 0}
    assert found == {"bytes": size, "models": [{"name": segments[0].parent.name, **model}]}
    said = agentkit("info", tmp_path).stdout
    assert f"3 segments, {size:,} bytes: 1 spans, 3 checkpoints, 0 damaged" in said


def test_info_counts_damaged_segments(segments: list[Path], tmp_path: Path) -> None:
    torn, altered = segments[0].read_bytes(), bytearray(segments[1].read_bytes())
    segments[0].write_bytes(torn[:-1])
    altered[-1] ^= 1
    segments[1].write_bytes(altered)
    (model,) = as_json("info", tmp_path)["models"]
    assert (model["spans"], model["checkpoints"], model["damaged"]) == (1, 1, 2)


def test_prune_removes_the_least_recently_used_segments(segments: list[Path], tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in segments]
    os.utime(segments[0])  # now the most recently used
    left = sizes[0] + sizes[2]
    assert as_json("prune", tmp_path, "--bytes", str(left)) == {"removed_segments": 1, "bytes": left}
    assert [path.is_file() for path in segments] == [True, False, True]
    assert "removed 0 segments" in agentkit("prune", tmp_path, "--bytes", str(left)).stdout
    assert "removed 2 segments, 0 bytes left" in agentkit("prune", tmp_path, "--bytes", "0").stdout


def test_foreign_files_are_neither_counted_nor_removed(segments: list[Path], tmp_path: Path) -> None:
    foreign = [segments[0].parent / "notes.segment", tmp_path / "notes" / segments[0].name, tmp_path / "notes.txt"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("somebody's notes")
    (model,) = as_json("info", tmp_path)["models"]
    assert (model["segments"], model["damaged"]) == (3, 0)
    assert as_json("prune", tmp_path, "--bytes", "0") == {"removed_segments": 3, "bytes": 0}
    assert all(path.is_file() for path in foreign)


def test_an_empty_folder_is_an_empty_cache(tmp_path: Path) -> None:
    assert agentkit("info", tmp_path).stdout == "0 models, 0 bytes\n"
    assert as_json("prune", tmp_path, "--bytes", "100") == {"removed_segments": 0, "bytes": 0}


@pytest.mark.parametrize("arguments", [["info"], ["prune", "--bytes", "0"]])
def test_a_missing_folder_is_named(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    output = agentkit(*arguments, "nowhere", code=2).output
    assert "there is no folder nowhere; give the --cache-dir of an earlier command" in output


def test_prune_requires_a_non_negative_budget(tmp_path: Path) -> None:
    assert "--bytes" in agentkit("prune", tmp_path, code=2).output
    assert "--bytes" in agentkit("prune", tmp_path, "--bytes", "-1", code=2).output
