"""A tiny package from its source distribution to sound tasks in three formats; and what can stop it on the way."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import typer.testing

from agentkit.cli import app
from agentkit.task import Task, TestsConfig
from agentkit_environments import SandboxUnavailableError, available_backends
from agentkit_evals.errors import FailingTestsError, OutputError, PackageError, RunDirectoryError, UnknownPackageError
from agentkit_evals.harbor import read_task_directory
from agentkit_evals.provenance import Provenance
from agentkit_evals.suite import load_suite
from agentkit_evals.synth.bugs import EXPORT_FORMATS, PackageProgress, PackageSpec, export, generate, make_bugs
from agentkit_evals.synth.bugs.find import Source, Tried, faults
from agentkit_evals.synth.bugs.journal import Journal
from agentkit_evals.synth.bugs.package import read_package

MakeSdist = Callable[..., Path]

PROCESS = available_backends()["process"]
SPEC = PackageSpec.parse("calc==1.0")


@pytest.fixture
def make(index: Path) -> Callable[..., dict[str, Any]]:
    """Function that makes bugs in packages of the index, without isolation by default."""

    def run(out: Path, *specs: PackageSpec | Path, **options: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"limit": 3, "seed": 1, "backend": "unsafe-local", "index": index, **options}
        return anyio.run(partial(make_bugs, specs or (SPEC,), out, **settings))

    return run


def journal_of(out: Path) -> list[dict[str, Any]]:
    (file,) = (out / "packages").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_recorded_run_is_as_large_as_the_readme_says() -> None:
    evals = Path(__file__).parents[4] / "evals"
    card, text = json.loads((evals / "results" / "bugs.json").read_text()), (evals / "README.md").read_text()
    assert card["bugs"] >= 300 and card["packages_with_bugs"] >= 20
    said = f"kept {card['bugs']} bugs in {card['packages_with_bugs']} packages, of {card['tried']} faults"
    assert said in " ".join(text.split())
    for package in card["packages"]:
        assert package["passed_both_checks"] == package["kept"]
    log = (evals / "results" / "bugs.log").read_text()
    for backend in ("process", "docker"):
        _, _, checked = log.partition(f"$ agentkit check bugs/tasks/ --env {backend}\n")
        lines = checked.partition("\n$ ")[0].splitlines()
        sound = [line.removeprefix("✓ ") for line in lines if line.startswith("✓ ")]
        assert len({*sound}) == len(sound) == card["bugs"] and f"{len(sound)}/{len(sound)} tasks are sound" in lines


@pytest.mark.sandbox
@pytest.mark.skipif(PROCESS is not None, reason=f"no process sandbox: {PROCESS}")
@pytest.mark.parametrize("style", ["unittest", "pytest"])
def test_a_package_becomes_sound_tasks(
    make_sdist: MakeSdist, index: Path, tmp_path: Path, style: str, pytests: str
) -> None:
    make_sdist({"tests/test_calc.py": pytests} if style == "pytest" else {})
    out, runner = tmp_path / "out", typer.testing.CliRunner()
    done = runner.invoke(
        app, ["synth", "bugs", "--package", "calc==1.0", "--index", str(index), "--out", str(out), "--limit", "1"]
    )
    assert done.exit_code == 0, done.output
    card = json.loads((out / "card.json").read_text())
    (package,) = card["packages"]
    assert (card["bugs"], package["runner"], package["licence"], card["refused"]) == (1, style, "MIT", [])
    assert package["share_kept"] == round(1 / package["tried"], 3)

    checked = runner.invoke(app, ["check", str(out / "tasks"), "--env", "process"])
    assert (checked.exit_code, checked.output.splitlines()[-1]) == (0, "1/1 tasks are sound"), checked.output


def test_tasks_start_from_the_fault_without_the_tests_that_fail(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path
) -> None:
    path = make_sdist()
    out = tmp_path / "out"
    make(out)
    bugs = [entry["bug"] for entry in journal_of(out)[1:] if entry["bug"]]
    cases = load_suite(str(out / "tasks")).cases
    assert [case.task.id for case in cases] == [bug["id"] for bug in bugs] and len(cases) == 3
    for case, bug in zip(cases, bugs, strict=True):
        tests = case.task.verifier
        assert isinstance(tests, TestsConfig) and case.family == "bugs/calc"
        assert tests.fail_to_pass and not {*tests.fail_to_pass} & {*tests.pass_to_pass}
        assert len(tests.fail_to_pass) + len(tests.pass_to_pass) == 6
        assert bug["issue"] in case.task.instruction and "calc.py" not in bug["issue"]
        origin = Provenance.model_validate(case.task.metadata["provenance"])
        assert (origin.package, origin.version, origin.licence) == ("calc", "1.0", "MIT")
        assert origin.sha256 == read_package(path).sha256 and origin.seed == 1
        started = anyio.run(_start_of, case.task)
        assert started["commit"] == bug["base_commit"]
        assert started["files"] == {".git", "PKG-INFO", "calc.py", "tests"}
        assert not any(f"def {name.split()[0]}(" in started["tests"] for name in tests.fail_to_pass)
        assert all(f"def {name.split()[0]}(" in started["tests"] for name in tests.pass_to_pass)


async def _start_of(task: Task) -> dict[str, Any]:
    from agentkit_environments import open_environment

    async with await open_environment(task.environment.spec(), backend="unsafe-local") as environment:
        await task.prepare(environment)
        commit = (await environment.exec("git rev-parse HEAD && git status --porcelain")).stdout.strip()
        files = (await environment.exec("ls -A")).stdout.split()
        tests = (await environment.read_file("tests/test_calc.py")).decode()
    return {"commit": commit, "files": {*files}, "tests": tests}


def test_swebench_rows_and_harbor_folders_score_as_the_tasks_do(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path, pytests: str
) -> None:
    make_sdist({"tests/test_calc.py": pytests})
    out = tmp_path / "out"
    make(out, limit=1)
    rows = [json.loads(line) for line in (out / "swebench" / "rows.jsonl").read_text().splitlines()]
    cases = load_suite(str(out / "swebench" / "rows.jsonl")).cases
    assert [row["instance_id"] for row in rows] == [case.task.id for case in cases] and len(rows) == 1
    for row, case in zip(rows, cases, strict=True):
        assert case.task.environment.image == row["image"] and case.task.environment.workdir == "/testbed"
        assert isinstance(case.task.verifier, TestsConfig)
        assert case.task.verifier.fail_to_pass == row["FAIL_TO_PASS"]
        assert case.task.metadata["provenance"] == row["metadata"]["provenance"]
        folder = out / "harbor" / row["instance_id"]
        settings = tomllib.loads((folder / "task.toml").read_text())
        assert settings["metadata"]["provenance"]["licence"] == "MIT" and settings["schema_version"] == "1.4"
        assert row["problem_statement"] in (folder / "instruction.md").read_text()
        for name in ("Dockerfile", "bug.patch", "source.tar.gz", "tools.tar.gz"):
            image = out / "swebench" / "images" / row["instance_id"] / name
            assert image.read_bytes() == (folder / "environment" / name).read_bytes()
        read = read_task_directory(folder)
        assert read.instruction == (folder / "instruction.md").read_text() and read.solution is not None
        assert read.metadata["provenance"]["licence"] == "MIT"
        container = _Container(tmp_path / f"container-{row['instance_id']}", folder)
        assert container.git("rev-parse", "HEAD") == row["base_commit"]
        assert container.score() == "0"
        container.shell((folder / "solution" / "solve.sh").read_text())
        assert container.score() == "1"
        container.git("checkout", "-q", ".")  # the bug again, with tests that prove nothing
        (container.testbed / "tests" / "test_calc.py").write_text("def test_total(): pass\n")
        assert container.score() == "0"
        log = container.shell(row["eval_script"])
        assert "FAILED " + row["FAIL_TO_PASS"][0] in log and ">>>>> End Test Output" in log


class _Container:
    """A folder that stands for the image of a Harbor task: the same steps, with other paths."""

    def __init__(self, root: Path, task: Path) -> None:
        self.root, self.task, self.testbed = root, task, root / "testbed"
        for name in ("testbed", "tools", "logs", "tmp"):
            (root / name).mkdir(parents=True)
        for line in (task / "environment" / "Dockerfile").read_text().splitlines():
            word, _, rest = line.partition(" ")
            if word == "ADD":
                archive, target = rest.split()
                place = self.testbed if target == "/testbed/" else root / "tools"
                subprocess.run(["tar", "-xzf", task / "environment" / archive, "-C", place], check=True)
            elif word == "COPY":
                (root / "tmp" / "bug.patch").write_bytes((task / "environment" / "bug.patch").read_bytes())
            elif word == "RUN" and "git apply" in rest:
                self.shell(f"set -e; {rest}")

    def shell(self, script: str) -> str:
        places = {
            "/opt/agentkit-tools": self.root / "tools",
            "/testbed": self.testbed,
            "/logs": self.root / "logs",
            "/tmp": self.root / "tmp",
            "/tests/test": self.task / "tests" / "test",
        }
        script = re.sub("|".join(f"(?<![a-z]){place}" for place in places), lambda match: str(places[match[0]]), script)
        done = subprocess.run(["bash"], input=script, cwd=self.testbed, capture_output=True, text=True, env=self.env)
        return done.stdout + done.stderr

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.root / "tmp")}

    def git(self, *arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=self.testbed, capture_output=True, text=True, check=True, env=self.env
        ).stdout.strip()

    def score(self) -> str:
        reward = self.root / "logs" / "verifier" / "reward.txt"
        reward.unlink(missing_ok=True)
        said = self.shell((self.task / "tests" / "test.sh").read_text())
        assert reward.exists(), said
        return reward.read_text().strip()


def test_a_run_continues_where_it_stopped_and_repeats_nothing(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path
) -> None:
    make_sdist()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(whole)
    make(parts, limit=1)
    (file,) = (parts / "packages").glob("*.jsonl")
    first = file.read_text()
    with file.open("a") as journal:
        journal.write('{"number": 1, "kin')  # torn by a crash
    card = make(parts, timeout_s=0)  # nothing more is tried, and what was found is exported
    assert (card["bugs"], len(journal_of(parts))) == (1, len(first.splitlines()))
    card = make(parts)
    assert file.read_text().startswith(first) and card["packages"][0]["resumed_from"] == len(first.splitlines()) - 1

    def findings(out: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in entry.items() if key != "seconds"} for entry in journal_of(out)]

    assert findings(parts) == findings(whole)
    for name in ("tasks/calc-1.0", "swebench"):
        ours = {path.name: path.read_bytes() for path in (whole / name).iterdir() if path.is_file()}
        assert ours == {path.name: path.read_bytes() for path in (parts / name).iterdir() if path.is_file()}


def test_another_seed_or_another_file_does_not_mix_with_a_run(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path
) -> None:
    make_sdist()
    make(tmp_path / "out", limit=1)
    with pytest.raises(ExceptionGroup) as caught:
        make(tmp_path / "out", limit=1, seed=2)
    assert caught.group_contains(RunDirectoryError, match="was written with other settings")


@contextmanager
def full_disk(room_bytes: int) -> Iterator[None]:
    """Let no file grow beyond `room_bytes`, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_loses_no_entry(tmp_path: Path) -> None:
    header = Source(
        generator="g", name="calc", version="1", licence=None, sha256="0" * 64, previous=None, seed=0, runner="pytest"
    )

    def entry(number: int) -> Tried:
        return Tried(number=number, kind="k", path="p" * 200, line=1, outcome="unnoticed", seconds=0.0)

    path = tmp_path / "packages" / "calc.jsonl"
    journal = Journal(path, header, Tried)
    journal.append(entry(0))
    with full_disk(path.stat().st_size + 100), pytest.raises(OutputError, match="1 entries are kept; make room"):
        journal.append(entry(1))
    assert not path.read_bytes().endswith(b"\n")  # a part of the line is there
    again = Journal(path, header, Tried)
    assert [each.number for each in again.entries] == [0]
    again.append(entry(1))
    assert [each.number for each in Journal(path, header, Tried).entries] == [0, 1]


