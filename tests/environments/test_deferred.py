"""An environment that is opened on first use."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from agentkit_environments import (
    DeferredEnvironment,
    Environment,
    EnvironmentSpec,
    SandboxLostError,
    SandboxUnavailableError,
    open_environment,
)

pytestmark = pytest.mark.anyio


class Opener:
    """Opens `unsafe-local` environments and keeps them."""

    def __init__(self) -> None:
        self.opened: list[Environment] = []

    async def __call__(self, spec: EnvironmentSpec) -> Environment:
        self.opened.append(await open_environment(spec, backend="unsafe-local", run_id="deferred"))
        return self.opened[-1]


async def test_concurrent_first_uses_open_one_environment() -> None:
    opener = Opener()
    async with DeferredEnvironment(EnvironmentSpec(env={"NAME": "value"}), opener) as environment:
        assert not environment.is_open
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(environment.write_file, "a", "1")
            task_group.start_soon(environment.exec, "true")
            task_group.start_soon(environment.open)
        assert environment.is_open
        assert (environment.backend, environment.run_id) == ("unsafe-local", "deferred")
        heard: list[tuple[str, str]] = []
        listen = partial(environment.exec, on_output=lambda *each: heard.append(each))
        assert (await listen('echo "$NAME"; sleep 0.2; cat a')).stdout == "value\n1"
        assert heard == [("stdout", "value\n"), ("stdout", "1")]
        archive = (await environment.export_dir(".")).data
        await environment.import_dir("copy", archive)
        assert await environment.read_file("copy/a") == b"1"
        await environment.exec("sleep 60 & echo $! >pid")
        await environment.kill_all()
        ended = 'pid=$(cat pid); ! kill -0 "$pid" || grep -q "^State:.Z" "/proc/$pid/status"'
        assert (await environment.exec(ended)).exit_code == 0
    assert len(opener.opened) == 1
    for closed in (environment, opener.opened[0]):
        with pytest.raises(SandboxLostError, match="closed"):
            await closed.exec("true")


async def test_without_a_use_nothing_is_opened() -> None:
    opener = Opener()
    async with DeferredEnvironment(EnvironmentSpec(), opener) as environment:
        await environment.kill_all()
    assert not opener.opened
    with pytest.raises(SandboxLostError, match="closed"):
        await environment.read_file("a")
    assert not opener.opened


async def test_an_opening_that_failed_or_was_cancelled_is_tried_again() -> None:
    opener = Opener()
    calls = 0

    async def fails_at_first(spec: EnvironmentSpec) -> Environment:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise SandboxUnavailableError("no engine answers")
        if calls == 2:
            scope.cancel()
            await anyio.sleep_forever()
        return await opener(spec)

    async with DeferredEnvironment(EnvironmentSpec(), fails_at_first) as environment:
        with pytest.raises(SandboxUnavailableError, match="no engine answers"):
            await environment.exec("true")
        with anyio.CancelScope() as scope:
            await environment.exec("true")
        assert not environment.is_open
        assert (await environment.exec("true")).exit_code == 0
