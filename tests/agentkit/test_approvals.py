"""Approvals: a chain of policies decides on each call, and a human may be asked."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit import (
    Agent,
    ApprovalWarning,
    Approve,
    Ask,
    AssistantTurn,
    CallDecided,
    CallStarted,
    Modify,
    PendingCall,
    Refuse,
    RunResult,
    ScriptedModel,
    ToolMessage,
    ToolOutput,
    Trajectory,
    ask_before_changes,
    refuse_changes,
    tool,
)
from agentkit.approval import Approvals
from agentkit.cli.approve import TerminalPrompt, read_answer
from agentkit_environments import Environment, SandboxLostError
from agentkit_tools import BUILTINS, ImagePart, Tool, ToolCall, ToolContext

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]


@pytest.fixture
def ran() -> list[str]:
    return []


@pytest.fixture
def tools(ran: list[str]) -> list[Tool]:
    @tool
    async def write(text: str) -> str:
        """Write a text."""
        ran.append(text)
        return f"wrote {text}"

    @tool(read_only=True)
    async def look(text: str) -> str:
        """Look at a text."""
        ran.append(text)
        return f"saw {text}"

    return [write, look]


def say(text: str) -> AssistantTurn:
    return AssistantTurn(content=text)


def use(*names_and_texts: tuple[str, str]) -> AssistantTurn:
    return AssistantTurn(calls=[(name, {"text": text}) for name, text in names_and_texts])


def decisions(result: RunResult) -> list[CallDecided]:
    return [record for record in result.trajectory.records if isinstance(record, CallDecided)]


def told(result: RunResult) -> list[str]:
    return [message.content for message in result.trajectory.messages if isinstance(message, ToolMessage)]


def no_secrets(call: PendingCall) -> Refuse | None:
    return Refuse("it is secret") if "secret" in call.arguments["text"] else None


async def shout(call: PendingCall) -> Modify | None:
    return Modify({"text": call.arguments["text"].upper()}) if call.tool.name == "write" else None


def approve_all(call: PendingCall) -> Approve:
    return Approve()


def never(call: PendingCall) -> Refuse:
    raise AssertionError("an earlier policy has decided")


async def test_the_first_decision_counts_and_is_recorded(
    script: Script, environment: Environment, tools: list[Tool], ran: list[str], tmp_path: Path
) -> None:
    turn = use(("write", "a secret"), ("write", "hello"), ("look", "around"))
    agent = Agent(script(turn, say("ok")), tools, approval=[no_secrets, shout])
    result = await agent.run("Q", environment=environment, trajectory=tmp_path / "run.jsonl")
    assert ran == ["HELLO", "around"]
    assert told(result) == [
        "Error: the call was refused: it is secret",
        '[This call was changed before it ran. Its arguments were: {"text":"HELLO"}]\nwrote HELLO',
        "saw around",
    ]
    texts = [json.dumps({"text": text}) for text in ("a secret", "hello", "around")]
    assert decisions(result) == [
        CallDecided("call_0_0", "write", "refused", "no_secrets", texts[0], reason="it is secret"),
        CallDecided("call_0_1", "write", "modified", "shout", texts[1], modified='{"text":"HELLO"}'),
        CallDecided("call_0_2", "look", "approved", None, texts[2]),
    ]
    started = [record.call for record in result.trajectory.records if isinstance(record, CallStarted)]
    assert [call.id for call in started] == ["call_0_1", "call_0_2"]
    assert Trajectory.load(tmp_path / "run.jsonl").records == result.trajectory.records
    assert [each.is_error for each in result.trajectory.results] == [True, False, False]


async def test_an_approval_ends_the_chain(
    script: Script, environment: Environment, tools: list[Tool], ran: list[str]
) -> None:
    agent = Agent(script(use(("write", "a")), say("ok")), tools, approval=[approve_all, never])
    result = await agent.run("Q", environment=environment)
    assert ran == ["a"] and [each.policy for each in decisions(result)] == ["approve_all"]


async def test_an_agent_without_policies_records_no_decisions(
    script: Script, environment: Environment, tools: list[Tool]
) -> None:
    result = await Agent(script(use(("write", "a")), say("ok")), tools).run("Q", environment=environment)
    assert decisions(result) == []


async def test_a_policy_knows_the_call(script: Script, environment: Environment, tools: list[Tool]) -> None:
    seen: list[PendingCall] = []
    agent = Agent(script(use(("write", "a")), say("ok")), tools, approval=lambda call: seen.append(call))
    await agent.run("Q", environment=environment, deps="mine")
    (call,) = seen
    assert (call.id, call.tool, call.arguments) == ("call_0_0", tools[0], {"text": "a"})
    assert (call.context.environment, call.context.deps) == (environment, "mine")


async def test_calls_that_cannot_run_are_not_decided_on(
    script: Script, environment: Environment, tools: list[Tool]
) -> None:
    turn = AssistantTurn(calls=[("write", {}), ("unknown", {})])
    result = await Agent(script(turn, say("ok")), tools, approval=never).run("Q", environment=environment)
    assert "invalid arguments for write" in told(result)[0] and "unknown tool" in told(result)[1]
    assert decisions(result) == []


class Strict:
    """A policy with a state, which is no function."""

    def __call__(self, call: PendingCall) -> Any:
        raise ValueError("no idea")


def wrong(call: PendingCall) -> Any:
    return True


def to_nothing(call: PendingCall) -> Modify:
    return Modify({})


def to_something_else(call: PendingCall) -> Modify:
    return Modify({"text": object()})


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (Strict(), "the approval policy Strict failed: ValueError: no idea"),
        (wrong, "the approval policy wrong failed: TypeError: returned True, expected Approve"),
        (
            to_nothing,
            "the approval policy to_nothing failed: ValueError: it changed the arguments to invalid ones: .*text",
        ),
        (to_something_else, "the approval policy to_something_else failed: .*"),
    ],
)
async def test_a_policy_that_fails_refuses_and_is_named(
    script: Script, environment: Environment, tools: list[Tool], ran: list[str], policy: Any, problem: str
) -> None:
    agent = Agent(script(use(("write", "a")), say("ok")), tools, approval=policy)
    with pytest.warns(ApprovalWarning, match=problem):
        result = await agent.run("Q", environment=environment)
    assert ran == [] and result.answer == "ok"
    with pytest.raises(ValueError, match=f"refused: {problem}"):
        raise ValueError(told(result)[0])


async def test_a_lost_sandbox_in_a_policy_ends_the_run(
    script: Script, environment: Environment, tools: list[Tool]
) -> None:
    def lost(call: PendingCall) -> None:
        raise SandboxLostError("gone")

    with pytest.raises(SandboxLostError):
        await Agent(script(use(("write", "a")), say("ok")), tools, approval=lost).run("Q", environment=environment)


async def test_built_in_policies_pass_what_changes_nothing(
    script: Script, environment: Environment, tools: list[Tool], ran: list[str]
) -> None:
    submit = BUILTINS["submit"]
    turns = [use(("look", "a"), ("write", "b")), AssistantTurn(calls=[("submit", {"answer": "done"})])]
    for policy, word in ((refuse_changes, "only read-only tools"), (ask_before_changes, "nobody to ask")):
        result = await Agent(script(*turns), [*tools, submit], approval=policy).run("Q", environment=environment)
        assert told(result)[0] == "saw a" and word in told(result)[1]
        assert (result.status, result.answer) == ("submitted", "done")
    assert ran == ["a", "a"]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_human_is_asked_about_one_call_at_a_time(
    script: Script, environment: Environment, tools: list[Tool], ran: list[str], kind: str
) -> None:
    asking, most, asked = 0, 0, []

    async def on_ask(call: PendingCall, reason: str) -> Approve | Modify | Refuse:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        asked.append((call.arguments["text"], reason))
        await anyio.wait_all_tasks_blocked()
        asking -= 1
        return answers[call.arguments["text"]]

    def in_thread(call: PendingCall, reason: str) -> Approve | Modify | Refuse:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        asked.append((call.arguments["text"], reason))
        asking -= 1
        return answers[call.arguments["text"]]

    def careful(call: PendingCall) -> Ask:
        return Ask("think of it")

    answers: dict[str, Approve | Modify | Refuse] = {"a": Approve(), "b": Refuse("not b"), "c": Modify({"text": "d"})}
    agent = Agent(
        script(use(*(("write", text) for text in answers)), say("ok")),
        tools,
        approval=careful,
        on_ask=on_ask if kind == "async" else in_thread,
    )
    result = await agent.run("Q", environment=environment)
    assert most == 1 and asked == [(text, "think of it") for text in answers]
    assert ran == ["a", "d"]
    assert [(each.decision, each.policy, each.asked) for each in decisions(result)] == [
        ("approved", "careful", True),
        ("refused", "careful", True),
        ("modified", "careful", True),
    ]


@pytest.mark.parametrize("answer", [None, True, Ask()])
async def test_a_human_who_gives_no_decision_refuses(
    script: Script, environment: Environment, tools: list[Tool], ran: list[str], answer: Any
) -> None:
    agent = Agent(
        script(use(("write", "a")), say("ok")), tools, approval=ask_before_changes, on_ask=lambda call, reason: answer
    )
    with pytest.warns(ApprovalWarning, match="ask_before_changes failed: TypeError"):
        result = await agent.run("Q", environment=environment)
    assert ran == [] and decisions(result)[0].asked


async def test_an_early_call_waits_for_its_decision(
    script: Script, environment: Environment, tools: list[Tool]
) -> None:
    asked, may_decide = anyio.Event(), anyio.Event()

    async def slow(call: PendingCall) -> None:
        asked.set()
        await may_decide.wait()

    agent = Agent(script(use(("look", "a"), ("look", "b")), say("ok")), tools, approval=slow)
    kinds: list[str] = []
    async with anyio.create_task_group() as task_group:

        async def listen() -> None:
            async for event in agent.stream("Q", environment=environment):
                kinds.append(event.type)  # noqa: PERF401  (read while the run goes on)

        task_group.start_soon(listen)
        await asked.wait()
        await anyio.wait_all_tasks_blocked()
        assert "call_ready" in kinds and "call_started" not in kinds
        may_decide.set()
    assert kinds.count("call_started") == 2 and kinds.index("call_decided") < kinds.index("call_started")


async def test_a_cancelled_run_stops_asking(script: Script, environment: Environment, tools: list[Tool]) -> None:
    asked, stopped = anyio.Event(), anyio.Event()

    async def on_ask(call: PendingCall, reason: str) -> Approve:
        asked.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()
        return Approve()

    agent = Agent(script(use(("write", "a")), say("ok")), tools, approval=ask_before_changes, on_ask=on_ask)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(lambda: agent.run("Q", environment=environment))
        await asked.wait()
        task_group.cancel_scope.cancel()
    assert stopped.is_set()


async def test_time_for_a_decision_is_not_tool_time(
    script: Script, environment: Environment, tools: list[Tool]
) -> None:
    async def slow(call: PendingCall) -> None:
        await anyio.sleep(0.2)

    result = await Agent(script(use(("write", "a")), say("ok")), tools, approval=slow).run("Q", environment=environment)
    assert result.usage.tool_time_s < 0.2 < result.usage.wall_time_s


async def test_a_changed_answer_stays_as_it_is(script: Script, environment: Environment) -> None:
    agent = Agent(
        script(AssistantTurn(calls=[("submit", {"answer": "a"})])),
        [BUILTINS["submit"]],
        approval=lambda call: Modify({"answer": "b"}),
    )
    result = await agent.run("Q", environment=environment)
    assert result.answer == "b"


async def test_a_changed_call_with_an_image_says_so_in_its_parts(script: Script, environment: Environment) -> None:
    image = ImagePart.of(b"x", "image/png")

    @tool
    def draw(size: int) -> ToolOutput:
        """Draw."""
        return ToolOutput(parts=(image,))

    agent = Agent(
        script(AssistantTurn(calls=[("draw", {"size": 1})]), say("ok")),
        [draw],
        approval=lambda call: Modify({"size": 2}),
    )
    result = await agent.run("Q", environment=environment)
    (message,) = [each for each in result.trajectory.messages if isinstance(each, ToolMessage)]
    assert str(message.parts[0]).count("changed before it ran") == 1 and message.parts[1] == image


async def test_agents_below_follow_both_chains(
    script: Script, environment: Environment, tools: list[Tool], ran: list[str]
) -> None:
    asked: list[str] = []

    def on_ask(call: PendingCall, reason: str) -> Approve:
        asked.append(call.tool.name)
        return Approve()

    helper = Agent(script(use(("write", "a")), say("done")), tools, approval=shout)
    turn = AssistantTurn(calls=[("helper", {"task": "T"})])
    main = Agent(
        script(turn, say("ok")), [helper.as_tool("helper", "Helps.")], approval=ask_before_changes, on_ask=on_ask
    )
    result = await main.run("Q", environment=environment)
    assert asked == ["helper", "write"] and ran == ["A"]
    (decided,) = [each for each in result.trajectory.subagents[0].records if isinstance(each, CallDecided)]
    assert (decided.decision, decided.policy, decided.modified) == ("modified", "shout", '{"text":"A"}')


@pytest.mark.parametrize("wrong", [3, [3], [None], "ask"])
def test_a_policy_that_is_no_function_is_refused(script: Script, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"approval"):
        Agent(script(say("ok")), approval=wrong)
    with pytest.raises(TypeError, match=r"on_ask"):
        Agent(script(say("ok")), approval=ask_before_changes, on_ask=wrong)


# The chain as a state machine: what it does equals what a list of decisions says.

verdicts = st.sampled_from(["pass", "approve", "modify", "refuse", "ask"])


@given(st.lists(verdicts, max_size=4), st.lists(verdicts, max_size=4), st.sampled_from(["approve", "modify", "refuse"]))
def test_a_chain_does_what_its_first_decisions_say(own: list[str], above: list[str], human: str) -> None:
    def decision(word: str) -> Any:
        words = {"approve": Approve(), "modify": Modify({"text": "new"}), "refuse": Refuse("no"), "ask": Ask()}
        return words.get(word)

    def policies(words: list[str]) -> list[Any]:
        return [lambda call, word=word: decision(word) for word in words]

    async def decide() -> CallDecided:
        @tool
        def write(text: str) -> str:
            """Write."""
            return text

        async def on_ask(call: PendingCall, reason: str) -> Any:
            return decision(human)

        chain = Approvals(policies(own), on_ask).below(Approvals(policies(above), on_ask))
        context = ToolContext(None)  # type: ignore[arg-type]
        return await chain.decide(ToolCall("c", "write", '{"text": "old"}'), write, context)

    firsts = [next((word for word in words if word != "pass"), "approve") for words in (own, above)]
    firsts = [human if word == "ask" else word for word in firsts]
    expected = "refused" if "refuse" in firsts else "modified" if "modify" in firsts else "approved"
    decided = anyio.run(decide)
    assert decided.decision == expected
    if expected != "refused":
        assert (decided.modified is not None) == (expected == "modified")


# The prompt of the command line.


@given(st.text())
def test_any_line_is_a_decision_or_is_explained(line: str) -> None:
    answer = read_answer(line)
    said = line.strip()
    if said.lower() in ("y", "yes"):
        assert answer == Approve()
    elif said.lower() in ("a", "always"):
        assert answer is None
    elif said.startswith("{"):
        assert isinstance(answer, Modify | str)
    else:
        assert isinstance(answer, Refuse) and (said in answer.reason or said.lower() in ("n", "no", ""))


@given(st.dictionaries(st.text(), st.integers() | st.text()))
def test_an_object_changes_the_arguments(arguments: dict[str, Any]) -> None:
    answer = read_answer(json.dumps(arguments) + "\n")
    assert answer == Modify(arguments)


@dataclass
class Screen:
    """The user's side of a terminal."""

    fd: int
    shown: str = ""

    async def until(self, text: str) -> None:
        while text not in self.shown:
            await anyio.wait_readable(self.fd)
            self.shown += os.read(self.fd, 4096).decode()

    def type(self, text: str) -> None:
        self.shown = ""
        os.write(self.fd, text.encode())