def test_a_full_disk_during_the_export_keeps_what_was_found(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sdist()
    out = tmp_path / "out"

    def full(*arguments: Any) -> None:
        with full_disk(2000):
            export.export(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "export", full)
        with pytest.raises(ExceptionGroup) as caught:
            make(out, limit=1)
    assert caught.group_contains(OutputError, match="cannot be written: File too large; make room, then run again")
    assert not [*out.rglob("*.partial")]
    tried = len(journal_of(out))
    card = make(out, limit=1)
    assert (card["bugs"], len(journal_of(out))) == (1, tried)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (
            "import unittest\n\nclass T(unittest.TestCase):\n    def test_x(self):\n        self.fail('no')\n",
            "1 of 1 tests",
        ),
        ("import missing_module\n\ndef test_x(): pass\n", "missing_module"),
        ("x = 'test'\n", "0 of 0 tests"),
    ],
)
def test_a_package_whose_tests_fail_is_refused(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path, tests: str, message: str
) -> None:
    make_sdist({"tests/test_calc.py": tests})
    with pytest.raises(FailingTestsError, match=message):
        make(tmp_path / "out")


def test_tests_that_do_not_pass_every_time_never_score(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path, pytests: str
) -> None:
    flaky = "\n\ndef test_flaky():\n    assert hash('a') == hash('a') and {'a', 'b', 'c'}.pop() == 'a'\n"
    more = "\n\n@pytest.mark.parametrize('n', range(20))\ndef test_many(n):\n    assert n >= 0\n"
    make_sdist({"tests/test_calc.py": pytests + flaky + more})
    make(tmp_path / "out", limit=1)
    (case,) = load_suite(str(tmp_path / "out" / "tasks")).cases
    assert isinstance(case.task.verifier, TestsConfig)
    assert not any("flaky" in name for name in (*case.task.verifier.fail_to_pass, *case.task.verifier.pass_to_pass))


