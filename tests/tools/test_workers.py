"""Threads of synchronous tools: every call gets one, and abandoned threads do no harm."""

from __future__ import annotations

import contextvars
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentkit_environments import Environment
from agentkit_tools import ToolCall, ToolContext, ToolResult, as_tool, workers

pytestmark = pytest.mark.anyio
WaitUntil = Callable[[Callable[[], bool], str], None]


async def run(fn: Callable[..., Any], context: ToolContext, **arguments: Any) -> ToolResult:
    return await as_tool(fn).call(ToolCall("c", "mine", json.dumps(arguments)), context)


async def run_many(fn: Callable[..., Any], context: ToolContext, count: int) -> list[str]:
    contents = [""] * count

    async def one(index: int) -> None:
        contents[index] = (await run(fn, context)).content

    async with anyio.create_task_group() as task_group:
        for index in range(count):
            task_group.start_soon(one, index)
    return contents


async def test_every_call_has_its_own_thread(environment: Environment) -> None:
    """The calls wait for each other, so they finish only if all of them run at once."""
    everyone = threading.Barrier(100)

    def meet() -> str:
        everyone.wait(60)
        return "met"

    assert await run_many(meet, ToolContext(environment, timeout_s=60), 100) == ["met"] * 100


async def test_stuck_calls_do_not_starve_later_ones(environment: Environment, wait_until: WaitUntil) -> None:
    release = threading.Event()

    def stuck() -> None:
        release.wait(60)

    def quick() -> str:
        return "done"

    before = workers.abandoned()
    try:
        timeouts = await run_many(stuck, ToolContext(environment, timeout_s=0.05), 80)
        assert timeouts == ["Error: stuck timed out after 0.05 s"] * 80
        assert workers.abandoned() == before + 80
        assert (await run(quick, ToolContext(environment))).content == "done"
    finally:
        release.set()
    wait_until(lambda: workers.abandoned() <= before, "abandoned threads to end")


async def test_the_number_of_stuck_calls_is_bounded(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_ABANDONED", workers.abandoned() + 1)
    release, ran = threading.Event(), threading.Event()

    def stuck() -> None:
        release.wait(60)

    try:
        await run(stuck, ToolContext(environment, timeout_s=0.05))
        result = await run(ran.set, ToolContext(environment))
        assert result.is_error
        assert result.content.startswith("Error: not run: ")
        assert "still running after their deadlines" in result.content
        assert not ran.is_set()
    finally:
        release.set()


async def test_a_coroutine_returned_after_the_deadline_is_closed(
    environment: Environment, wait_until: WaitUntil
) -> None:
    """An unclosed coroutine would warn, and warnings are errors."""
    release, ended = threading.Event(), threading.Event()

    async def inner() -> None: ...

    def late() -> Any:
        release.wait(60)
        ended.set()
        return inner()

    before = workers.abandoned()
    await run(late, ToolContext(environment, timeout_s=0.05))
    release.set()
    assert ended.wait(60)
    wait_until(lambda: workers.abandoned() <= before, "abandoned threads to end")


async def test_context_variables_reach_the_thread(context: ToolContext) -> None:
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("mine")

    def read() -> str:
        return variable.get()

    assert (await run(read, context)).content == "mine"


PROGRAM = """
import sys, threading, time
import anyio
from agentkit_environments import EnvironmentSpec, open_environment
from agentkit_tools import ToolCall, ToolContext, tool

@tool
def sync() -> None:
    print("begun", flush=True)
    time.sleep(600)

@tool
async def later() -> None:
    print("begun", flush=True)
    await anyio.sleep(600)

@tool
async def busy() -> None:
    print("begun", flush=True)
    while True:
        await anyio.lowlevel.checkpoint()

async def main(made, timeout_s):
    async with await open_environment(EnvironmentSpec(), backend="unsafe-local") as environment:
        result = await made.call(ToolCall("c", made.name, ""), ToolContext(environment, timeout_s=timeout_s))
        print(result.content, flush=True)

try:
    anyio.run(main, {"sync": sync, "later": later, "busy": busy}[sys.argv[1]], float(sys.argv[2]))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def start(tmp_path: Path, name: str, timeout_s: str) -> subprocess.Popen[str]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), name, timeout_s]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_stuck_thread_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    with start(tmp_path, "sync", "0.1") as process:
        assert process.communicate(timeout=60)[0] == "Error: sync timed out after 0.1 s\n"


@pytest.mark.parametrize("name", ["sync", "later", "busy"])
def test_ctrl_c_ends_the_run_rather_than_the_call(tmp_path: Path, name: str) -> None:
    with start(tmp_path, name, "600") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "interrupted\n"
