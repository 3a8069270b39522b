"""`submit`: the answer is not cut, and the run ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from agentkit_tools import ToolResult

pytestmark = pytest.mark.anyio
Call = Callable[..., Awaitable[ToolResult]]


async def test_submit_is_final(call: Call) -> None:
    result = await call("submit", answer="é\n42 ")
    assert (result.content, result.final, result.is_error) == ("é\n42 ", True, False)
