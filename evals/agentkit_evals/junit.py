"""JUnit XML of runs, for CI systems: one test suite per model and family, one test case per planned trial."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from agentkit_evals.record import RunDirectory, TrialRecord
from agentkit_evals.statistics import estimate

MAX_TEXT_CHARS = 10_000
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(runs: Sequence[RunDirectory], path: Path) -> None:
    """Write the results of runs to a JUnit XML file. An existing file is replaced."""
    path.write_bytes(render_junit(runs))


def render_junit(runs: Sequence[RunDirectory]) -> bytes:
    """Return the results of runs as JUnit XML in UTF-8.

    A trial with a reward below 1 is a failure of the type "model" or "limit". A trial that could not be scored is an
    error of the type "task" or "infrastructure". A trial that did not run is skipped. Times are in seconds.
    """
    root = ElementTree.Element("testsuites", name="agentkit")
    for run in runs:
        trials = {trial.trial: trial for trial in run.trials}
        families: dict[str, list[tuple[str, TrialRecord | None]]] = {}
        for epoch in range(run.lock.epochs):
            for task in run.lock.tasks:
                name = f"{task.id}.{epoch}"
                trial = trials.get(name)
                family = trial.family if trial else run.lock.families.get(task.id, run.lock.name)
                shown = task.id if run.lock.epochs == 1 else name
                families.setdefault(family, []).append((shown, trial))
        for family, cases in families.items():
            _suite(root, run, family, cases)
    _count(root, root.findall("./testsuite/testcase"))
    ElementTree.indent(root)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _suite(
    root: ElementTree.Element, run: RunDirectory, family: str, cases: Sequence[tuple[str, TrialRecord | None]]
) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=_text(f"{run.lock.name}.{family} on {run.lock.model}"))
    suite.set("timestamp", run.lock.created)
    mean = estimate([[trial.reward] for _, trial in cases if trial and trial.reward is not None])
    _properties(
        suite,
        model=run.lock.model,
        family=family,
        seed=run.lock.seed,
        epochs=run.lock.epochs,
        mean_reward=mean and f"{mean.mean:.4f}",
        run=run.path,
        agentkit=run.lock.agentkit,
    )
    for name, trial in cases:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_text(f"{run.lock.model}.{family}"), name=_text(name), time="0.000"
        )
        if trial is None:
            ElementTree.SubElement(case, "skipped", message="the run ended before this trial")
            continue
        case.set("time", f"{trial.setup_s + trial.agent_s + trial.verify_s:.3f}")
        usage = trial.usage
        _properties(
            case,
            reward=trial.reward,
            status=trial.status,
            turns=usage.turns,
            prompt_tokens=usage.prompt_tokens,
            sampled_tokens=usage.sampled_tokens,
            cost_usd=usage.cost_usd,
        )
        if trial.failure is not None:
            kind = "failure" if trial.failure in ("model", "limit") else "error"
            problem = ElementTree.SubElement(case, kind, type=trial.failure, message=_text(_message(trial)))
            problem.text = _text("\n".join(filter(None, (trial.error, trial.verifier_output))))
        if trial.answer is not None:
            ElementTree.SubElement(case, "system-out").text = _text(trial.answer)
    _count(suite, suite.findall("testcase"))


def _message(trial: TrialRecord) -> str:
    if trial.error or trial.reward is None:
        return (trial.error or "not scored").partition("\n")[0]
    reached = "; a limit was reached" if trial.failure == "limit" else ""
    return f"reward {trial.reward:g}, expected 1{reached}"


def _properties(parent: ElementTree.Element, **values: object) -> None:
    properties = ElementTree.SubElement(parent, "properties")
    for name, value in values.items():
        if value is not None:
            ElementTree.SubElement(properties, "property", name=name, value=_text(str(value)))


def _count(element: ElementTree.Element, cases: Sequence[ElementTree.Element]) -> None:
    element.set("tests", str(len(cases)))
    for attribute, child in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(attribute, str(sum(case.find(child) is not None for case in cases)))
    element.set("time", f"{sum(float(case.get('time', 0)) for case in cases):.3f}")


def _text(text: str) -> str:
    """Return `text` cut to a limited length, with each character that XML cannot contain written as an escape."""
    return _NOT_XML.sub(lambda found: found[0].encode("unicode_escape").decode(), text[:MAX_TEXT_CHARS])
