"""Common mistakes (wrong names, other tools' options and files, unusual terminals) each give one error message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing

from agentkit.cli import app
from agentkit.cli.ending import ExitCode
from agentkit.cli.options import parse_bytes
from agentkit.cli.terminal import spell
from agentkit_environments import available_backends
from agentkit_evals.errors import SuiteError
from agentkit_evals.record import RunDirectory
from agentkit_evals.suite import load_operations, load_suite

DOCKER = available_backends()["docker"]
TASK = "id: {id}\ninstruction: Say hello.\nverifier: {{command: 'test -e made'}}\nsolution: {{command: touch made}}\n"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


def agentkit(*arguments: str, code: int) -> str:
    result = typer.testing.CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", ""], "it is empty; give a task file or an instruction"),
        (["run", " \n"], "it is empty"),
        (["run", "a\0b"], "it is not UTF-8 text"),
        (["run", "a\udcff"], "it is not UTF-8 text"),
        (
            ["run", "Hi", "-m", "gpt-4o"],
            'no model "gpt-4o": a model behind an API is named with its provider: `openai:',
        ),
        (["demo", "-m", "claude-sonnet-4"], "`anthropic:claude-sonnet-4`"),
        (["run", "Hi", "-m", "vllm:toy"], "there is no provider 'vllm', only openai, anthropic, deepseek"),
        (["run", "Hi", "-m", "openai:"], "give the model's name after openai:"),
        (["chat", "-m", "deepseek-ai/DeepSeek-V4-Flash"], "agentkit does not download models"),
        (["run", "Hi", "-m", "good"], "safetensors files, or a model behind an API as openai:MODEL, anthropic:MODEL"),
        (["run", "Hi", "-m", "tinny"], "it is neither a packaged model nor an existing folder. Available: tiny"),
        (["run", "Hi", "-m", "file.txt"], "file.txt is a file; give the folder"),
        (["run", "Hi", "--base-url", "http://localhost:8000/v1"], "tiny runs in this process; name a model behind the"),
        (["eval", "synth", "--api-key", "x"], "keys come from the environment: set OPENAI_API_KEY"),
        (["run", "Hi", "--provider", "openai"], "give the provider with the model"),
        (["run", "Hi", "-m", "openai:toy", "--device", "cuda"], "openai:toy runs behind an API; leave it out"),
        (["run", "Hi", "-m", "openai:toy", "--devices", "2"], "openai:toy runs behind an API; leave it out"),
        (["run", "Hi", "--devices", "0"], "'--devices': Input should be greater than or equal to 1"),
        (["run", "Hi", "--devices", "9"], "devices=9 is more than the 8 experts of this model"),
        (["run", "Hi", "--threads", "0"], "'--threads': Input should be greater than or equal to 1"),
        (["chat", "-m", "openai:toy", "--threads", "2"], "openai:toy runs behind an API; leave it out"),
        (
            ["run", "Hi", "--expert-cache-bytes", "much"],
            '"much" is not a size; give bytes, or a number with a unit such',
        ),
        (["run", "Hi", "--expert-cache-bytes", "0"], '"0" is not a whole number of bytes of at least 1'),
        (["run", "Hi", "--expert-cache-bytes", "1GiB"], "expert_cache_bytes needs experts that stay packed"),
        (["run", "Hi", "--kv-cache-dtype", "fp4"], "'fp4' is not one of 'auto', 'fp8'"),
        (["chat", "-m", "openai:toy", "--kv-cache-dtype", "fp8"], "openai:toy runs behind an API; leave it out"),
        (["eval", "synth", "-m", "openai:toy", "--expert-cache-bytes", "1GiB"], "openai:toy runs behind an API"),
        (["run", "Hi", "--device", "tpu"], 'device must be "cpu", "cuda" or "cuda:N"'),
        (["run", "Hi", "--temperature", "-1"], "'--temperature': Input should be greater than or equal to 0"),
        (["run", "Hi", "--temperature", "nan"], "'--temperature': Input should be greater than or equal to 0"),
        (["run", "Hi", "--timeout", "nan"], "'--timeout': Input should be less than or equal to"),
        (["run", "Hi", "--timeout", "inf"], "'--timeout': Input should be less than or equal to"),
        (["run", "Hi", "--timeout", "1e8"], "'--timeout': Input should be less than or equal to"),
        (["run", "Hi", "--max-turns", "1" + 20 * "0"], "'--max-turns': Input should be less than or equal to"),
        (["chat", "--max-tokens", "1" + 20 * "0"], "'--max-tokens': Input should be less than or equal to"),
        (["run", "Hi", "--top-p", "0"], "0 leaves no token"),
        (["run", "Hi", "--top-k", "0"], "'--top-k': Input should be greater than or equal to 1"),
        (["run", "Hi", "--min-p", "2"], "'--min-p': Input should be less than or equal to 1"),
        (["run", "Hi", "--grammar", "on", "--no-grammar"], "--no-grammar contradicts --grammar"),
        (["run", "Hi", "--apply"], "also give --workdir"),
        (["run", "Hi", "--trajectory", "file.txt"], "file.txt already exists"),
        (["run", "harbor/one"], "harbor/one/environment/Dockerfile is missing"),
        (["run", "harbor/one/task.toml"], "give the folder of a Harbor task: harbor/one"),
        (["run", "harbor"], "`agentkit eval harbor` runs every task in a folder"),
        (["eval", "harbor"], "harbor/one/environment/Dockerfile is missing"),
        (["eval", "harbor/one/task.toml"], "give the folder of a Harbor task: harbor/one"),
        (["check", "harbor"], "harbor/one/environment/Dockerfile is missing"),
        (["eval", "data.jsonl"], "data.jsonl has no rows; expected one JSON object per line"),
        (["eval", "data.parquet"], "a data set must be JSON Lines, not .parquet; export it as JSONL"),
        (["run", "data.jsonl"], "a data set has many tasks; `agentkit eval` runs them"),
        (["run", "calls.yaml"], "calls.yaml is scored by calls or tests; run it with `agentkit eval calls.yaml`"),
        (["eval", "synth", "--out", "harbor"], "harbor already exists; a run is never overwritten"),
        (["eval", "good.yaml", "--tasks-per-operation", "3"], "good.yaml is not generated"),
        (["check", "empty"], "empty has no tasks; add .yaml task files"),
        (["check", "nowhere"], "nowhere: cannot be read"),
        (["check", "nothing.yaml"], "nothing.yaml:1: expected keys and values"),
        (["view", "nowhere"], "nowhere does not exist; give a run, a folder of runs"),
        (["view", "good.yaml"], "good.yaml is not a trajectory"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_each_mistake_has_a_remedy(arguments: list[str], message: str) -> None:
    for folder in ("harbor/one", "empty"):
        Path(folder).mkdir(parents=True)
    Path("harbor/one/task.toml").touch()
    Path("file.txt").touch()
    Path("data.jsonl").touch()
    Path("nothing.yaml").touch()
    Path("data.parquet").touch()
    Path("calls.yaml").write_text("id: c\ninstruction: Call.\ntools: [bash]\nverifier: {calls: any}\n")
    Path("good.yaml").write_text(TASK.format(id="good"))
    assert message in agentkit(*arguments, code=ExitCode.USAGE)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4GiB", 4 << 30),
        ("1.5 gib", 3 << 29),
        ("2GB", 2 * 10**9),
        ("7b", 7),
        (" 1 KiB ", 1024),
    ],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "0.5", "1 PiB", "4Gi", "nan", "1,5GiB", "0.1KiB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a"):
        parse_bytes(text)


def test_check_reports_every_file() -> None:
    for name, text in {
        "a-good": TASK.format(id="good"),
        "b-colon": "id: x\ninstruction: Do it: now\n",
        "c-twice": TASK.format(id="good"),
        "d-no-verifier": "id: y\ninstruction: Do it.\n",
        "e-no-solution": "id: z\ninstruction: Do it.\nverifier: {command: 'true'}\n",
        "f-unsound": TASK.format(id="unsound").replace("test -e", "true ||"),
    }.items():
        Path(f"{name}.yaml").write_text(text)
    result = typer.testing.CliRunner().invoke(app, ["check", ".", "--env", "unsafe-local", "--json"])
    assert result.exit_code == ExitCode.USAGE, result.output
    found = {Path(name).stem: problems for name, problems in json.loads(result.stdout).items()}
    assert found["good"] == []
    assert "b-colon.yaml:2" in found["b-colon"][0]
    assert "is already used in" in found["c-twice"][0]
    assert "has no verifier" in found["d-no-verifier"][0]
    assert "has no solution" in found["z"][0]
    assert "doing nothing scores 1" in found["unsound"][0]


@pytest.mark.skipif(DOCKER is not None, reason=f"no Docker: {DOCKER}")
def test_a_missing_image_spoils_its_own_task_only() -> None:
    Path("a.yaml").write_text(TASK.format(id="a") + "environment: {image: 'localhost:9/none:1'}\n")
    Path("b.yaml").write_text(TASK.format(id="b") + "agent: {max_turns: 1}\n")
    assert "✓ b" in agentkit("check", ".", code=ExitCode.UNSOLVED)
    output = agentkit("eval", ".", "--out", "run", code=ExitCode.INFRASTRUCTURE)
    assert "localhost:9/none:1 is missing and could not be pulled" in output
    first, second = sorted(RunDirectory.open("run").trials, key=lambda trial: trial.task)
    assert (first.reward, second.reward) == (None, 0)


def test_limits_on_generated_tasks_are_exact() -> None:
    for spec, operations in (("synth:count_lines,fix_bug,compute", 3), ("synth", len(load_operations()))):
        for limit in (1, 5, 40):
            suite = load_suite(spec, seed=3, limit=limit)
            assert len(suite.cases) == limit
            counts = [sum(case.family == family for case in suite.cases) for family in {c.family for c in suite.cases}]
            assert len(counts) == min(limit, operations) and max(counts) - min(counts) <= 1
        assert len(load_suite(spec, per_operation=2).cases) == 2 * operations
        assert len(load_suite(spec).cases) == 3 * operations
    assert len(load_suite("synth:fix_bug", per_operation=5, limit=2).cases) == 2
    Path("a.yaml").write_text(TASK.format(id="a"))
    with pytest.raises(SuiteError, match="not generated"):
        load_suite("a.yaml", per_operation=2)


@pytest.mark.parametrize(
    ("environment", "redirect", "code"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, "", 0),
        ({"PYTHONIOENCODING": "ascii"}, "", 0),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "", 0),
        ({}, ">&-", 0),
        ({}, "2>&-", 0),
        ({}, "> /dev/full", 3),
    ],
    ids=["latin-1", "ascii", "C", "no stdout", "no stderr", "full"],
)
def test_no_encoding_or_closed_stream_causes_a_traceback(environment: dict[str, str], redirect: str, code: int) -> None:
    Path("ünï.yaml").write_text(TASK.format(id="a"))
    command = f"{sys.executable} -m agentkit check ünï.yaml --env unsafe-local {redirect}"
    done = subprocess.run(["bash", "-c", command], env={**os.environ, **environment}, capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert redirect or b"1/1 tasks are sound" in done.stdout
    # Typer writes UTF-8 if Python chose ASCII.
    assert redirect or b"+ a" in done.stdout or "✓ a".encode() in done.stdout


def test_a_defect_is_not_an_unsolved_task() -> None:
    code = "import agentkit.cli.commands as c; c.app = lambda **_: 1 / 0; from agentkit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.INFRASTRUCTURE and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_closed_pipe_prints_no_error() -> None:
    command = f"{sys.executable} -m agentkit doctor | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.strip() in ("141", "0", "3")


def test_characters_missing_from_an_encoding_are_replaced() -> None:
    def spelled(text: str) -> str:
        return spell(UnicodeEncodeError("ascii", text, 0, len(text), "no"))[0]

    assert spelled("✓ ✗ → ─│╭⠋") == "+ x -> -|+*"
    assert spelled("é\udcff日") == "???"
