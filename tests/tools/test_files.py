"""`read_file`, `write_file`, `list_dir`: the exact result texts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from agentkit_environments import Environment
from agentkit_tools import ToolContext, ToolResult, cut

pytestmark = pytest.mark.anyio
Call = Callable[..., Awaitable[ToolResult]]


async def test_write_then_read(call: Call, environment: Environment) -> None:
    text = "first\n  é 汉 😀\n\nno newline at end"
    result = await call("write_file", path="a/b/c.txt", content=text)
    assert (result.content, result.is_error) == (f"Wrote {len(text.encode())} bytes to a/b/c.txt", False)
    assert await environment.read_file("a/b/c.txt") == text.encode()
    assert (await call("read_file", path="a/b/c.txt")).content == text
    assert (await call("read_file", path="./a/../a/b/c.txt")).content == text
    await call("write_file", path="a/b/c.txt", content="")
    assert (await call("read_file", path="a/b/c.txt")).content == ""


async def test_read_bytes_that_are_not_utf8(call: Call, environment: Environment) -> None:
    await environment.write_file("x", b"a\xff\r\n")
    assert (await call("read_file", path="x")).content == "a\N{REPLACEMENT CHARACTER}\r\n"


async def test_read_of_a_long_file_is_cut(call: Call, environment: Environment, context: ToolContext) -> None:
    context.max_output_bytes = 128
    await environment.write_file("x", b"a" * 1000)
    expected = cut("a" * 1000, 128, where="; see x (1 line)")
    assert (await call("read_file", path="x")).content == expected


@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("read_file", {"path": "a.txt"}, "Error: a.txt does not exist; list the directory to see what does"),
        ("read_file", {"path": "none/a.txt"}, "Error: none/a.txt does not exist; list the directory to see what does"),
        ("read_file", {"path": "dir"}, "Error: Is a directory: dir"),
        ("write_file", {"path": "dir", "content": ""}, "Error: Is a directory: dir"),
        ("write_file", {"path": "dir/file/x", "content": ""}, "Error: Not a directory: dir/file/x"),
        ("list_dir", {"path": "none"}, "Error: No such directory: none"),
        ("list_dir", {"path": ""}, "Error: No such directory: "),
        ("list_dir", {"path": "dir/file"}, "Error: Not a directory: dir/file"),
        ("list_dir", {"path": "a\0b"}, 'Error: "path" contains a NUL byte; remove it'),
    ],
)
async def test_refusals(
    call: Call, environment: Environment, name: str, arguments: dict[str, str], content: str
) -> None:
    await environment.write_file("dir/file", "")
    result = await call(name, **arguments)
    assert (result.content, result.is_error) == (content, True)


async def test_bad_paths_and_large_files_are_error_results(call: Call, environment: Environment) -> None:
    for path in ("", "a\0b"):
        assert (await call("read_file", path=path)).content.startswith("Error: Bad path: ")
        assert (await call("write_file", path=path, content="")).content.startswith("Error: Bad path: ")
    long = "x" * 300
    assert (await call("write_file", path=long, content="")).content == f"Error: File name too long: {long}"
    await environment.exec("truncate -s 17M big")
    result = await call("read_file", path="big")
    assert result.content == "Error: File too large: big; use bash to read part of it"


async def test_list_dir(call: Call, environment: Environment) -> None:
    assert (await call("list_dir")).content == "(empty)"
    for path in ("b.txt", "a/x", "B", ".hidden", "-n", "é 1"):
        await environment.write_file(path, "")
    await environment.exec("ln -s a link")
    assert (await call("list_dir")).content == "-n\n.hidden\nB\na/\nb.txt\nlink\né 1"
    assert (await call("list_dir", path="a")).content == "x"
    assert (await call("list_dir", path="link/")).content == "x"
