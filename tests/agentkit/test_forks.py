"""Forks of a run: the branch has the shared tokens and files, and nothing that happens in it is seen elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    EmbeddedModel,
    Limits,
    Message,
    RunResult,
    ScriptedModel,
    Trajectory,
    tool,
)
from agentkit.benchmarks.steered import SteeredModel
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine import AsyncEngine, Engine
from agentkit_engine.chat import Tokenizer
from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    SandboxLostError,
    SandboxUnavailableError,
    available_backends,
    open_environment,
)
from agentkit_environments.docker.engine import BASE_IMAGE
from agentkit_tools import BUILTINS

from .conftest import get_weather

pytestmark = pytest.mark.anyio
NO_DOCKER = available_backends()["docker"]
Script = Callable[..., ScriptedModel]


def bash(command: str) -> AssistantTurn:
    return AssistantTurn("Hm.", calls=[("bash", {"command": command})])


def results(result: RunResult) -> list[str]:
    return [each.content.strip() for each in result.trajectory.results]


WRITES = (
    bash("echo 0 >>log; echo 0 >>/tmp/log"),
    bash("echo 1 >>log"),
    bash("cat log /tmp/log"),
    AssistantTurn("", "Done."),
)


async def test_a_branch_has_the_turns_and_the_files_before_it(
    script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    result = await Agent(script(*WRITES)).run("Q", environment=environment, snapshots=True)
    assert results(result)[2] == "0\n1\n0"
    await environment.write_file("log", "the original has gone on")
    for turn in range(4):
        [branch] = await result.fork(at_turn=turn)
        assert (branch.answer, branch.usage.turns, results(branch)) == ("Done.", 4 - turn, results(result))
        assert branch.trajectory.token_ids == result.trajectory.token_ids
        assert rebuild_token_ids(branch.trajectory, tokenizer) == branch.trajectory.token_ids
        header = branch.trajectory.header
        assert header.metadata == {"forked_from": result.trajectory.header.id, "at_turn": turn}
        assert header.id != result.trajectory.header.id
        # a branch of a branch, at a turn that it shares and at one of its own
        for again in {0, 3}:
            assert results((await branch.fork(at_turn=again))[0]) == results(result)
    assert await environment.read_file("log") == b"the original has gone on"


@pytest.mark.docker
@pytest.mark.skipif(NO_DOCKER is not None, reason=f"no Docker: {NO_DOCKER}")
async def test_a_branch_of_a_run_in_a_whole_image_has_its_root(script: Script) -> None:
    """Harbor tasks run in such sandboxes; also a branch of a branch, and a branch that is continued."""
    turns = (bash("echo 0 >>/etc/log"), bash("echo 1 >>/etc/log"), bash("cat /etc/log"), AssistantTurn("", "Done."))
    spec = EnvironmentSpec(image=BASE_IMAGE, as_image=True, workdir="")
    async with await open_environment(spec, backend="docker") as environment:
        agent = Agent(script(*turns, bash("cat /etc/log"), AssistantTurn("", "Bye.")))
        result = await agent.run("Q", environment=environment, snapshots=True)
        await environment.write_file("/etc/log", "the original has gone on")
        branches = await result.fork(at_turn=1, n=2)
        assert [results(branch) for branch in branches] == [results(result)] * 2
        assert results((await branches[0].fork(at_turn=2))[0])[-1] == "0\n1"
        assert results(await branches[0].continue_("And?"))[-1] == "0\n1"


async def test_branches_differ_and_do_not_see_each_other(environment: Environment, tokenizer: Tokenizer) -> None:
    """Each branch writes the number of branches that have begun before it, and reads the file after all have."""
    begun: list[str] = []
    all_begun = anyio.Event()

    @tool
    async def meet() -> str:
        """Wait for the other branches."""
        if len(begun) == 4:
            all_begun.set()
        await all_begun.wait()
        return ""

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        said = sum(isinstance(message, AssistantMessage) for message in messages)
        if said == 1:
            begun.append(str(len(begun)))
            return bash(f"echo {begun[-1]} >>log")
        return [
            bash("echo start >log"),
            bash(""),
            AssistantTurn(calls=[("meet", {})]),
            bash("cat log"),
            AssistantTurn("", "Done."),
        ][said]

    agent = Agent(ScriptedModel(policy, tokenizer), [BUILTINS["bash"], meet])
    begun.extend("xxx")
    result = await agent.run("Q", environment=environment, snapshots=True)
    begun.clear()
    all_begun = anyio.Event()
    branches = await result.fork(at_turn=1, n=4)
    assert sorted(results(branch)[3] for branch in branches) == [f"start\n{number}" for number in range(4)]
    assert (await environment.read_file("log")).decode() == "start\n3\n"


async def test_branches_are_recorded_beside_the_run(script: Script, environment: Environment, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    result = await Agent(script(*WRITES)).run("Q", environment=environment, trajectory=path, snapshots=True)
    branches = await result.fork(at_turn=2, n=2) + await result.fork(at_turn=0)
    assert [branch.trajectory.path for branch in branches] == [
        tmp_path / f"run.fork{number}.jsonl" for number in (1, 2, 3)
    ]
    for branch in branches:
        assert branch.trajectory.path is not None
        loaded = Trajectory.load(branch.trajectory.path)
        assert (loaded.header, loaded.records) == (branch.trajectory.header, branch.trajectory.records)
        assert loaded.times_s == sorted(loaded.times_s)
        assert loaded.usage.turns == 4  # of the session, with the shared turns
    assert Trajectory.load(path).records == result.trajectory.records


async def test_a_branch_can_be_continued_with_its_files(script: Script, environment: Environment) -> None:
    agent = Agent(
        script(
            *WRITES,
            bash("cat log; echo more >>log"),
            AssistantTurn("", "Bye."),
            bash("cat log"),
            AssistantTurn("", "End."),
        )
    )
    result = await agent.run("Q", environment=environment, snapshots=True)
    [branch] = await result.fork(at_turn=1)
    await environment.write_file("log", "")
    continued = await branch.continue_("Go on.")
    assert results(continued)[-1] == "0\n1"
    # a fork at a turn of the first run, and one in the second, of the result of both
    assert (await continued.fork(at_turn=2))[0].answer == "Done."
    assert results((await continued.fork(at_turn=4))[0])[-1] == "0\n1"
    assert results(await continued.continue_("And?"))[-1] == "0\n1\nmore"
    assert results((await continued.fork(at_turn=4))[0])[-1] == "0\n1"
    with pytest.raises(ValueError, match="0 to 5; got 6"):
        await continued.fork(at_turn=6)


async def test_a_continued_run_is_forked_with_what_its_environment_held_then(
    script: Script, environment: Environment
) -> None:
    """Also if the caller has changed a file between the two runs."""
    agent = Agent(script(AssistantTurn("", "Done."), bash("cat log"), AssistantTurn("", "Bye.")))
    result = await agent.run("Q", environment=environment, snapshots=True)
    await environment.write_file("log", "between")
    result = await result.continue_("And?")
    await environment.write_file("log", "after")
    assert results((await result.fork(at_turn=1))[0]) == ["between"]
    assert results((await result.fork(at_turn=0))[0]) == []


async def test_a_run_without_turns_cannot_be_forked(script: Script, environment: Environment) -> None:
    limits = Limits(wall_time_s=1e-9)
    result = await Agent(script(*WRITES), limits=limits).run("Q", environment=environment, snapshots=True)
    with pytest.raises(ValueError, match="but it has none; got 0"):
        await result.fork(at_turn=0)


async def test_runs_without_an_environment_need_no_snapshots(script: Script) -> None:
    result = await Agent(
        script(AssistantTurn(calls=[("get_weather", {"city": "Oslo"})]), AssistantTurn("", "Done.")), [get_weather]
    ).run("Q")
    for turn in (0, 1):
        branches = await result.fork(at_turn=turn, n=2)
        assert [results(branch) for branch in branches] == [["snowy, -3 degrees"]] * 2


async def test_what_cannot_be_forked_is_refused(script: Script, environment: Environment) -> None:
    result = await Agent(script(*WRITES)).run("Q", environment=environment)
    with pytest.raises(ValueError, match="run it with snapshots=True"):
        await result.fork(at_turn=1)
    result = await Agent(script(*WRITES)).run("Q", environment=environment, snapshots=True)
    for turn in (-1, 4):
        with pytest.raises(
            ValueError, match=f"at_turn must be the number of a turn of this session, 0 to 3; got {turn}"
        ):
            await result.fork(at_turn=turn)
    with pytest.raises(ValueError, match="n"):
        await result.fork(at_turn=1, n=0)
    with pytest.raises(TypeError, match="at_turn"):
        await result.fork(at_turn="1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "limit"),
    [
        (Limits(max_turns=3), "max_turns"),
        (Limits(max_tokens=70), "max_tokens"),
    ],
    ids=["turns", "tokens"],
)
async def test_limits_count_the_shared_turns(
    script: Script, environment: Environment, limits: Limits, limit: str
) -> None:
    result = await Agent(script(bash("true")), limits=limits).run("Q", environment=environment, snapshots=True)
    assert result.limit == limit
    for turn in range(result.usage.turns):
        [branch] = await result.fork(at_turn=turn)
        assert branch.limit == limit
        assert branch.trajectory.token_ids == result.trajectory.token_ids
        assert branch.usage.turns == result.usage.turns - turn
        assert branch.trajectory.usage.sampled_tokens == result.trajectory.usage.sampled_tokens


async def test_a_second_try_is_not_given_again(script: Script, environment: Environment) -> None:
    class Number(BaseModel):
        value: int

    agent = Agent(
        script(AssistantTurn("", '{"value": "x"}'), AssistantTurn("", '{"value": 1.5}')), [], output_type=Number
    )
    result = await agent.run("Q", environment=environment, snapshots=True)
    assert (result.status, result.usage.turns) == ("invalid_output", 2)
    for turn in (0, 1):
        [branch] = await result.fork(at_turn=turn)
        assert (branch.status, branch.trajectory.token_ids) == (result.status, result.trajectory.token_ids)


async def test_auto_thinking_is_the_same_in_a_branch(script: Script, environment: Environment) -> None:
    agent = Agent(script(bash("exit 1"), bash("true"), bash("exit 1"), AssistantTurn("Hm.", "Done.")), thinking="auto")
    result = await agent.run("Q", environment=environment, snapshots=True)
    result = await result.continue_("Again")
    for turn in range(5):
        [branch] = await result.fork(at_turn=turn)
        ids = branch.trajectory.token_ids
        assert ids == result.trajectory.token_ids[: len(ids)]
        assert branch.answer == "Done."


async def test_best_of_judges_open_environments(script: Script, environment: Environment) -> None:
    result = await Agent(script(*WRITES)).run("Q", environment=environment, snapshots=True)
    judged: list[Environment] = []

    async def judge(branch: RunResult, world: Environment) -> float:
        judged.append(world)
        score = [1, 5, 5, -2][len(judged) - 1]
        assert branch.answer == "Done."
        assert await world.read_file("log") == b"0\n1\n"
        return score

    chosen = await result.best_of(4, judge, at_turn=1)
    assert sorted(chosen.scores) == [-2, 1, 5, 5]
    assert chosen.best is chosen.results[chosen.scores.index(5)]
    for world in judged:
        with pytest.raises(SandboxLostError):
            await world.exec("true")
    assert (await result.best_of(1, lambda branch, world: True, at_turn=3)).scores == (1.0,)


async def test_best_of_a_task(script: Script, environment: Environment, tmp_path: Path) -> None:
    await environment.write_file("log", "before\n")

    async def judge(result: RunResult, world: Environment) -> float:
        return len(await world.read_file("log"))

    path = tmp_path / "run.jsonl"
    agent = Agent(script(*WRITES))
    chosen = await agent.best_of("Q", n=3, judge=judge, environment=environment, trajectory=path)
    assert chosen.scores == (11, 11, 11)
    assert chosen.best is chosen.results[0]
    assert sorted(os.listdir(tmp_path)) == ["run.fork1.jsonl", "run.fork2.jsonl", "run.fork3.jsonl"]
    assert await environment.read_file("log") == b"before\n"


@pytest.mark.parametrize("own_turns", [0, 1, 2])
async def test_an_interrupted_branch_is_resumed(
    script: Script, environment: Environment, tmp_path: Path, own_turns: int
) -> None:
    """Its usage is that of its own turns, and the shared turns still count towards the limits."""
    agent = Agent(script(bash("true")), limits=Limits(max_turns=4))
    result = await agent.run("Q", environment=environment, snapshots=True, trajectory=tmp_path / "run.jsonl")
    [branch] = await result.fork(at_turn=1)
    path = tmp_path / "run.fork1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    starts = [index for index, line in enumerate(lines) if b'"turn_started"' in line]
    path.write_bytes(b"".join(lines[: starts[1 + own_turns] + 1]))
    resumed = await agent.resume(path, environment=environment)
    assert (resumed.limit, resumed.trajectory.token_ids) == ("max_turns", branch.trajectory.token_ids)
    assert (resumed.usage.turns, resumed.usage.calls) == (branch.usage.turns, branch.usage.calls) == (3, 3)
    assert resumed.usage.sampled_tokens == branch.usage.sampled_tokens


@pytest.mark.parametrize(
    ("score", "error"),
    [("high", TypeError), (None, TypeError), (float("nan"), ValueError)],
    ids=["text", "none", "nan"],
)
async def test_a_judge_returns_a_number(
    script: Script, environment: Environment, score: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="a judge must return a number, got"):
        await Agent(script(AssistantTurn("", "Done."))).best_of(
            "Q", n=2, judge=lambda result, world: score, environment=environment
        )


async def test_a_failed_branch_stops_the_others_and_closes_all(
    script: Script, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = await Agent(script(*WRITES)).run("Q", environment=environment, snapshots=True)
    opened: list[Environment] = []
    calls = 0
    reopen = type(environment).reopen

    async def fails_at_last(self: Any, snapshot: Any) -> Environment:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise SandboxUnavailableError("no room")
        opened.append(await reopen(self, snapshot))
        return opened[-1]

    monkeypatch.setattr(type(environment), "reopen", fails_at_last)
    with pytest.raises(SandboxUnavailableError, match="no room"):
        await result.fork(at_turn=1, n=3)
    for world in opened:
        with pytest.raises(SandboxLostError):
            await world.exec("true")


async def test_a_run_in_its_own_sandbox(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked, and continued with the files of /tmp and their modes."""

    async def open_local(spec: EnvironmentSpec) -> Environment:
        return await open_environment(spec, backend="unsafe-local")

    monkeypatch.setattr("agentkit.agent.open_environment", open_local)
    more = (bash("cat log /tmp/log; stat -c %a log"), AssistantTurn("", "Bye."))
    write = bash("echo 0 >log; echo tmp >/tmp/log; chmod 640 log")
    result = await Agent(script(write, AssistantTurn("", "Done."), *more)).run("Q", snapshots=True)
    [branch] = await result.fork(at_turn=1)
    assert branch.answer == "Done."
    for each in (result, branch):
        continued = await each.continue_("And?")
        assert results(continued)[-1] == "0\ntmp\n640"


