"""torch's thread count: one where an exact engine computes, and unchanged everywhere else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from agentkit_engine import AsyncEngine, Engine, ModelSpec, SamplingParams
from agentkit_engine.runtime.threads import OneThread

from .conftest import make_random_decoder, small_config, some_ids

pytestmark = pytest.mark.usefixtures("two_threads")
PARAMS = SamplingParams(temperature=0, max_tokens=3)


def count_of_a_new_thread() -> int:
    counts: list[int] = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return counts[0]


def counts() -> tuple[int, int]:
    return torch.get_num_threads(), count_of_a_new_thread()


def make_engine(*, exact: bool = True, backend: str = "reference") -> Engine:
    decoder = make_random_decoder(ModelSpec.from_config(small_config(0, 4)))
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"), exact=exact, backend=backend)


def test_a_function_runs_on_one_thread_wherever_it_is_called() -> None:
    run = OneThread()
    assert run(torch.get_num_threads) == 1
    assert counts() == (2, 2)
    # a function that is already on that thread stays there
    assert run(lambda: run(threading.current_thread)) is run(threading.current_thread)
    assert run(threading.current_thread) is not threading.current_thread()


def test_an_error_of_the_function_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        OneThread()(lambda: 1 / 0)


def test_a_forward_of_an_exact_engine_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    forward, seen = engine.scheduler.runner.forward, []

    def note(*args: Any) -> object:
        seen.append(torch.get_num_threads())
        return forward(*args)

    monkeypatch.setattr(engine.scheduler.runner, "forward", note)
    with engine.session() as session:
        session.append(some_ids(20))
        for _ in session.generate(PARAMS):
            assert counts() == (2, 2)
    engine.logits(some_ids(5))
    assert seen and set(seen) == {1}
    assert counts() == (2, 2)


@pytest.mark.parametrize(("exact", "backend"), [(False, "reference"), (True, "cpu")])
def test_other_engines_compute_in_the_callers_thread(
    exact: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(exact=exact, backend=backend)
    forward, seen = engine.scheduler.runner.forward, []

    def note(*args: Any) -> object:
        seen.append((torch.get_num_threads(), threading.current_thread()))
        return forward(*args)

    monkeypatch.setattr(engine.scheduler.runner, "forward", note)
    engine.logits(some_ids(5))
    assert seen == [(2, threading.current_thread())]


@pytest.mark.anyio
async def test_an_async_engine_changes_no_thread_count_of_others() -> None:
    engine = make_engine()
    async with AsyncEngine(engine) as running, running.session() as session:
        assert await running.call(torch.get_num_threads) == 1
        await session.append(some_ids(20))
        async for _ in session.generate(PARAMS):
            assert counts() == (2, 2)
        model_thread = await running.call(threading.current_thread)
    assert counts() == (2, 2)
    assert model_thread is not threading.current_thread()