@contextmanager
def screen() -> Iterator[Screen]:
    """Connect standard input and standard error to a terminal. Not a fixture: pytest captures anew for each phase."""
    user, ours = pty.openpty()
    with (
        pytest.MonkeyPatch.context() as patch,
        open(ours, encoding="utf-8") as stdin,
        open(os.dup(ours), "w", encoding="utf-8") as stderr,
    ):
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stderr", stderr)
        yield Screen(user)
    os.close(user)


def pending(tools: list[Tool], text: str = "a") -> PendingCall:
    return PendingCall("c", tools[0], {"text": text}, ToolContext(None))  # type: ignore[arg-type]


async def test_the_prompt_shows_the_call_and_reads_a_decision(tools: list[Tool]) -> None:
    prompt = TerminalPrompt()
    answers: list[Any] = []

    async def ask() -> None:
        answers.append(await prompt(pending(tools, "evil \x1b[2J"), "because"))

    with screen() as terminal:
        for typed in ("y\n", "no\n", "use another\n", '{"text": "new"}\n'):
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(ask)
                await terminal.until("a reason to refuse: ")
                assert "evil \\u001b[2J" in terminal.shown and "because" in terminal.shown
                terminal.type(typed)
    assert answers == [
        Approve(),
        Refuse("the user does not want this call"),
        Refuse("the user does not want this call: use another"),
        Modify({"text": "new"}),
    ]