@pytest.mark.parametrize("temperature", [0.0, 3.0], ids=["greedy", "seeded"])
async def test_a_branch_with_the_same_seed_is_the_run_bit_for_bit(
    tiny: EmbeddedModel, environment: Environment, temperature: float
) -> None:
    """Ids and log-probabilities, whatever the model says; a branch with another seed is another run."""
    async with tiny as model:
        agent = Agent(
            model,
            [get_weather],
            sampling=model.sampling.override(temperature=temperature, seed=11),
            limits=Limits(max_turns=3, max_tokens_per_turn=40),
        )
        result = await agent.run("What is the weather in Paris?", environment=environment, snapshots=True)
        result = await result.continue_("And in Oslo?")
        turns = sum(isinstance(message, AssistantMessage) for message in result.trajectory.messages)
        assert turns >= 2
        last = [record.turn for record in result.trajectory.records if record.type == "turn_started"][-1]
        for turn in (1, last):
            [branch] = await result.fork(at_turn=turn, seed=11)
            length = len(branch.trajectory.token_ids)
            assert branch.trajectory.token_ids == result.trajectory.token_ids[:length]
            assert branch.trajectory.logprobs == result.trajectory.logprobs[:length]
        assert length == len(result.trajectory.token_ids)
        branches = await result.fork(at_turn=last, n=2)
        assert [branch.trajectory.header.sampling.seed for branch in branches] == [12, 13]
        if temperature:
            assert len({tuple(branch.trajectory.token_ids) for branch in (*branches, result)}) > 1
        cold = Engine.load("tiny")
        for branch in branches:  # computed by an engine that has seen nothing of the shared turns
            ids = branch.trajectory.token_ids
            logprobs = cold.logits(ids).log_softmax(-1)
            for place, recorded in enumerate(branch.trajectory.logprobs):
                if recorded is not None:
                    assert recorded == pytest.approx(logprobs[place - 1, ids[place]].item(), abs=1e-4)


