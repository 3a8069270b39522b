"""Tasks that are scored by the calls of the model's first turn, which are never run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.errors import TaskFileError
from agentkit.messages import Message
from agentkit.models.scripted import AssistantTurn, Policy
from agentkit.task import Task, load_task
from agentkit_engine.chat import Tokenizer
from agentkit_evals.calls import gold_calls, mismatch
from agentkit_evals.expected import expected_of
from agentkit_evals.record import RunDirectory
from agentkit_evals.report import render_report
from agentkit_evals.selfcheck import selfcheck

MakeScript = Callable[..., Policy]
Evaluate = Callable[..., RunDirectory]

PROPERTIES: dict[str, Any] = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "size": {"type": "number"},
    "wet": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string"}},
    "marks": {"type": "array", "items": {"type": "number"}},
    "place": {"type": "object", "properties": {"lat": {"type": "number"}, "name": {"type": "string"}}},
    "stops": {"type": "array", "items": {"type": "object"}},
    "any": {},
}


def a_task(calls: Any, *, required: Sequence[str] = (), **more: Any) -> Task:
    tools = [
        {
            "name": name,
            "description": "",
            "parameters": {"type": "object", "properties": PROPERTIES, "required": needed},
        }
        for name, needed in (("weather", [*required]), ("other", []))
    ]
    return Task.model_validate(
        {"id": "t", "instruction": "Call.", "tools": tools, "verifier": {"calls": calls}, **more}
    )


def made(*calls: tuple[str, Any]) -> str:
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


@pytest.mark.parametrize(
    ("key", "allowed", "right", "wrong"),
    [
        ("city", ["Paris", "Paris, France"], ["paris", "PARIS FRANCE", "paris_france"], ["Rome", "", 1, None]),
        ("city", ["it's"], ['It"s'], ["its"]),
        ("days", [3], [3], [3.0, "3", True, 4, None, [3]]),
        ("size", [3.0, 4.5], [3, 3.0, 4.5], ["3", 3.1, True]),
        ("size", ["x + 1"], ["x + 1"], [1.0, "x"]),  # a variable
        ("wet", [True], [True], [1, "true", False]),
        ("tags", [["a b", "C"], ["d"]], [["AB", "c"], ["D"]], [["c", "a b"], ["a b"], [], "d", [1]]),
        ("tags", ["", ["a"]], [["a"], []], [["b"], None]),
        ("marks", [[1.5, 2.0]], [[1.5, 2.0]], [[1.5, 2], [2.0, 1.5], [1.5]]),
        ("marks", [[1, 2]], [[1, 2], [1.0, 2.0]], [["1", "2"]]),
        ("place", [{"lat": [1.5], "name": ["", "Rome"]}],
         [{"lat": 1.5}, {"lat": 1.5, "name": "rome"}], [{}, {"lat": 1.5, "more": 1}, {"lat": 1, "name": "Bonn"}, []]),
        ("stops", [[{"n": [1]}, {"n": [2]}]], [[{"n": 1}, {"n": 2}]], [[{"n": 2}, {"n": 1}], [{"n": 1}], [1, 2]]),
        ("any", ["x"], ["X"], [1]),
        ("any", [5], [5], ["5", 6]),
        ("city", [], [], ["", "a"]),
    ],
)  # fmt: skip
def test_an_allowed_value_matches(key: str, allowed: list[Any], right: list[Any], wrong: list[Any]) -> None:
    task = a_task([{"weather": {key: allowed}}])
    assert [value for value in right if mismatch(task, made(("weather", {key: value})))] == []
    assert [value for value in wrong if not mismatch(task, made(("weather", {key: value})))] == []


def test_arguments_are_required_optional_or_unexpected() -> None:
    task = a_task([{"weather": {"city": ["Paris"], "days": ["", 3], "size": [1.0]}}], required=["city"])
    for arguments, reason in (
        ({"city": "Paris", "size": 1}, None),
        ({"city": "Paris", "size": 1, "days": 3}, None),
        ({"size": 1}, "missing argument city"),
        ({"city": "Paris"}, "missing argument size"),
        ({"city": "Paris", "size": 1, "days": 4}, "days is 4"),
        ({"city": "Paris", "size": 1, "wet": True}, "unexpected argument wet"),
        ({"city": "Paris", "size": 1, "nope": True}, "unexpected argument nope"),
    ):
        found = mismatch(task, made(("weather", arguments)))
        assert found is None if reason is None else reason in str(found)


def test_parallel_calls_match_in_any_order_and_number() -> None:
    task = a_task([{"weather": {"city": ["Paris"]}}, {"weather": {"city": ["Rome"]}}, {"other": {}}])
    paris, rome = ("weather", {"city": "Paris"}), ("weather", {"city": "Rome"})
    other: tuple[str, dict[str, str]] = ("other", {})
    assert mismatch(task, made(other, rome, paris)) is None
    for calls in ((paris, rome), (paris, paris, other), (paris, rome, other, other), ()):
        assert mismatch(task, made(*calls)) is not None
    assert "weather was called" in str(mismatch(task, made(paris, rome, paris)))


def test_no_call_and_any_call_can_be_expected() -> None:
    call, malformed = made(("weather", {"city": "x"})), made(("weather", "{broken"))
    none, some = a_task([]), a_task("any")
    assert mismatch(none, "[]") is None and mismatch(none, malformed) is None
    assert mismatch(none, call) == "1 calls, expected none"
    assert mismatch(some, call) is None and "no call" in str(mismatch(some, "[]"))
    assert mismatch(some, malformed) == "malformed call of weather: {broken"
    assert "malformed" in str(mismatch(a_task([{"other": {}}]), malformed))
    assert {mismatch(task, None) for task in (none, some)} == {"a limit cut the turn, so its calls are not known"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.sampled_from(["", "a", "A"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "a", "n"]), inner, max_size=2),
    max_leaves=6,
)


@given(st.sampled_from([*PROPERTIES]), st.lists(JSON, max_size=3), JSON)
def test_any_values_are_compared_without_an_error(key: str, allowed: list[Any], value: Any) -> None:
    mismatch(a_task([{"weather": {key: allowed}}]), made(("weather", {key: value})))


@given(st.lists(st.sampled_from(["Paris", "Rome", ""]), min_size=1), st.booleans())
def test_the_gold_calls_match(allowed: list[str], required: bool) -> None:
    task = a_task([{"weather": {"city": allowed}}, {"other": {}}], required=["city"] if required else [])
    assert mismatch(task, gold_calls(task)) is None
    assert mismatch(a_task("any"), gold_calls(a_task("any"))) is None
    assert gold_calls(a_task([])) == "[]"


def trial_of(run: RunDirectory) -> tuple[float | None, str | None, str | None]:
    (trial,) = run.trials
    assert trial.backend is None and trial.usage.turns == 1
    return trial.reward, trial.answer, trial.failure


def test_a_run_ends_with_its_first_turn(evaluate: Evaluate, script: MakeScript, tmp_path: Path) -> None:
    task = a_task([{"weather": {"city": ["Paris"]}}, {"weather": {"city": ["Rome"]}}])
    calls = [("weather", {"city": "Rome"}), ("weather", {"city": "Paris"})]
    run = evaluate((task, script(calls, "never said")))
    assert trial_of(run) == (1.0, made(*calls), None)
    trajectory = run.trajectory(run.trials[0])
    assert trajectory is not None and not any(result.is_error for result in trajectory.results)
    assert "Paris" in render_report(run)
    assert expected_of(task) == '[{"weather": {"city": ["Paris"]}}, {"weather": {"city": ["Rome"]}}]'


@pytest.mark.parametrize(
    ("turn", "reward", "reason"),
    [
        ([("weather", {"city": "Rome"})], 0.0, 'city is "Rome"'),
        ([("unknown", {"city": "Paris"})], 0.0, "unknown was called"),
        ([("weather", {"city": "Paris"}), ("unknown", {})], 0.0, "2 calls, expected 1"),
        ("Paris is sunny.", 0.0, "0 calls, expected 1"),
        ("", 0.0, "0 calls, expected 1"),
        ([("weather", {"city": "Paris"})], 1.0, ""),
    ],
)
def test_other_first_turns_are_scored(
    evaluate: Evaluate, script: MakeScript, turn: Any, reward: float, reason: str
) -> None:
    run = evaluate((a_task([{"weather": {"city": ["Paris"]}}]), script(turn)))
    assert trial_of(run)[::2] == (reward, "model" if reward < 1 else None)
    assert reason in run.trials[0].verifier_output


def test_a_turn_that_a_limit_cut_is_not_right_by_having_no_call(evaluate: Evaluate, script: MakeScript) -> None:
    told = script("There is no tool for this. " * 40)
    assert trial_of(evaluate((a_task([]), told)))[::2] == (1.0, None)


def test_a_cut_turn_scores_0(evaluate: Evaluate, script: MakeScript) -> None:
    told = script("There is no tool for this. " * 40)
    run = evaluate((a_task([], agent={"max_tokens": 5}), told))
    assert trial_of(run) == (0.0, None, "limit")


def test_a_malformed_call_is_no_call(evaluate: Evaluate, tokenizer: Tokenizer) -> None:
    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn | Sequence[int]:
        text = (
            '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜bogus>\n</｜DSML｜invoke>\n'
            "</｜DSML｜tool_calls>"
        )
        return [*([tokenizer.control_id("</think>")] if think else []), *tokenizer.encode(text), tokenizer.eos_id]

    run = evaluate((a_task([{"weather": {"city": ["Paris"]}}]), policy))
    (trial,) = run.trials
    assert trial.reward == 0.0 and trial.usage.turns == 1
    assert "malformed call" in trial.verifier_output or "0 calls" in trial.verifier_output


def test_a_check_needs_no_sandbox() -> None:
    for calls, idle in (([{"weather": {"city": ["Paris"]}}], 0.0), ([], 1.0), ("any", 0.0)):
        found = anyio.run(selfcheck, a_task(calls))
        assert found.problems == [] and (found.oracle.reward, found.nothing.reward) == (1.0, idle)
    impossible = anyio.run(selfcheck, a_task([{"weather": {"nope": ["x"]}}]))
    assert impossible.problems[0].startswith("the oracle solution scores 0") and "nope" in impossible.problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("verifier: {calls: [{bash: {}}]}\nsolution: {command: ls}", "no environment and no solution"),
        ("verifier: {calls: [{bash: {}}]}\nenvironment: {setup: [ls]}", "no environment and no solution"),
        ("verifier: {calls: [{nope: {}}]}", "verifier.calls: no tool nope; tools: bash"),
        ("verifier: {calls: some}", ":4: verifier.calls: "),
        ("verifier: {calls: [{bash: {}, submit: {}}]}", ":4: verifier.calls.0: expected one `tool:"),
        ("verifier: {calls: [{bash: {command: ls}}]}", ":4: verifier.calls.0.bash.command: "),
        ("verifier: {calls: any, timeout_s: 5}", 'unknown key "verifier.timeout_s"; expected one of calls'),
        ("verifier: {command: ls, cals: any}", 'unknown key "verifier.cals"'),
    ],
)
def test_a_wrong_verifier_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(f"id: t\ninstruction: Call.\ntools: [bash]\n{text}\n")
    with pytest.raises(TaskFileError) as caught:
        load_task(file)
    assert message in str(caught.value)


def test_a_tool_without_a_command_needs_a_verifier_of_calls(tmp_path: Path) -> None:
    tool = "tools: [{name: f, description: '', parameters: {type: object}}]"
    file = tmp_path / "t.yaml"
    file.write_text(f"id: t\ninstruction: Call.\n{tool}\nverifier: {{command: ls}}\n")
    with pytest.raises(TaskFileError, match='missing key "command" of tool f; only '):
        load_task(file)
    file.write_text(f"id: t\ninstruction: Call.\n{tool}\nverifier: {{calls: [{{f: {{}}}}]}}\n")
    assert [tool.name for tool in load_task(file).build_tools()] == ["f"]
