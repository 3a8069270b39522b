"""The tiny model answers a request on the Triton backend, under the interpreter, as it does on a CPU: `-m slow`."""

from __future__ import annotations

import pytest

from agentkit.cli.run import Job
from agentkit.cli.terminal import console
from agentkit.models.embedded import EmbeddedModel
from agentkit_engine import Engine
from agentkit_evals.run import agent_for
from agentkit_evals.suite import load_suite
from agentkit_kernels.triton.launch import LAUNCHES


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.anyio
async def test_tiny_samples_with_the_log_probabilities_of_a_cpu() -> None:
    """A short task, which needs no tool; 40 tokens take 80 s of one core."""
    case = next(case for case in load_suite("everyday").cases if case.task.id == "chat-plain-yes")
    task = case.task.model_copy(update={"tools": []})
    model = EmbeddedModel(Engine.load("tiny", backend="triton"))
    agent = agent_for(task, model, model.sampling.override(temperature=0.0, max_tokens=20))
    LAUNCHES.clear()
    done = await Job(task, agent, "process", None, None, console(quiet=True)).run()
    assert LAUNCHES["_read"] > done.result.usage.sampled_tokens > 1
    record = done.result.trajectory
    expected = Engine.load("tiny").logits(record.token_ids).log_softmax(-1)
    for place, (token, logprob) in enumerate(zip(record.token_ids, record.logprobs, strict=True)):
        if logprob is not None:
            assert expected[place - 1, token].item() == pytest.approx(logprob, abs=1e-3)