def test_a_package_that_is_refused_does_not_stop_the_others(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path
) -> None:
    make_sdist()
    reports: list[PackageProgress] = []
    unknown = PackageSpec.parse("nothing==1")
    card = make(tmp_path / "out", unknown, SPEC, limit=1, report=reports.append)
    assert card["bugs"] == 1 and [each["package"] for each in card["refused"]] == ["nothing==1"]
    assert any(each.problem and "no source distribution of nothing==1" in each.problem for each in reports)
    reports.clear()
    with pytest.raises(UnknownPackageError):
        make(tmp_path / "out", unknown, report=reports.append)
    assert not reports, "the error has the reason"
    with pytest.raises(PackageError, match="none of the 2 packages can be used"):
        make(tmp_path / "out", unknown, PackageSpec.parse("none==2"), report=reports.append)
    assert sorted(each.package for each in reports) == ["none==2", "nothing==1"]


def test_no_sandbox_is_an_error_and_never_less_isolation(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sdist()
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(ExceptionGroup) as caught:
        make(tmp_path / "out", backend="docker")
    assert caught.group_contains(SandboxUnavailableError)
    runner = typer.testing.CliRunner()
    arguments = ["--index", str(tmp_path / "index"), "--out", str(tmp_path / "o"), "--package", "calc==1.0"]
    done = runner.invoke(app, ["synth", "bugs", *arguments, "--env", "docker"])
    assert done.exit_code == 3 and "Error:" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no package; give --package NAME==VERSION"),
        (["--package", "calc"], "is not a package; expected NAME==VERSION"),
        (["--package", "calc==1", "--formats", "tasks,xml"], "unknown formats xml; there are tasks, swebench, harbor"),
        (["--packages", "missing.txt"], "missing.txt cannot be read"),
        (["--source", "missing"], "missing is not a folder"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = typer.testing.CliRunner().invoke(app, ["synth", "bugs", "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split()), done.output


def test_the_extra_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "agentkit_evals.synth.bugs", None)
    done = typer.testing.CliRunner().invoke(app, ["synth", "bugs", "--out", str(tmp_path), "--package", "calc==1"])
    assert done.exit_code == 2 and "pip install 'agentkit-harness[synth]'" in done.output


def test_a_folder_and_hunks_between_releases(
    make: Callable[..., dict[str, Any]], make_sdist: MakeSdist, tmp_path: Path
) -> None:
    new = read_package(make_sdist(version="1.1"))
    old_text = new.files["calc.py"].decode().replace("if price < 0:", "if price < -9:").replace("sorted(", "list(")
    old = read_package(make_sdist({"calc.py": old_text}, version="1.0"))
    hunks = [fault for _, fault in faults(new, old, seed=0) if fault.kind == "reversed-hunk"]
    assert {fault.function for fault in hunks} == {"total", "cheapest"}
    card = make(tmp_path / "out", PackageSpec.parse("calc==1.0..1.1"), limit=2)
    assert card["kinds"] == {"reversed-hunk": 2} and card["packages"][0]["previous"] == "1.0"

    for name, content in new.files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    assert make(tmp_path / "local", tmp_path / "tree", limit=1, formats=EXPORT_FORMATS[:1])["bugs"] == 1
    assert {path.name for path in (tmp_path / "local").iterdir()} == {"card.json", "packages", "tasks"}
