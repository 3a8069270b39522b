"""The hand-written suites and the numbers measured on them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from agentkit.models.scripted import Policy
from agentkit.task import CallsConfig, Task, ToolConfig
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_evals.baselines import BASELINES
from agentkit_evals.contamination import phrasing, text_of
from agentkit_evals.everyday import main, pair_scores, summary
from agentkit_evals.record import RunDirectory
from agentkit_evals.selfcheck import selfcheck
from agentkit_evals.suite import HAND_WRITTEN, Suite, load_suite

ROOT = Path(__file__).parents[2]
MakeTask = Callable[..., Task]
Evaluate = Callable[..., RunDirectory]


@pytest.fixture(scope="module")
def suites() -> dict[str, Suite]:
    return {name: load_suite(name) for name in HAND_WRITTEN}


def test_the_suites_have_distinct_ids_and_enough_tasks_of_each_kind(suites: dict[str, Suite]) -> None:
    tasks = [case.task.id for suite in suites.values() for case in suite.cases]
    assert len(tasks) == len(set(tasks))
    kinds = Counter(case.family for case in suites["everyday"].cases)
    assert len(suites["everyday"].cases) >= 240 and len(kinds) == 16 and min(kinds.values()) >= 12
    assert min(Counter(case.family for case in suites["readme"].cases).values()) >= 11


def test_the_readme_says_how_large_the_suites_are(suites: dict[str, Suite]) -> None:
    table = (ROOT / "evals" / "README.md").read_text(encoding="utf-8")
    claimed = {name: int(count) for name, count in re.findall(r"^\| `([\w-]+)` \| (\d+) ", table, re.M)}
    pairs = {case.task.metadata["pair"] for case in suites["impossible"].cases}
    assert claimed == {name: len(suite.cases) for name, suite in suites.items()} | {"impossible": len(pairs)}


def test_sentences_vary(suites: dict[str, Suite]) -> None:
    texts = [text_of(case.task) for case in suites["everyday"].cases]
    frames = Counter(phrasing(text.instruction, text.paths) for text in texts)
    assert frames.most_common(1)[0][1] <= 3
    openings = Counter(" ".join(text.instruction.split()[:4]) for text in texts)
    assert openings.most_common(1)[0][1] <= 6, openings.most_common(3)


def test_every_impossible_request_has_a_twin(suites: dict[str, Suite]) -> None:
    pairs: dict[str, list[bool]] = {}
    for case in suites["impossible"].cases:
        pairs.setdefault(case.task.metadata["pair"], []).append(case.task.metadata["solvable"])
    assert len(pairs) >= 40 and set(map(tuple, pairs.values())) == {(False, True)}


def test_the_readme_suite_has_the_prompts_of_the_readmes(suites: dict[str, Suite]) -> None:
    pattern = re.compile(
        r"""(?:run_sync\(|\.run\(|\.stream\(|agentkit run )["'](?P<text>[^"'\n]+)["']|^instruction: (?P<yaml>.+)$""",
        re.M,
    )
    prompts = {
        match["text"] or re.sub(r"\s+#.*", "", match["yaml"])
        for path in ("README.md", "agentkit/README.md", "evals/README.md")
        for match in pattern.finditer((ROOT / path).read_text(encoding="utf-8"))
    }
    assert len(prompts) >= 8
    assert prompts - {case.task.instruction for case in suites["readme"].cases} == set()


def test_the_tools_suite_has_many_schemas_with_all_types(suites: dict[str, Suite]) -> None:
    cases = suites["own-tools"].cases
    tools = {tool.name: tool for case in cases for tool in case.task.tools if isinstance(tool, ToolConfig)}
    verifiers = [case.task.verifier for case in cases]
    assert len(cases) >= 200 and len(tools) >= 100
    assert all(isinstance(each, CallsConfig) and len(each.calls) == 1 for each in verifiers)
    assert {schema["type"] for tool in tools.values() for schema in tool.parameters["properties"].values()} == {
        *("string", "integer", "number", "boolean", "array", "object")
    }


@pytest.mark.parametrize("name", ["everyday", "impossible"])
def test_a_task_of_each_kind_is_sound(suites: dict[str, Suite], name: str) -> None:
    first = {case.family: case.task for case in suites[name].cases}

    async def check() -> dict[str, list[str]]:
        return {task.id: (await selfcheck(task, backend="unsafe-local")).problems for task in first.values()}

    assert {task: problems for task, problems in anyio.run(check).items() if problems} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_every_task_is_sound(suites: dict[str, Suite], name: str) -> None:
    async def check() -> dict[str, list[str]]:
        tasks = [case.task for case in suites[name].cases]
        return {task.id: (await selfcheck(task, backend="unsafe-local")).problems for task in tasks}

    assert {task: problems for task, problems in anyio.run(check).items() if problems} == {}


def test_a_pair_counts_only_if_both_tasks_are_solved(evaluate: Evaluate, number_task: MakeTask, solves: Policy) -> None:
    idle = BASELINES["do nothing"]
    tasks = {
        name: number_task(name, metadata={"family": name[0], "pair": name[0]})
        for name in ("a1", "a2", "b1", "b2", "c1")
    }
    run = evaluate(
        *((tasks[name], solves) for name in ("a1", "a2", "b1")),
        (tasks["b2"], idle),
        (tasks["c1"], solves),
        (number_task("d"), idle),
        epochs=2,
    )
    assert pair_scores(run) == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    found = summary(run)
    assert found["pairs"]["mean"] == round(2 / 3, 4) and found["pairs"]["n"] == 6
    assert found["kinds"]["b"]["mean"] == 0.5 and found["all"] == {"mean": round(8 / 12, 4), "stderr": 0.2108, "n": 12}
    assert found["solved"][:2] == ["a1.0", "a1.1"] and found["failures"]["model"] == 4
    unscored = tuple(
        trial.model_copy(update={"reward": None, "failure": "infrastructure"}) if trial.trial == "b2.0" else trial
        for trial in run.trials
    )
    assert pair_scores(RunDirectory(run.path, run.lock, unscored)) == [[1.0, 1.0], [0.0], [1.0, 1.0]]
    unfinished = tuple(trial for trial in run.trials if trial.trial != "b2.0")
    assert pair_scores(RunDirectory(run.path, run.lock, unfinished)) == [[1.0, 1.0], [0.0], [1.0, 1.0]]


@pytest.mark.skipif(not (PACKAGED_MODELS["tiny"] / "config.json").is_file(), reason="the packaged model is not trained")
def test_a_measurement_of_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "everyday.json"
    main(["--suites", "own-tools", "--limit", "2", "--out", str(out), "--runs", str(tmp_path / "runs")])
    measured = json.loads(out.read_text())
    assert measured["model"] == "tiny" and measured["suites"]["own-tools"]["all"]["n"] == 2
    assert measured["suites"]["own-tools"]["pairs"] == {"n": 0}
    assert len(list((tmp_path / "runs").glob("*/report.html"))) == 1
    assert "city" in capsys.readouterr().out
