"""The agent loop: ask, act, observe, and every way a run can end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import anyio
import pytest

from agentkit import (
    DEFAULT_SYSTEM,
    Agent,
    AssistantMessage,
    AssistantTurn,
    CallFinished,
    Event,
    LimitReached,
    Limits,
    Message,
    MessageAdded,
    Outcome,
    RunFinished,
    ScriptedModel,
    SystemMessage,
    TextDelta,
    ToolMessage,
    Trajectory,
    TurnFinished,
    TurnStarted,
    UserMessage,
    tool,
)
from agentkit.events import LimitName
from agentkit.models.tokens import rebuild_token_ids
from agentkit.run import Run
from agentkit.thinking import ThinkingPolicy
from agentkit.turn import TurnCalls
from agentkit_engine.chat import Tokenizer, encode_ids
from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    SandboxLostError,
    SandboxUnavailableError,
    Snapshot,
    open_environment,
)
from agentkit_environments.local import LocalEnvironment
from agentkit_tools import BUILTINS, ToolContext, ToolDefinitionError

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]

LOOK = AssistantTurn("I shall look.", "Looking.", [("read_file", {"path": "a.txt"})])
SUBMIT = AssistantTurn("Found.", "", [("submit", {"answer": "42"})])
DONE = AssistantTurn(None, "Done.")


def turn(*calls: tuple[str, dict[str, object]], reasoning: str | None = None, content: str = "") -> AssistantTurn:
    return AssistantTurn(reasoning, content, calls)


def thinks(trajectory: Trajectory) -> list[bool]:
    return [record.think for record in trajectory.records if isinstance(record, TurnStarted)]


def results(trajectory: Trajectory) -> list[str]:
    return [message.content for message in trajectory.messages if isinstance(message, ToolMessage)]


async def test_the_loop_runs_until_the_model_submits(
    script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    await environment.write_file("a.txt", "forty-two")
    result = await Agent(script(LOOK, SUBMIT)).run("What is in a.txt?", environment=environment)
    assert (result.status, result.answer) == ("submitted", "42")
    system, user, looked, read, submitted, accepted = result.trajectory.messages
    assert system == SystemMessage(DEFAULT_SYSTEM)
    assert user == UserMessage("What is in a.txt?")
    assert isinstance(looked, AssistantMessage) and (looked.reasoning, looked.content) == ("I shall look.", "Looking.")
    assert read == ToolMessage("call_0_0", "read_file", "forty-two")
    assert isinstance(submitted, AssistantMessage) and submitted.reasoning is None  # auto: routine steps do not think
    assert isinstance(accepted, ToolMessage)
    assert (result.usage.turns, result.usage.calls, result.usage.forced_tokens) == (2, 2, 0)
    assert rebuild_token_ids(result.trajectory, tokenizer) == result.trajectory.token_ids


async def test_a_turn_without_calls_is_the_answer(script: Script, environment: Environment) -> None:
    result = await Agent(script(AssistantTurn("Easy.", "Four."))).run("Two and two?", environment=environment)
    assert (result.status, result.answer, result.usage.turns) == ("answered", "Four.", 1)


async def test_the_ids_encode_the_whole_conversation(
    script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    """Reasoning before a call stays in the session after the call."""
    agent = Agent(script(LOOK, LOOK, SUBMIT), thinking="always", system="S")
    result = await agent.run("Q", environment=environment)
    shaped = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        *(
            message
            for index in range(2)
            for message in (
                {
                    "role": "assistant",
                    "content": "Looking.",
                    "reasoning_content": "I shall look.",
                    "tool_calls": [
                        {
                            "id": f"call_{index}_0",
                            "type": "function",
                            "function": {"name": "read_file", "arguments": '{"path": "a.txt"}'},
                        }
                    ],
                },
                {
                    "role": "tool",
                    "tool_call_id": f"call_{index}_0",
                    "content": "Error: a.txt does not exist; list the directory to see what does",
                },
            )
        ),
    ]
    tools = [tool.spec for tool in agent.tools.values()]
    prompt = encode_ids(shaped, tokenizer=tokenizer, tools=tools, effort="high", dialect="v4-preview")
    third_prompt = sum(len(segment.ids) for segment in result.trajectory.segments[:5])
    assert result.trajectory.token_ids[:third_prompt] == prompt


async def test_an_empty_system_prompt_adds_no_message(script: Script, environment: Environment) -> None:
    result = await Agent(script(SUBMIT), system="").run("Q", environment=environment)
    assert result.trajectory.messages[0] == UserMessage("Q")


async def test_wrong_calls_get_error_results(script: Script, environment: Environment) -> None:
    calls = turn(("nope", {}), ("read_file", {"file": "b"}), ("read_file", {"path": "b"}), ("list_dir", {}))
    result = await Agent(script(calls, SUBMIT)).run("Q", environment=environment)
    unknown, invalid, missing, listed, _ = results(result.trajectory)
    assert unknown.startswith('Error: unknown tool "nope"; available: bash, read_file')
    assert invalid.startswith("Error: invalid arguments for read_file: $.file: unknown parameter")
    assert missing == "Error: b does not exist; list the directory to see what does"
    assert listed == "(empty)"
    assert result.status == "submitted"


async def test_a_malformed_call_gets_one_error_result_in_its_place(
    script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    good = '<｜DSML｜invoke name="list_dir">\n\n</｜DSML｜invoke>\n'
    bad = '<｜DSML｜invoke name="bash">\nno parameter\n</｜DSML｜invoke>\n'
    block = tokenizer.encode(f"\n\n<｜DSML｜tool_calls>\n{good}{bad}{good}</｜DSML｜tool_calls>")
    result = await Agent(script([*block, tokenizer.eos_id], SUBMIT), thinking="never").run("Q", environment=environment)
    first, second, third, _ = results(result.trajectory)
    assert (first, third) == ("(empty)", "(empty)")
    assert second.startswith("Error: malformed call: ")
    assert result.usage.forced_tokens == 0
    assert rebuild_token_ids(result.trajectory, tokenizer) == result.trajectory.token_ids


@pytest.mark.parametrize(
    ("thinking", "effort", "expected"),
    [
        ("always", "high", [True, True, True, True]),
        ("never", "high", [False, False, False, False]),
        ("auto", "high", [True, False, True, False]),
        ("auto", "none", [False, False, False, False]),
        (lambda news: len(news) == 1 and isinstance(news[0], ToolMessage), "high", [False, True, True, True]),
    ],
)
async def test_the_thinking_policy_decides_which_turns_think(
    script: Script, environment: Environment, tokenizer: Tokenizer, thinking: object, effort: object, expected: object
) -> None:
    model = script(
        turn(("list_dir", {}), reasoning="r"), turn(("read_file", {"path": "x"}), reasoning="r"),
        turn(("list_dir", {}), reasoning="r"), SUBMIT,
    )  # fmt: skip
    agent = Agent(model, thinking=thinking, effort=effort)  # type: ignore[arg-type]
    result = await agent.run("Q", environment=environment)
    assert thinks(result.trajectory) == expected
    assert rebuild_token_ids(result.trajectory, tokenizer) == result.trajectory.token_ids


def rarely(news: Sequence[Message]) -> bool:
    return len(news) > 9


@pytest.mark.parametrize(
    ("thinking", "named"),
    [("never", "never"), (rarely, "rarely"), (partial(rarely), repr(partial(rarely)))],
    ids=["name", "function", "partial"],
)
async def test_the_record_names_the_thinking_policy(
    script: Script, environment: Environment, thinking: ThinkingPolicy, named: str
) -> None:
    result = await Agent(script(SUBMIT), thinking=thinking).run("Q", environment=environment)
    assert result.trajectory.header.thinking == named


async def test_turns_are_numbered_from_0_over_the_session(script: Script, environment: Environment) -> None:
    result = await Agent(script(LOOK, LOOK, SUBMIT, SUBMIT)).run("Q", environment=environment)
    result = await result.continue_("And now?")
    turns = [record for record in result.trajectory.records if isinstance(record, TurnStarted | TurnFinished)]
    assert [record.turn for record in turns] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_wrong_arguments_are_refused(script: Script) -> None:
    with pytest.raises(ValueError, match="always, never, auto or a function, got 'sometimes'"):
        Agent(script(SUBMIT), thinking="sometimes")  # type: ignore[arg-type]

    @tool
    def echo(text: str) -> str:
        """Echo."""
        return text

    with pytest.raises(ValueError, match='two tools are named "echo"'):
        Agent(script(SUBMIT), [echo, echo])
    with pytest.raises(ValueError, match=r"Limits\.max_turns must be positive or None, got 0"):
        Limits(max_turns=0)


async def test_stream_yields_every_record(script: Script, environment: Environment) -> None:
    events: list[Event] = [event async for event in Agent(script(LOOK, SUBMIT)).stream("Q", environment=environment)]
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    result = finished.result
    assert [event for event in events if event in result.trajectory.records] == result.trajectory.records
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "Looking."


async def test_leaving_a_stream_early_cancels_the_run(script: Script, environment: Environment, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with aclosing(Agent(script(LOOK)).stream("Q", environment=environment, trajectory=path)) as events:
        async for event in events:
            if isinstance(event, CallFinished):
                break
    outcome = Trajectory.load(path).outcome
    assert outcome is not None and outcome.status == "cancelled"


async def test_continue_extends_the_same_session(
    script: Script, environment: Environment, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    agent = Agent(script(LOOK, SUBMIT, AssistantTurn("Hm.", "You are welcome."), AssistantTurn("Hm.", "Bye.")))
    first = await agent.run("Q", environment=environment, trajectory=path)
    before = first.trajectory.token_ids
    second = await first.continue_("Thanks!")
    assert (second.status, second.answer) == ("answered", "You are welcome.")
    assert second.usage.turns == 1
    assert second.trajectory is first.trajectory
    assert second.trajectory.token_ids[: len(before)] == before
    third = await second.continue_("Bye!")
    assert third.answer == "Bye."
    assert thinks(third.trajectory) == [True, True, True, True]  # after the missing file, and after user messages
    assert Trajectory.load(path).records == third.trajectory.records
    assert rebuild_token_ids(third.trajectory, tokenizer) == third.trajectory.token_ids
    with pytest.raises(ValueError, match="already continued"):
        await first.continue_("Again!")


async def test_a_lost_sandbox_raises_and_is_not_a_tool_result(
    script: Script, environment: Environment, tmp_path: Path
) -> None:
    waiting = anyio.Event()
    cancelled = False

    @tool
    async def wait() -> str:
        """Wait."""
        nonlocal cancelled
        waiting.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled = True
            raise
        return ""

    @tool
    async def die() -> str:
        """Die."""
        await waiting.wait()
        raise SandboxLostError("it stopped answering")

    path = tmp_path / "t.jsonl"
    agent = Agent(script(turn(("wait", {}), ("die", {}))), [wait, die])
    with pytest.raises(SandboxLostError, match="it stopped answering"):
        await agent.run("Q", environment=environment, trajectory=path)
    trajectory = Trajectory.load(path)
    assert cancelled
    assert trajectory.outcome is not None
    assert (trajectory.outcome.status, trajectory.outcome.error) == ("error", "SandboxLostError: it stopped answering")


async def test_cancelling_kills_processes_and_leaves_a_complete_record(
    script: Script, environment: Environment, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """So it does to processes that an earlier, finished call has left behind."""
    path = tmp_path / "t.jsonl"
    leave = turn(("bash", {"command": "sleep 1000 & echo $! > earlier"}))
    command = "sleep 1000 & echo $! $$ > pids; wait"
    agent = Agent(script(leave, turn(("bash", {"command": command}), ("bash", {"command": "sleep 1000"}))))
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(lambda: agent.run("Q", environment=environment, trajectory=path))
        written = await environment.exec("until [ -s pids ]; do sleep 0.01; done; cat pids earlier", timeout_s=20)
        start = anyio.current_time()
        task_group.cancel_scope.cancel()
    assert anyio.current_time() - start < 1.0
    pids = written.stdout.split()
    assert len(pids) == 3
    alive = await environment.exec(f"ps -o stat= {' '.join(pids)} | grep -v Z")
    assert alive.stdout == ""
    trajectory = Trajectory.load(path)
    assert trajectory.outcome is not None and trajectory.outcome.status == "cancelled"
    assert results(trajectory)[1:] == ["Error: stopped before it finished: the run broke off"] * 2
    assert rebuild_token_ids(trajectory, tokenizer) == trajectory.token_ids


async def test_cancelling_at_any_event_leaves_a_complete_record(
    script: Script, environment: Environment, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = script(turn(("list_dir", {}), ("write_file", {"path": "a", "content": "b"}), reasoning="Hm."), SUBMIT)
    count = 0
    finished = False
    while not finished:
        count += 1
        path = tmp_path / f"{count}.jsonl"
        seen = 0
        with anyio.CancelScope() as scope:
            async for event in Agent(model).stream("Q", environment=environment, trajectory=path):
                seen += 1
                finished = isinstance(event, RunFinished)
                if seen == count:
                    scope.cancel()
        trajectory = Trajectory.load(path)
        assert trajectory.outcome is not None
        assert trajectory.outcome.status in ("cancelled", "submitted")
        assert rebuild_token_ids(trajectory, tokenizer) == trajectory.token_ids
        said = [message for message in trajectory.messages if isinstance(message, AssistantMessage)]
        assert len(results(trajectory)) == sum(len(message.calls) for message in said)
    assert count > 20


async def test_a_run_opens_and_closes_its_own_environment(
    script: Script, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continuation has the files of the work directory."""
    opened: list[Environment] = []

    async def open_local(spec: EnvironmentSpec) -> Environment:
        opened.append(await open_environment(spec, backend="unsafe-local"))
        return opened[-1]

    async def reopen(self: LocalEnvironment, snapshot: Snapshot) -> LocalEnvironment:
        opened.append(again := await LocalEnvironment.open(self.spec, self.run_id, snapshot=snapshot))
        return again

    monkeypatch.setattr("agentkit.agent.open_environment", open_local)
    monkeypatch.setattr(LocalEnvironment, "reopen", reopen)
    write = turn(("write_file", {"path": "a/b.txt", "content": "kept"}))
    read = turn(("read_file", {"path": "a/b.txt"}))
    result = await Agent(script(write, SUBMIT, read, SUBMIT)).run("Q")
    result = await result.continue_("And now?")
    assert "kept" in results(result.trajectory)
    assert len(opened) == 2
    for environment in opened:
        with pytest.raises(SandboxLostError):
            await environment.exec("true")


