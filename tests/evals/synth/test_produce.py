"""Runs of `agentkit synth`: the same instructions again, continued after a stop, without duplicates, checked."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentkit.cli.commands import app
from agentkit_environments import SandboxUnavailableError
from agentkit_evals.errors import SynthError
from agentkit_evals.provenance import Provenance, generator_name, is_accepted
from agentkit_evals.synth import produce as module
from agentkit_evals.synth.operations import OPERATIONS
from agentkit_evals.synth.oracle import OracleError
from agentkit_evals.synth.produce import Plan, ShardFinished, distinct, produce
from agentkit_evals.synth.sandbox import OracleSandbox
from agentkit_evals.synth.task import SynthTask

PLAN = Plan(environments=4, instructions=13, seed=3, worlds_per_shard=2, backend="unsafe-local")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth")
    produce(PLAN, out, workers=1)
    return out


def contents(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.glob("*.jsonl")}


def test_a_run_has_the_instructions_asked_for_and_a_card(made: Path) -> None:
    card = json.loads((made / "card.json").read_text())
    rows = [
        json.loads(line) for name in ("train", "heldout") for line in (made / f"{name}.jsonl").read_text().splitlines()
    ]
    assert card["instructions"] == len(rows) == 13
    assert card["environments"] == len({row["world"] for row in rows}) == 4
    assert sum(card["operations"].values()) == 13 and card["share_checked_with_an_idle_agent"] > 0
    assert len({row["instruction"] for row in rows}) == 13
    worlds = {row["world"]: row["files"] for row in map(json.loads, (made / "worlds.jsonl").read_text().splitlines())}
    assert {*worlds} == {row["world"] for row in rows}
    assert all(row["messages"][0]["role"] in ("system", "user") for row in rows)
    for row in rows:
        origin = Provenance.model_validate(row["provenance"])
        assert origin.generator == generator_name(f"synth.{row['operation']}") and is_accepted(origin.licence)


def test_a_stopped_run_continues_and_ends_with_the_same_files(made: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: ShardFinished) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        produce(PLAN, tmp_path, workers=1, listener=stop)
    assert len(list((tmp_path / "shards").glob("*.jsonl"))) >= 1
    assert not (tmp_path / "card.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.jsonl")}
    later: list[ShardFinished] = []
    produce(PLAN, tmp_path, workers=1, listener=later.append)
    assert len(later) == 2 - len(kept) and all((one.finished, one.left_s) == (2, 0.0) for one in later)
    assert all(path.stat().st_mtime_ns == modified for path, modified in kept.items())
    assert contents(tmp_path) == contents(made)


def test_a_folder_of_another_run_is_refused(made: Path) -> None:
    with pytest.raises(SynthError, match=r"holds another run: .*'seed': 3.* not .*'seed': 4.*; choose another --out"):
        produce(replace(PLAN, seed=4), made)
    with pytest.raises(SynthError, match="--environments 0 --instructions 5: both must be at least 1"):
        Plan(0, 5)


def test_a_full_disk_says_so_and_loses_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    write = module._write

    def full(path: Path, lines: Any) -> None:
        if path.name == "train.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, lines)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(
        SynthError, match=r"the disk of .* is full; free some space and repeat the command: it continues"
    ):
        produce(PLAN, tmp_path, workers=1)
    monkeypatch.undo()
    produce(PLAN, tmp_path, workers=1)
    assert contents(tmp_path) == contents(made)


def test_the_command_makes_instructions_and_says_what_is_missing(made: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    asked = ["synth", "--environments", "4", "--instructions", "13", "--seed", "3", "--env", "unsafe-local"]
    for missing in (["synth", "--environments", "4"], ["synth", "--seed", "1"]):
        refused = runner.invoke(app, missing)
        assert refused.exit_code == 2 and "give --environments, --instructions and --out" in plain(refused.output)
    other = runner.invoke(app, [*asked, "--out", str(made)])  # its shards hold other worlds
    assert other.exit_code != 0 and "holds another run" in plain(other.output)
    done = runner.invoke(app, [*asked, "--out", str(tmp_path), "-n", "1"])
    assert done.exit_code == 0, done.output
    assert "13 instructions over 4 worlds" in plain(done.output)


def plain(output: str) -> str:
    return " ".join(output.replace("│", " ").split())


def solvable() -> SynthTask:
    return next(filter(None, (OPERATIONS["read_setting"].sample(world, 0, "train") for world in range(9))))


@pytest.mark.anyio
async def test_a_verifier_that_rejects_the_oracle_or_accepts_an_idle_agent_is_an_error() -> None:
    synth = solvable()
    assert synth.task.verifier is not None
    async with OracleSandbox("unsafe-local") as sandbox:
        _, answer = await sandbox.solve(synth, thinking="auto")
        assert answer
        await sandbox.check_idle(synth)
        for command, problem in (("false", "its verifier rejects"), ("true", "accepts an agent that did nothing")):
            verifier = synth.task.verifier.model_copy(update={"command": command})
            broken = replace(synth, task=synth.task.model_copy(update={"verifier": verifier}))
            with pytest.raises(OracleError, match=problem):
                await (sandbox.solve(broken, thinking="auto") if command == "false" else sandbox.check_idle(broken))


@pytest.mark.anyio
async def test_a_task_that_fails_its_check_is_left_out_and_the_card_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = list(module.draw_tasks(PLAN, 0))[:2]
    assert bad[0].task.verifier is not None
    verifier = bad[0].task.verifier.model_copy(update={"command": "false"})
    broken = replace(bad[0], task=bad[0].task.model_copy(update={"verifier": verifier})), bad[1]
    monkeypatch.setattr(module, "draw_tasks", lambda plan, shard: [broken, good])
    (tmp_path / "shards").mkdir()
    assert await module._checked(PLAN, 0, tmp_path / "shards") == 2
    card = json.loads(module._finish(PLAN, tmp_path, tmp_path / "shards", seconds=1.0).read_text())
    assert (card["drawn"], card["instructions"]) == (2, 1)
    (reason,) = card["refused"]
    assert reason.startswith(f"{broken[0].task.id}: answered ") and "its verifier rejects" in reason


@pytest.mark.anyio
async def test_a_task_sees_nothing_of_the_one_before_it() -> None:
    changes = [
        OPERATIONS[name].sample(world, 0, "train") for world in range(6) for name in ("create_file", "move_file")
    ]
    async with OracleSandbox("unsafe-local") as sandbox:
        for synth in filter(None, changes):
            await sandbox.solve(synth, thinking="never")
            await sandbox.check_idle(synth)


def test_near_duplicates_and_frequent_forms_are_left_out() -> None:
    def row(instruction: str, world: int = 0, form: str = "") -> dict[str, Any]:
        return {"instruction": instruction, "world": world, "form": form or instruction}

    words = [f"word{number}" for number in range(40)]
    long = " ".join(words)
    near, far = " ".join([*words[:-1], "other"]), " ".join(["a", "b", "c", "d", *words[:20]])
    rows = [row(long), row(near), row(far), row(near, world=1), row("x"), row("x"), row("y")]
    assert [(one["instruction"], one["world"]) for one in distinct(rows, limit=9)] == [
        *((long, 0), (far, 0), (near, 1), ("x", 0), ("y", 0))
    ]
    same = [row(f"Read {letter}.", form="Read N.") for letter in "abcdef"]
    assert len(list(distinct(same, limit=4))) == 4


def test_no_sandbox_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(SandboxUnavailableError, match="docker"):
        produce(replace(PLAN, backend="docker"), tmp_path, workers=1)
    assert not (tmp_path / "card.json").exists()


def test_the_recorded_run_is_as_large_as_the_readme_says() -> None:
    evals = Path(__file__).parents[3] / "evals"
    card, text = json.loads((evals / "results" / "synth.json").read_text()), (evals / "README.md").read_text()
    assert card["environments"] >= 1800 and card["instructions"] >= 85_000 and card["largest_share_of_a_form"] <= 0.001
    assert f"{card['instructions']:,} instructions over {card['environments']:,} worlds" in text
    assert f"It drew {card['drawn']:,} tasks and left out four" in text and len(card["refused"]) == 4
