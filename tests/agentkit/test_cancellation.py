"""A run with parallel calls in a sandbox is cancelled at random moments."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import anyio
import pytest

from agentkit import Agent, AssistantMessage, AssistantTurn, ScriptedModel, ToolMessage, Trajectory
from agentkit.events import CallFinished, CallStarted
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine.chat import Tokenizer
from agentkit_environments import Environment, available_backends, open_environment

MOMENTS = 100
SLACK_S = 5
"""Longest time from a cancellation to the end of everything, on a busy machine; the benchmark `sandboxes` has the
times of an idle one."""
SEED = 20

pytestmark = [pytest.mark.anyio, pytest.mark.hostile]


def bash(command: str) -> tuple[str, dict[str, object]]:
    return "bash", {"command": command}


CALLS = (
    [bash(f"sleep 0.0{number}; touch $RUN/{number}") for number in range(6)],
    [
        bash("touch $RUN/6"),
        bash("setsid sleep 1000 & sleep 0.03; touch $RUN/7"),
        bash("(sleep 1000 & sleep 1000 &); yes > /dev/null & sleep 0.02; touch $RUN/8"),
        ("list_dir", {}),
        bash("trap '' TERM INT; sleep 0.06; touch $RUN/9"),
    ],
)
"""The calls of each turn. Those of bash make a file each when they are done, in the order of the calls."""


async def processes(environment: Environment) -> list[str]:
    """Return the names of the living processes in a sandbox, but for those of its executor and this listing."""
    listed = await environment.exec("cat /proc/[0-9]*/stat 2> /dev/null; true")
    fields = [line.rpartition(")") for line in listed.stdout.splitlines()]
    names = [name.partition("(")[2] for name, _, rest in fields if rest.split()[0] not in "ZX"]
    executor = names[0]  # process 1, which may also have forked the process of the next command
    names.remove("sh")
    return sorted(name for name in names if name != executor)


def tasks() -> set[int]:
    return {task.id for task in anyio.get_running_tasks()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "backend",
    [pytest.param("process", marks=pytest.mark.sandbox), pytest.param("docker", marks=pytest.mark.docker)],
)
async def test_cancelling_parallel_calls_at_a_hundred_moments(
    backend: Literal["process", "docker"], script: Callable[..., ScriptedModel], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Each time the cancellation returns, no process and no task is left, and every call has one true result."""
    if (reason := available_backends()[backend]) is not None:
        pytest.skip(f"{backend}: {reason}")
    draw = random.Random(SEED)
    async with await open_environment(backend=backend) as environment:
        running = tasks()

        async def run(name: str, after_s: float) -> Trajectory | None:
            """Cancel a run after so many seconds, and return its record; None if it had not begun."""
            turns = [
                AssistantTurn("Hm.", "", [(tool, {**rest, **_in(rest, name)}) for tool, rest in calls])
                for calls in CALLS
            ]
            model = script(*turns, AssistantTurn(None, "Done."))
            path = tmp_path / f"{name}.jsonl"
            await environment.exec(f"mkdir {name}")
            with anyio.fail_after(after_s + SLACK_S):
                with anyio.move_on_after(after_s):
                    await Agent(model).run("Q", environment=environment, trajectory=path)
            assert tasks() == running, "a task is left"
            return Trajectory.load(path) if path.exists() else None

        def _in(arguments: dict[str, object], name: str) -> dict[str, object]:
            return {"command": f"RUN={name}; {arguments['command']}"} if "command" in arguments else {}

        start = anyio.current_time()
        whole = await run("whole", 60)
        length_s = anyio.current_time() - start
        assert whole is not None and whole.outcome is not None and whole.outcome.status == "answered"
        await environment.kill_all()

        interrupted = 0
        for number in range(MOMENTS):
            after_s = draw.uniform(0, length_s)
            where = f"moment {number}, after {after_s:.4f} of {length_s:.4f} s"
            record = await run(str(number), after_s)
            files = (await environment.exec(f"ls {number}")).stdout.split()
            if record is None:
                assert not files, where
                continue
            assert record.outcome is not None, where
            if record.outcome.status == "cancelled":
                assert not await processes(environment), where
            else:
                assert record.outcome.status == "answered", where
                await environment.kill_all()
            calls = [call for said in record.messages if isinstance(said, AssistantMessage) for call in said.calls]
            results = [message for message in record.messages if isinstance(message, ToolMessage)]
            assert [call.id for call in calls] == [result.call_id for result in results], where
            finished = [each.result.call_id for each in record.records if isinstance(each, CallFinished)]
            assert len(finished) == len(set(finished)) and set(finished) == {call.id for call in calls}, where
            started = [each.call.id for each in record.records if isinstance(each, CallStarted)]
            assert len(started) == len(set(started)), where
            made = iter(range(10))
            for call, result in zip(calls, results, strict=True):
                file = str(next(made)) if call.name == "bash" else None
                if result.is_error:
                    assert "stopped before it finished" in result.content or "not started" in result.content, where
                    interrupted += call.id in started
                elif file is not None:
                    assert file in files, f"{where}: {call.id} did not finish"
            assert rebuild_token_ids(record, tokenizer) == record.token_ids, where
        assert interrupted > MOMENTS, "most moments are while several calls run"
