"""The tiny model solves a demo task on the Triton backend, under the interpreter, as it does on a CPU: `-m slow`."""

from __future__ import annotations

import pytest

from agentkit.cli.run import Job
from agentkit.cli.terminal import console
from agentkit.models.embedded import EmbeddedModel
from agentkit.task import Task
from agentkit.trajectory import Trajectory
from agentkit_engine import Engine
from agentkit_evals.run import agent_for
from agentkit_evals.suite import load_suite
from agentkit_kernels.triton.launch import LAUNCHES


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.anyio
async def test_tiny_solves_a_demo_task_with_the_tokens_of_a_cpu() -> None:
    """The shortest of the demo's questions that is answered right on a CPU; 86 tokens take 70 s of one core."""
    engine = Engine.load("tiny")
    on_cpu = EmbeddedModel(engine)
    cases = [case for case in load_suite("everyday").cases if case.task.metadata["family"] == "chat"]
    runs = [(case.task, await solved_by(case.task, on_cpu)) for case in cases]
    solved = [(task, record) for task, record in runs if record is not None]
    task, expected = min(solved, key=lambda run: len(run[1].token_ids))

    on_triton = EmbeddedModel(Engine.load("tiny", backend="triton"))
    LAUNCHES.clear()
    record = await solved_by(task, on_triton)
    assert record is not None and record.token_ids == expected.token_ids
    sampled = [place for place, logprob in enumerate(record.logprobs) if logprob is not None]
    assert LAUNCHES["_read"] > len(sampled) > 1
    logits = engine.logits(record.token_ids).log_softmax(-1)
    for place in sampled:
        assert logits[place - 1, record.token_ids[place]].item() == pytest.approx(record.logprobs[place], abs=1e-3)


async def solved_by(task: Task, model: EmbeddedModel) -> Trajectory | None:
    """Return the record of a greedy run in a sandbox if it solves the task, without its time limit."""
    task = task.model_copy(update={"agent": task.agent.model_copy(update={"timeout_s": 3600.0})})
    agent = agent_for(task, model, model.sampling.override(temperature=0.0))
    done = await Job(task, agent, "process", None, None, console(quiet=True)).run()
    return done.result.trajectory if done.failure is None else None
