"""`python`: scripts passed on standard input."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from agentkit_tools import ToolContext, ToolResult

pytestmark = pytest.mark.anyio
Call = Callable[..., Awaitable[ToolResult]]


async def test_output(call: Call) -> None:
    assert (await call("python", code="print(6 * 7)")).content == "42"
    assert (await call("python", code="x = 1")).content == "(no output)"
    assert (await call("python", code="print('é', '\"')\nopen('made', 'w').write('1')")).content == 'é "'
    assert (await call("read_file", path="made")).content == "1"


async def test_failures(call: Call) -> None:
    result = await call("python", code="print(1)\n1/0")
    assert result.is_error
    lines = result.content.split("\n")
    assert lines[:3] == ["1", "Traceback (most recent call last):", '  File "<stdin>", line 2, in <module>']
    assert lines[-2:] == ["ZeroDivisionError: division by zero", "[exit code 1]"]
    assert (await call("python", code="import sys; sys.exit(4)")).content == "[exit code 4]"


async def test_timeout(call: Call, context: ToolContext) -> None:
    context.timeout_s = 0.5
    result = await call("python", code="import time; print(1, flush=True); time.sleep(30)")
    assert result.content == "Error: python timed out after 0.5 s\n1"