class TestSandbox:
    """A run opens a sandbox before its first turn, and only if a tool needs it."""

    @pytest.fixture(autouse=True)
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> list[Environment]:
        opened: list[Environment] = []

        async def open_local(spec: EnvironmentSpec) -> Environment:
            opened.append(await open_environment(spec, backend="unsafe-local"))
            return opened[-1]

        monkeypatch.setattr("agentkit.agent.open_environment", open_local)
        return opened

    async def test_plain_functions_need_none(self, script: Script, opened: list[Environment]) -> None:
        def double(x: int) -> int:
            return 2 * x

        call = turn(("double", {"x": 4}))
        result = await Agent(script(call, DONE, call, DONE), [double, BUILTINS["submit"]]).run("Q")
        result = await result.continue_("And again?")
        assert (result.status, results(result.trajectory)) == ("answered", ["8", "8"])
        assert opened == []

    async def test_a_tool_with_a_context_needs_one(self, script: Script, opened: list[Environment]) -> None:
        async def look(context: ToolContext) -> str:
            return (await context.environment.exec("pwd")).stdout

        opened_before: list[int] = []

        def think(news: Sequence[Message]) -> bool:
            opened_before.append(len(opened))
            return False

        result = await Agent(script(turn(("look", {})), DONE), [look], thinking=think).run("Q")
        assert results(result.trajectory) == ["/workspace\n"]
        assert opened_before == [1, 1]

    async def test_a_step_of_a_subclass_can_use_it(self, script: Script, opened: list[Environment]) -> None:
        class Saves(Agent):
            async def act(self, run: Run, calls: TurnCalls) -> None:
                await super().act(run, calls)
                await run.context.environment.write_file("turn", str(run.turn))

        await Saves(script(DONE), []).run("Q")
        assert len(opened) == 1

    async def test_no_sandbox_is_an_error_before_the_model_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(spec: EnvironmentSpec) -> Environment:
            raise SandboxUnavailableError("no engine answers; start Docker")

        monkeypatch.setattr("agentkit.agent.open_environment", fail)
        asked: list[Sequence[Message]] = []

        def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
            asked.append(messages)
            return DONE

        with pytest.raises(SandboxUnavailableError, match="start Docker"):
            await Agent(ScriptedModel(policy)).run("Q")
        assert asked == []