async def test_the_prompt_asks_again_and_remembers_always(tools: list[Tool]) -> None:
    prompt = TerminalPrompt()
    answers: list[Any] = []

    async def ask() -> None:
        answers.append(await prompt(pending(tools), ""))

    with screen() as terminal:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ask)
            for typed, reply in (('{"text"\n', "not valid JSON"), ('{"txt": "b"}\n', "invalid arguments for write")):
                await terminal.until("a reason to refuse: ")
                terminal.type(typed)
                await terminal.until(reply)
            await terminal.until("a reason to refuse: ")
            terminal.type("a\n")
        assert answers == [Approve()]
        await ask()  # without a question
        assert answers == [Approve(), Approve()]


async def test_what_was_typed_before_the_question_is_no_answer(tools: list[Tool]) -> None:
    answers: list[Any] = []

    async def ask() -> None:
        answers.append(await TerminalPrompt()(pending(tools), ""))

    with screen() as terminal:
        terminal.type("y\n")
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ask)
            await terminal.until("a reason to refuse: ")
            await anyio.wait_all_tasks_blocked()
            assert answers == []
            terminal.type("n\n")
    assert answers == [Refuse("the user does not want this call")]


async def test_a_waiting_prompt_can_be_cancelled(tools: list[Tool]) -> None:
    with screen() as terminal:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(TerminalPrompt(), pending(tools), "")
            await terminal.until("a reason to refuse: ")
            task_group.cancel_scope.cancel()
        assert task_group.cancel_scope.cancelled_caught


@pytest.mark.parametrize("stdin", [io.StringIO("y\n"), None])
async def test_without_a_terminal_nobody_is_asked(
    monkeypatch: pytest.MonkeyPatch, tools: list[Tool], stdin: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    answer = await TerminalPrompt()(pending(tools), "")
    assert answer == Refuse("a human has to approve this call, and standard input is not a terminal")