async def test_branches_prefill_the_shared_tokens_once(environment: Environment) -> None:
    """Neither while the run's own state is in the cache, nor with a cold cache, where one of them computes it."""

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        said = sum(isinstance(message, AssistantMessage) for message in messages)
        city = AssistantTurn(calls=[("get_weather", {"city": "Oslo"})])
        return city if said < 4 else AssistantTurn("", "Done.")

    engine = Engine.load("tiny")
    async with AsyncEngine(engine) as running:
        agent = Agent(SteeredModel(running, policy), [get_weather], system="Be brief. " * 150, effort="none")
        result = await agent.run("What is the weather?", environment=environment, snapshots=True)
        prompt = len(result.trajectory.segments[0].ids)
        assert prompt > 500
        before = engine.scheduler.prefilled
        branches = await result.fork(at_turn=3, n=4)
        warm = engine.scheduler.prefilled - before
        assert [branch.trajectory.token_ids for branch in branches] == [result.trajectory.token_ids] * 4
        assert warm == sum(branch.usage.cache_miss_tokens for branch in branches) < prompt / 4
        assert all(branch.usage.cache_hit_tokens > prompt for branch in branches)
    cold = Engine.load("tiny")
    async with AsyncEngine(cold) as running:
        agent.model = SteeredModel(running, policy)
        branches = await result.fork(at_turn=3, n=4)
        shared = len(result.trajectory.token_ids)
        assert [branch.trajectory.token_ids for branch in branches] == [result.trajectory.token_ids] * 4
        assert cold.scheduler.prefilled < shared * 1.1


def test_synchronous_forks(script: Script) -> None:
    agent = Agent(
        script(AssistantTurn(calls=[("get_weather", {"city": "Oslo"})]), AssistantTurn("", "Done.")), [get_weather]
    )
    result = agent.run_sync("Q", snapshots=True)
    assert [branch.answer for branch in result.fork_sync(at_turn=1, n=2)] == ["Done."] * 2
    assert result.best_of_sync(2, lambda branch, world: 1, at_turn=0).best.answer == "Done."
