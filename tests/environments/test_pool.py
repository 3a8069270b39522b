"""A warm pool: environments opened ahead are fresh, bounded in number, handed out once, and never left behind."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, Literal

import anyio
import anyio.lowlevel
import pytest

from agentkit_environments import (
    Environment,
    EnvironmentPool,
    EnvironmentSpec,
    Network,
    ResourceLimits,
    SandboxLostError,
    SandboxUnavailableError,
    open_environment,
    pool,
)
from agentkit_environments.process import process_failure

from .conftest import require

pytestmark = pytest.mark.anyio
SPEC = EnvironmentSpec()


class Opener:
    """Opens `unsafe-local` environments, each once `go` is set, and keeps them."""

    def __init__(self) -> None:
        self.opened: list[Environment] = []
        self.opening = 0
        self.most = 0
        self.go = anyio.Event()
        self.begun = anyio.Event()

    async def __call__(self, spec: EnvironmentSpec, **options: Any) -> Environment:
        self.opening += 1
        self.begun.set()
        try:
            await self.go.wait()
            self.opened.append(await open_environment(SPEC, **{**options, "backend": "unsafe-local"}))
        finally:
            self.opening -= 1
        return self.opened[-1]


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> Opener:
    opener = Opener()
    monkeypatch.setattr(pool, "open_environment", opener)
    return opener


async def is_closed(environment: Environment) -> bool:
    try:
        await environment.exec("true")
    except SandboxLostError:
        return True
    return False


@pytest.mark.parametrize("backend", ["process", pytest.param("docker", marks=pytest.mark.docker)])
async def test_each_taken_environment_is_fresh(backend: Literal["process", "docker"]) -> None:
    if backend == "docker":
        require("docker")
    elif (reason := process_failure()) is not None:
        pytest.skip(reason)
    spec = EnvironmentSpec(env={"NAME": "value"}, limits=ResourceLimits(memory_mib=256))
    async with EnvironmentPool(2, run_id="pool-test") as environments:
        for _ in range(3):
            environments.expect(spec, backend=backend)
        for _ in range(4):  # one more than was announced
            async with await environments.open(spec, backend=backend) as environment:
                assert (environment.backend, environment.run_id, environment.phase) == (backend, "pool-test", "setup")
                result = await environment.exec('ls -A . /tmp; echo "$NAME"; echo 1 >left; echo 2 >/tmp/left')
                assert result.stdout == ".:\n\n/tmp:\nvalue\n"
        assert environments.waiting == 0


async def test_no_more_are_open_than_the_size_and_all_are_closed(opener: Opener) -> None:
    opener.go.set()
    async with EnvironmentPool(2) as environments:
        for _ in range(5):
            environments.expect(SPEC)
        await environments.ready()
        assert environments.waiting == len(opener.opened) == 2
        taken = await environments.open(SPEC)
        assert taken is opener.opened[0]
        await environments.ready()
        assert environments.waiting == 2 and len(opener.opened) == 3
    assert not await is_closed(taken), "who opens an environment closes it"
    await taken.close()
    assert [await is_closed(each) for each in opener.opened] == [True, True, True]


async def test_only_an_environment_of_the_same_specification_and_backend_is_taken(opener: Opener) -> None:
    opener.go.set()
    others = [
        EnvironmentSpec(env={"A": "b"}),
        EnvironmentSpec(limits=ResourceLimits(memory_mib=99)),
        EnvironmentSpec(network=Network(agent=["pypi.org"])),
        EnvironmentSpec(workdir="/app"),
    ]
    async with EnvironmentPool(1) as environments, AsyncExitStack() as stack:
        environments.expect(SPEC, backend="docker")
        await environments.ready()
        for spec in others:
            assert await stack.enter_async_context(await environments.open(spec, backend="docker")) is opener.opened[-1]
        await stack.enter_async_context(await environments.open(SPEC, backend="process"))
        assert environments.waiting == 1 and len(opener.opened) == 1 + len(others) + 1
        assert await stack.enter_async_context(await environments.open(SPEC, backend="docker")) is opener.opened[0]


async def test_a_caller_waits_for_the_one_that_is_being_opened(opener: Opener) -> None:
    async with EnvironmentPool(1) as environments:
        environments.expect(SPEC)
        await opener.begun.wait()

        async def take() -> None:
            async with await environments.open(SPEC) as environment:
                assert environment is opener.opened[0]

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(take)
            await anyio.lowlevel.checkpoint()
            opener.go.set()
    assert len(opener.opened) == 1


async def test_a_failed_opening_is_tried_again_by_the_caller(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    opener.go.set()
    calls = 0

    async def fails_at_first(spec: EnvironmentSpec, **options: Any) -> Environment:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise SandboxUnavailableError("no engine answers")
        return await opener(spec, **options)

    monkeypatch.setattr(pool, "open_environment", fails_at_first)
    async with EnvironmentPool(1) as environments:
        environments.expect(SPEC)
        async with await environments.open(SPEC) as environment:
            assert environment is opener.opened[0] and calls == 2


async def test_one_that_has_died_is_replaced(opener: Opener) -> None:
    opener.go.set()
    async with EnvironmentPool(1) as environments:
        environments.expect(SPEC)
        await environments.ready()
        await opener.opened[0].close()
        async with await environments.open(SPEC) as environment:
            assert environment is opener.opened[1] and not await is_closed(environment)


@pytest.mark.parametrize("when", ["opening", "waiting", "taking"])
@pytest.mark.parametrize("how", ["cancelled", "error"])
async def test_nothing_is_left_after_a_cancellation_or_an_error(opener: Opener, when: str, how: str) -> None:
    if when == "waiting":
        opener.go.set()
    with anyio.CancelScope() as scope:
        try:
            async with EnvironmentPool(3) as environments:
                for _ in range(4):
                    environments.expect(SPEC)
                if when == "waiting":
                    await environments.ready()
                else:
                    await anyio.wait_all_tasks_blocked()
                assert (opener.opening, environments.waiting) == ((0, 3) if when == "waiting" else (3, 0))
                if when == "taking":
                    async with anyio.create_task_group() as taking:
                        taking.start_soon(environments.open, SPEC)
                        await anyio.wait_all_tasks_blocked()
                        taking.cancel_scope.cancel()
                if how == "error":
                    raise RuntimeError("the caller failed")
                scope.cancel()
                await anyio.sleep_forever()
        except RuntimeError as error:
            assert str(error) == "the caller failed"
    assert scope.cancelled_caught == (how == "cancelled")
    assert opener.opening == 0
    assert all([await is_closed(each) for each in opener.opened])
    assert len(opener.opened) == (3 if when == "waiting" else 0)


async def test_a_size_of_zero_opens_when_asked(opener: Opener) -> None:
    opener.go.set()
    async with EnvironmentPool(0) as environments:
        environments.expect(SPEC)
        await anyio.wait_all_tasks_blocked()
        assert not opener.opened
        await (await environments.open(SPEC)).close()
    with pytest.raises(ValueError, match="takes at least 0, got -1"):
        EnvironmentPool(-1)


async def test_one_that_had_no_room_is_not_opened_again_once_it_was_asked_for(opener: Opener) -> None:
    opener.go.set()
    other = EnvironmentSpec(workdir="/app")
    async with EnvironmentPool(1) as environments, AsyncExitStack() as stack:
        environments.expect(SPEC)
        environments.expect(other)
        await stack.enter_async_context(await environments.open(other))
        await stack.enter_async_context(await environments.open(SPEC))
        await environments.ready()
        assert environments.waiting == 0 and len(opener.opened) == 2


async def test_a_caller_who_is_cancelled_leaves_none_behind(opener: Opener) -> None:
    opener.go.set()
    async with EnvironmentPool(1) as environments:
        environments.expect(SPEC)
        await environments.ready()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await environments.open(SPEC)
        assert scope.cancelled_caught and await is_closed(opener.opened[0])


async def test_what_is_prepared_comes_before_the_opening_and_may_fail(opener: Opener) -> None:
    opener.go.set()
    other = EnvironmentSpec(workdir="/app")
    built: list[int] = []

    async def build() -> None:
        built.append(len(opener.opened))

    async def fail() -> None:
        raise SandboxUnavailableError("the image cannot be built")

    async with EnvironmentPool(2) as environments:
        environments.expect(SPEC, prepare=build)
        await environments.ready()
        assert built == [0] and environments.waiting == 1
        environments.expect(other, prepare=fail)
        await environments.ready()
        assert environments.waiting == len(opener.opened) == 1
        await (await environments.open(other)).close()
