"""JUnit XML is well-formed for any text, and has every planned trial once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentkit.model import Usage
from agentkit.models.scripted import Policy
from agentkit.task import Task
from agentkit_engine.sampling_params import SamplingParams
from agentkit_evals.junit import render_junit, write_junit
from agentkit_evals.record import RunDirectory, RunLock, TrialRecord

MakeTask = Callable[..., Task]
MakeScript = Callable[..., Policy]
Evaluate = Callable[..., RunDirectory]


@pytest.fixture
def run(evaluate: Evaluate, number_task: MakeTask, script: MakeScript, solves: Policy) -> RunDirectory:
    return evaluate(
        (number_task("solved"), solves),
        (number_task("wrong"), script([("submit", {"answer": "\x1b]0;41\x07 <b>&\ufffe"})])),
        (number_task("loops", metadata={"family": "other"}, agent={"max_turns": 1}), script([("list_dir", {})])),
        (number_task("broken", environment={"setup": ["echo no >&2; exit 1"]}), solves),
    )


def read(data: bytes) -> ElementTree.Element:
    return ElementTree.fromstring(data)


def test_each_outcome_has_its_element(run: RunDirectory, tmp_path: Path) -> None:
    write_junit([run], tmp_path / "results.xml")
    root = read((tmp_path / "results.xml").read_bytes())
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert list(cases) == ["solved", "wrong", "broken", "loops"]
    assert {name: [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            for name, case in cases.items()} == {
        "solved": [], "wrong": ["failure"], "broken": ["error"], "loops": ["failure"]
    }  # fmt: skip
    for name, kind in (("wrong", "model"), ("loops", "limit"), ("broken", "task")):
        problem = cases[name].find("failure") if kind != "task" else cases[name].find("error")
        assert problem is not None and problem.get("type") == kind and problem.get("message")
    broken = cases["broken"].find("error")
    assert broken is not None and "exited 1: no" in str(broken.get("message"))
    assert cases["wrong"].findtext("system-out") == "\\x1b]0;41\\x07 <b>&\\ufffe"
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "2", "errors": "1", "skipped": "0"
    }  # fmt: skip
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == ["tests.numbers on scripted", "tests.other on scripted"]
    assert [suite.get("tests") for suite in suites] == ["3", "1"]
    properties = {each.get("name"): each.get("value") for each in suites[0].findall("properties/property")}
    assert properties["model"] == "scripted" and properties["mean_reward"] == "0.5000"
    assert sum(float(case.get("time", "nan")) for case in cases.values()) == pytest.approx(
        float(str(root.get("time"))), abs=0.01
    )


def test_trials_that_did_not_run_are_skipped(run: RunDirectory) -> None:
    cut = replace(run, trials=run.trials[:1], lock=run.lock.model_copy(update={"epochs": 2}))
    root = read(render_junit([cut, cut]))
    assert (root.get("tests"), root.get("skipped")) == ("16", "14")
    names = [case.get("name") for case in root.iter("testcase")]
    assert names.count("solved.0") == 2 and names.count("loops.1") == 2


@given(st.text(st.characters(categories=None), max_size=40))
@example("".join(map(chr, range(256))) + "\ud800\udfff\ufffe\uffff]]><!--")
def test_any_text_gives_well_formed_xml(text: str) -> None:
    record: dict[str, Any] = {
        "trial": "t.0", "task": "t", "epoch": 0, "family": text, "phrasing": "",
        "held_out_phrasing": False, "status": None, "failure": "model", "reward": 0.0, "answer": text,
        "error": text, "verifier_output": text, "backend": None, "usage": {}, "started": "",
        "setup_s": 0.0, "agent_s": 0.0, "verify_s": 0.0,
    }  # fmt: skip
    lock = RunLock.model_construct(
        name=text, model=text, epochs=1, seed=0, created="", agentkit=text, families={}, sampling=SamplingParams(),
        tasks=[Task(id="t", instruction="x")],
    )  # fmt: skip
    trial = TrialRecord.model_construct(**{**record, "usage": Usage()})
    root = read(render_junit([RunDirectory(Path("run"), lock, (trial,))]))
    assert len(list(root.iter("failure"))) == 1


def test_an_unwritable_place_is_an_error(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_junit([run], tmp_path / "none" / "results.xml")
