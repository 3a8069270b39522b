"""Threads that share out tasks."""

from __future__ import annotations

import threading

import pytest

from agentkit_kernels.cpu.workers import Workers, available_cores


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_task_is_done_once(count: int) -> None:
    done: list[int] = []
    Workers(count).each(done.append, range(100))
    assert sorted(done) == list(range(100))


def test_tasks_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)
    Workers(2).each(lambda _: both.wait(), range(2))


@pytest.mark.parametrize("count", [1, 3])
def test_an_exception_ends_the_work_and_is_raised(count: int) -> None:
    workers = Workers(count)
    done: list[int] = []

    def fail(task: int) -> None:
        if task == 3:
            raise ZeroDivisionError("task 3")
        done.append(task)

    with pytest.raises(ZeroDivisionError, match="task 3"):
        workers.each(fail, range(100_000))
    assert len(done) < 99_999
    workers.each(done.append, [-1])
    assert done[-1] == -1


def test_one_thread_starts_no_other() -> None:
    threads: set[int] = set()
    Workers(1).each(lambda _: threads.add(threading.get_ident()), range(10))
    assert threads == {threading.get_ident()}
    assert Workers().count == available_cores() >= 1
