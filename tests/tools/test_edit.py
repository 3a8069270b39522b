"""`edit_file`: exactly one place changes, or none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from agentkit_environments import Environment
from agentkit_tools import ToolResult

pytestmark = pytest.mark.anyio
Call = Callable[..., Awaitable[ToolResult]]


async def test_replaces_the_only_occurrence(call: Call, environment: Environment) -> None:
    await environment.write_file("m.py", b"a = 1\r\nb = \xff\r\n# \xc3\xa9\r\n")
    result = await call("edit_file", path="m.py", old="a = 1\r\n", new="a = '\\1 é'\n")
    assert (result.content, result.is_error) == ("Edited m.py", False)
    assert await environment.read_file("m.py") == b"a = '\\1 \xc3\xa9'\nb = \xff\r\n# \xc3\xa9\r\n"
    await call("edit_file", path="m.py", old="# é\r\n", new="")
    assert await environment.read_file("m.py") == b"a = '\\1 \xc3\xa9'\nb = \xff\r\n"


@pytest.mark.parametrize(
    ("path", "old", "content"),
    [
        ("m.py", "zz", 'Error: "old" not found in m.py'),
        ("m.py", "x", 'Error: "old" found 3 times in m.py; give more context'),
        ("m.py", "", 'Error: "old" is empty; give the text to replace'),
        ("none.py", "x", "Error: No such file: none.py"),
        (".", "x", "Error: Is a directory: ."),
    ],
)
async def test_refusals_change_nothing(call: Call, environment: Environment, path: str, old: str, content: str) -> None:
    await environment.write_file("m.py", "x x\nx\n")
    result = await call("edit_file", path=path, old=old, new="y")
    assert (result.content, result.is_error) == (content, True)
    assert await environment.read_file("m.py") == b"x x\nx\n"


async def test_parallel_edits_of_one_file_are_all_kept(call: Call, environment: Environment) -> None:
    await environment.write_file("f", "".join(f"<{index}>" for index in range(20)))
    async with anyio.create_task_group() as group:
        for index in range(20):

            async def edit(index: int = index) -> None:
                await call("edit_file", path="f", old=f"<{index}>", new=f"({index})")

            group.start_soon(edit)
    assert await environment.read_file("f") == "".join(f"({index})" for index in range(20)).encode()
