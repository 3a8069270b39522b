"""The report is one complete file that loads nothing and cannot be taken over by a model's output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agentkit import Agent, AssistantTurn, Compaction, ScriptedModel, ToolMessage, tool
from agentkit.models.scripted import Policy
from agentkit.task import Task
from agentkit_engine.chat import Tokenizer
from agentkit_evals.record import RunDirectory
from agentkit_evals.report import render_report, render_trajectory, write_report

MakeTask = Callable[..., Task]
MakeScript = Callable[..., Policy]
Evaluate = Callable[..., RunDirectory]

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 ]]> <img src=https://example.org/x.png onerror=alert(2)>"


@pytest.fixture
def run(evaluate: Evaluate, number_task: MakeTask, script: MakeScript, solves: Policy) -> RunDirectory:
    said = script(
        [("bash", {"command": "printf '%s' \"$0\" > note.txt; exit 3"}), ("list_dir", {"path": HOSTILE})],
        [("submit", {"answer": HOSTILE})],
    )
    looks = script([("list_dir", {})])
    return evaluate(
        (number_task("solved"), solves),
        (number_task("hostile", instruction=f"Say {HOSTILE}", metadata={"family": "other"}), said),
        (number_task("loops", agent={"max_turns": 1}), looks),
        (number_task("broken", environment={"setup": ["exit 1"]}), solves),
        epochs=2,
    )


class Page(HTMLParser):
    """The tags of a page, its visible text, and the text of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text: list[str] = []
        self._inside: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        (self.raw[self._inside] if self._inside else self.text).append(data)


def data_of(page: Page) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(page.raw["script"][0])
    return data


