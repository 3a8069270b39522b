"""The tiny model solves a task of `agentkit demo` on the Triton backend, under the interpreter: `-m slow`."""

from __future__ import annotations

import pytest

from agentkit.cli.run import Job
from agentkit.cli.terminal import console
from agentkit.models.embedded import EmbeddedModel
from agentkit_engine import Engine
from agentkit_evals.run import agent_for
from agentkit_evals.suite import SynthSelection, synth_suite
from agentkit_kernels.triton.launch import LAUNCHES


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.anyio
async def test_tiny_solves_a_demo_task() -> None:
    """The shortest one: it reads 23 tokens and answers with 16, without a tool, in 80 s of one core."""
    case = synth_suite(SynthSelection(families=["chat"]), seed=1).cases[1]
    model = EmbeddedModel(Engine.load("tiny", backend="triton"))
    agent = agent_for(case.task, model, model.sampling.override(temperature=0.0))
    LAUNCHES.clear()
    done = await Job(case.task, agent, "process", None, None, console(quiet=True)).run()
    assert done.verdict is not None
    assert done.verdict.reward == 1.0
    assert LAUNCHES["_read"] > done.result.usage.sampled_tokens > 1
