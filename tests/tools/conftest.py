"""Fixtures: a small real environment, and a function that calls a built-in tool in it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from agentkit_environments import Environment, EnvironmentSpec, open_environment
from agentkit_tools import BUILTINS, ToolCall, ToolContext, ToolResult

Call = Callable[..., Awaitable[ToolResult]]


@pytest.fixture
async def environment(anyio_backend: str) -> AsyncIterator[Environment]:
    async with await open_environment(EnvironmentSpec(), backend="unsafe-local") as environment:
        yield environment


@pytest.fixture
def context(environment: Environment) -> ToolContext:
    return ToolContext(environment)


@pytest.fixture
def call(context: ToolContext) -> Call:
    """`await call("read_file", path="a.txt")`."""

    async def call(name: str, /, **arguments: Any) -> ToolResult:
        return await BUILTINS[name].call(ToolCall("call_0_0", name, json.dumps(arguments)), context)

    return call