def test_the_report_fetches_nothing(run: RunDirectory) -> None:
    page = Page(render_report(run))
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    addresses = [value for _, attrs in page.tags for name in ("src", "href", "action") if (value := attrs.get(name))]
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"url\(|@import", "".join(page.raw["style"]))
    code = page.raw["script"][1]
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(|innerHTML|insertAdjacentHTML|eval\(", code)


def test_nothing_a_model_writes_becomes_markup(run: RunDirectory) -> None:
    page = Page(render_report(run))
    assert [tag for tag, _ in page.tags].count("script") == 2
    hostile = next(trial for trial in data_of(page)["trials"] if trial["id"] == "hostile.0")
    assert hostile["instruction"] == f"Say {HOSTILE}" and hostile["answer"] == HOSTILE


def test_the_report_holds_every_trial(run: RunDirectory, tokenizer: Tokenizer) -> None:
    page = Page(render_report(run, decode=tokenizer.decode))
    data = data_of(page)
    trials = {trial["id"]: trial for trial in data["trials"]}
    assert list(trials) == [f"{name}.{epoch}" for name in ("broken", "loops", "solved", "hostile") for epoch in (0, 1)]
    assert [trials[f"{name}.0"]["kind"] for name in ("solved", "hostile", "loops", "broken")] == [
        *("solved", "model", "limit", "task")
    ]
    turns = trials["solved.0"]["turns"]
    assert [turn["reasoning"] for turn in turns] == ["This is turn 0.", None]
    assert [(call["name"], call["result"]) for turn in turns for call in turn["calls"]] == [
        ("read_file", "42\n"),
        ("submit", "42"),
    ]
    assert all(0 <= turn["start"] <= turn["generated"] <= turn["end"] for turn in turns)
    assert all(call["start"] <= call["end"] for turn in turns for call in turn["calls"])
    failed = trials["hostile.0"]["turns"][0]["calls"]
    assert [call["failed"] for call in failed] == [True, True] and failed[0]["result"].endswith("[exit code 3]")
    assert trials["loops.0"]["notes"] == ["Limit reached: max_turns."]
    assert trials["broken.0"]["turns"] is None and "setup command" in trials["broken.0"]["error"]
    for trial in run.trials:
        trajectory = run.trajectory(trial)
        if trajectory is not None:
            segments = [segment for turn in trials[trial.trial]["turns"] for segment in turn["segments"]]
            assert [i for _, ids, _ in segments for i in ids] == trajectory.token_ids
            assert all(data["pieces"][str(i)] == tokenizer.decode([i]) for i in trajectory.token_ids)


def test_the_numbers_of_the_report(run: RunDirectory) -> None:
    text = " ".join(" ".join(Page(render_report(run)).text).split())
    assert "2 /6 trials solved" in text
    assert "2 solved 2 model failure 2 limit reached 2 task defect" in text
    assert "mean reward 0.333 ± 0.333 only 6 of 8 trials, 3 of 4 tasks" in text
    assert "pass@2 0.333 at least one epoch; only 3 of 4 tasks" in text
    assert "pass^2 0.333 every epoch; only 3 of 4 tasks" in text
    assert "forced ids 0 " in text
    assert "numbers 0.500 ± 0.500 2/4" in text


def test_the_report_of_an_interrupted_run_says_so(run: RunDirectory) -> None:
    lines = (run.path / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (run.path / "trials.jsonl").write_bytes(b"".join(lines[:3]))
    path = write_report(RunDirectory.open(run.path))
    assert path == run.path / "report.html"
    assert "interrupted: 3 of 8 trials" in path.read_text()
    assert "only 1 of 4 tasks" in " ".join(" ".join(Page(path.read_text()).text).split())


def test_a_run_without_a_single_trial_and_a_damaged_trajectory(run: RunDirectory, tmp_path: Path) -> None:
    next((run.path / "trajectories").glob("solved.0*")).write_text("garbage\n")
    trials = {trial["id"]: trial for trial in data_of(Page(render_report(run)))["trials"]}
    assert "is not a trajectory" in trials["solved.0"]["notes"][0]
    (run.path / "trials.jsonl").unlink()
    assert "interrupted: 0 of 8 trials" in write_report(RunDirectory.open(run.path), tmp_path / "r.html").read_text()


def test_a_trajectory_says_where_it_was_compacted(tokenizer: Tokenizer) -> None:
    @tool
    def page(number: int) -> str:
        """Return a page."""
        return f"{number + 1} " * 400

    def policy(messages: Any, think: bool) -> AssistantTurn:
        number = int(messages[-1].content.split()[0]) if isinstance(messages[-1], ToolMessage) else 0
        return AssistantTurn(content="Done.") if number == 4 else AssistantTurn(calls=[("page", {"number": number})])

    agent = Agent(ScriptedModel(policy, tokenizer), [page], compaction=Compaction(at_tokens=2500, keep_turns=1))
    result = agent.run_sync("Read.", progress=False)
    assert result.answer == "Done."
    page_of_run = render_trajectory(result.trajectory, "run")
    assert re.search(r"The conversation was compacted from [\d,]+ to [\d,]+ tokens: [12] results cleared", page_of_run)


def test_json_has_null_for_rates_over_a_part_of_the_tasks(run: RunDirectory) -> None:
    from agentkit.cli.evaluation import Finished, as_json

    report = run.path / "report.html"
    found = as_json(Finished(run, report, False))
    assert (found["pass@2"], found["pass^2"], found["tasks"], found["tasks_with_2_scored_epochs"]) == (None, None, 4, 3)
    lines = (run.path / "trials.jsonl").read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if b'"solved.' in line]
    (run.path / "trials.jsonl").write_bytes(b"".join(whole))
    interrupted = RunDirectory.open(run.path)
    assert [len(task) for task in interrupted.scores()].count(0) == 3
    found = as_json(Finished(interrupted, report, True))
    assert (found["mean"], found["pass@2"], found["tasks"], found["tasks_with_2_scored_epochs"]) == (1.0, None, 4, 1)
    families = {task: family for task, family in interrupted.lock.families.items() if family == "numbers"}
    assert len(interrupted.scores("numbers")) == len(families) > 0