class TestLimits:
    """Each limit stops the run at the exact point, and the record names it."""

    async def run(self, model: ScriptedModel, environment: Environment, limits: Limits, **options: object) -> Outcome:
        result = await Agent(model, limits=limits, **options).run("Q", environment=environment)  # type: ignore[arg-type]
        self.trajectory = result.trajectory
        assert result.trajectory.outcome is not None
        return result.trajectory.outcome

    async def test_max_turns(self, script: Script, environment: Environment) -> None:
        outcome = await self.run(script(LOOK), environment, Limits(max_turns=3))
        assert (outcome.status, outcome.limit, outcome.answer, outcome.usage.turns) == ("limit", "max_turns", None, 3)
        assert LimitReached("max_turns") in self.trajectory.records

    async def test_max_tokens_stops_at_that_token(
        self, script: Script, environment: Environment, tokenizer: Tokenizer
    ) -> None:
        whole = await self.run(script(AssistantTurn("Hm.", "A long answer.")), environment, Limits())
        for count in range(1, whole.usage.sampled_tokens):
            outcome = await self.run(
                script(AssistantTurn("Hm.", "A long answer.")), environment, Limits(max_tokens=count)
            )
            assert (outcome.limit, outcome.usage.sampled_tokens) == ("max_tokens", count)
            sampled, forced = self.trajectory.segments[1:]
            closing = ["</think>"] if "</think>" not in tokenizer.decode(sampled.ids) else []
            assert tokenizer.decode(forced.ids) == "".join([*closing, "<｜end▁of▁sentence｜>"])
            assert self.trajectory.loss_mask[-len(forced.ids) :] == [0] * len(forced.ids)
            assert rebuild_token_ids(self.trajectory, tokenizer) == self.trajectory.token_ids

    async def test_tokens_of_one_turn(self, script: Script, environment: Environment) -> None:
        model = script(LOOK, AssistantTurn(None, "x" * 300))
        limits = Limits(max_tokens_per_turn=200, max_tokens=10_000, max_turns=2)
        outcome = await self.run(model, environment, limits)
        assert (outcome.limit, outcome.usage.turns) == ("max_tokens_per_turn", 2)
        assert len(self.trajectory.segments[-2].ids) == 200

    async def test_a_turn_is_bounded_by_default(self) -> None:
        assert Limits().max_tokens_per_turn == 32_768

    async def test_max_tokens_inside_a_call(self, script: Script, environment: Environment) -> None:
        agent = Agent(script(LOOK, AssistantTurn(None, "Go on?")), limits=Limits(max_tokens=90), thinking="never")
        result = await agent.run("Q", environment=environment)
        assert result.limit == "max_tokens"
        assert results(result.trajectory)[0].startswith("Error: malformed call: ")
        result = await result.continue_("Well?")
        assert result.answer == "Go on?"

    async def test_thinking_per_turn(self, script: Script, environment: Environment, tokenizer: Tokenizer) -> None:
        limits = Limits(max_thinking_tokens_per_turn=5)
        outcome = await self.run(script(AssistantTurn("A long thought.", "Done.")), environment, limits)
        assert (outcome.status, outcome.answer) == ("answered", "Done.")
        _, thought, closing, rest = self.trajectory.segments
        assert tokenizer.decode(thought.ids) == "A lon"
        assert (closing.kind, tokenizer.decode(closing.ids)) == ("forced", "</think>")
        assert tokenizer.decode(rest.ids) == "Done.<｜end▁of▁sentence｜>"
        assert (outcome.usage.thinking_tokens, outcome.usage.forced_tokens) == (5, 1)
        assert rebuild_token_ids(self.trajectory, tokenizer) == self.trajectory.token_ids

    async def test_thinking_over_all_turns(self, script: Script, environment: Environment) -> None:
        outcome = await self.run(
            script(LOOK, LOOK, SUBMIT), environment, Limits(max_thinking_tokens=20), thinking="always"
        )
        assert outcome.status == "submitted"
        assert outcome.usage.thinking_tokens == 20
        assert thinks(self.trajectory) == [True, True, False]

    async def test_wall_time_in_a_call(self, script: Script, environment: Environment) -> None:
        model = script(turn(("bash", {"command": "sleep 1000"}), ("list_dir", {})))
        outcome = await self.run(model, environment, Limits(wall_time_s=1.0))
        assert outcome.limit == "wall_time_s"
        assert results(self.trajectory) == [
            "Error: stopped before it finished: the run's limit wall_time_s was reached",
            "(empty)",
        ]

    async def test_wall_time_in_a_generation(self, script: Script, environment: Environment) -> None:
        class Stalls(Agent):
            async def ask(self, run: Run, calls: TurnCalls, *, think: bool) -> LimitName | None:
                await anyio.sleep_forever()
                raise AssertionError

        result = await Stalls(script(SUBMIT), limits=Limits(wall_time_s=0.05)).run("Q", environment=environment)
        assert (result.status, result.limit, result.answer) == ("limit", "wall_time_s", None)

    async def test_tool_time(self, script: Script, environment: Environment) -> None:
        model = script(turn(("list_dir", {})), turn(("bash", {"command": "sleep 1000"})))
        outcome = await self.run(model, environment, Limits(tool_time_s=0.5))
        assert (outcome.limit, outcome.usage.turns) == ("tool_time_s", 2)
        assert 0.4 < outcome.usage.tool_time_s < 5

    async def test_a_call_that_times_out_does_not_affect_other_calls(
        self, script: Script, environment: Environment
    ) -> None:
        @tool
        async def wait() -> str:
            """Wait."""
            await anyio.sleep_forever()
            return ""

        @tool
        async def hurry() -> str:
            """Hurry."""
            return "done"

        model = script(turn(("wait", {}), ("hurry", {})), AssistantTurn(None, "Well."))
        outcome = await self.run(model, environment, Limits(call_timeout_s=0.1), tools=[wait, hurry])
        assert outcome.status == "answered"
        assert results(self.trajectory) == ["Error: wait timed out after 0.1 s", "done"]

    async def test_calls_beyond_the_limit_are_refused(self, script: Script, environment: Environment) -> None:
        await self.run(script(turn(*[("list_dir", {})] * 3), SUBMIT), environment, Limits(max_calls_per_turn=2))
        assert results(self.trajectory)[:3] == [
            "(empty)",
            "(empty)",
            "Error: at most 2 calls can be made in one turn; make it again",
        ]


