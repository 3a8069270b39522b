"""Epochs of one task share what they have in common: the engine computes it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agentkit.benchmarks.sharing import Counts
from agentkit.benchmarks.steered import SteeredModel
from agentkit.models.scripted import Policy
from agentkit.task import Task
from agentkit_engine import AsyncEngine, Engine
from agentkit_engine.runtime.capacity import KV_CACHE_BYTES
from agentkit_evals.run import EvalRun, TrialStarted, Update
from agentkit_evals.suite import Case, Suite

pytestmark = pytest.mark.anyio
TASKS, EPOCHS = 3, 4
ROOM = 20
"""Spans of 256 tokens: two trials of about 1,900 tokens, and little more."""


@pytest.mark.parametrize("concurrency", [2, 4])
async def test_epochs_prefill_their_common_prefix_once(
    number_task: Callable[..., Task], script: Callable[..., Policy], tmp_path: Path, concurrency: int
) -> None:
    """Also where the cache has no room for the prompts of all tasks: epochs of a task start one after another."""
    policy = script([("read_file", {"path": "n.txt"})], [("submit", {"answer": "42"})])
    tasks = [
        number_task(f"task{number}", instruction=" ".join(str(7919 * number + word) for word in range(300)))
        for number in range(1, TASKS + 1)
    ]
    spans = Engine.load("tiny").scheduler.capacity.spans
    engine = Engine.load("tiny", kv_cache_bytes=ROOM * KV_CACHE_BYTES // spans)
    assert engine.scheduler.capacity.spans <= ROOM
    started: list[str] = []

    def listen(update: Update) -> None:
        if isinstance(update, TrialStarted):
            started.append(update.trial)

    async with AsyncEngine(engine) as running:
        run = EvalRun(
            Suite("tests", tuple(Case(task, "tests") for task in tasks)),
            SteeredModel(running, policy),
            tmp_path / "run",
            model_name="steered",
            epochs=EPOCHS,
            concurrency=concurrency,
            backend="unsafe-local",
            listener=listen,
        )
        directory = await run.execute()
    assert directory.complete and all(trial.solved for trial in directory.trials)
    assert started == [f"{task.id}.{epoch}" for task in tasks for epoch in range(EPOCHS)]
    records = [record for trial in directory.trials if (record := directory.trajectory(trial)) is not None]
    counts = Counts.of(records)
    print(counts, engine.scheduler.prefilled)
    assert engine.scheduler.prefilled <= 1.02 * counts.unique
    for task in tasks:
        usages = [trial.usage for trial in directory.trials if trial.task == task.id]
        prompt = usages[0].prompt_tokens
        assert sum(usage.cache_miss_tokens for usage in usages) < 1.1 * prompt
        assert sum(usage.cache_hit_tokens for usage in usages) > (EPOCHS - 1) * 0.9 * prompt