async def test_a_tool_gets_the_environment(script: Script, environment: Environment) -> None:
    @tool
    async def where(context: ToolContext) -> str:
        """Where am I?"""
        return context.environment.spec.workdir

    result = await Agent(script(turn(("where", {})), AssistantTurn(None, "ok")), [where]).run(
        "Q", environment=environment
    )
    assert results(result.trajectory) == [environment.spec.workdir]


async def test_events_and_messages_of_a_policy(environment: Environment, tokenizer: Tokenizer) -> None:
    seen: list[Sequence[Message]] = []

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        seen.append(list(messages))
        return AssistantTurn("r" if think else None, "bye")

    result = await Agent(ScriptedModel(policy, tokenizer)).run("hello", environment=environment)
    assert seen == [[SystemMessage(DEFAULT_SYSTEM), UserMessage("hello")]]
    assert MessageAdded(AssistantMessage("bye", "r")) in result.trajectory.records


async def test_plain_functions_are_tools(script: Script, environment: Environment) -> None:
    def add(a: int, b: int = 2) -> int:
        """Add two numbers."""
        return a + b

    agent = Agent(script(turn(("add", {"a": 40})), AssistantTurn(None, "done")), [add, *BUILTINS.values()])
    result = await agent.run("Q", environment=environment)
    assert results(result.trajectory) == ["42"]
    assert result.trajectory.header.tools[0]["function"]["description"] == "Add two numbers."
    with pytest.raises(ToolDefinitionError, match="has no name; use def"):
        Agent(script(), [lambda x: x, add])


async def test_a_stream_that_continues_a_record_needs_its_environment(script: Script, environment: Environment) -> None:
    agent = Agent(script(SUBMIT, SUBMIT))
    record = (await agent.run("Q", environment=environment)).trajectory
    for wrong in ({}, {"environment": environment, "metadata": {}}, {"environment": environment, "trajectory": "t"}):
        with pytest.raises(ValueError, match="history needs an environment"):
            async for _ in agent.stream("More", history=record, **wrong):  # type: ignore[arg-type]
                pass
