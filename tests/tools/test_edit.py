"""`edit_file`: an edit changes exactly one place or nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentkit_environments import Environment
from agentkit_tools import ToolResult
from agentkit_tools.edit import _count

pytestmark = pytest.mark.anyio
Call = Callable[..., Awaitable[ToolResult]]
ENDS = r"; the line ends differ: the file uses \r\n, \n or both"


async def test_replaces_the_only_occurrence(call: Call, environment: Environment) -> None:
    await environment.write_file("m.py", b"a = 1\r\nb = \xff\r\n# \xc3\xa9\r\n")
    result = await call("edit_file", path="m.py", old="a = 1\r\n", new="a = '\\1 é'\n")
    assert (result.content, result.is_error) == ("Replaced 1 occurrence in m.py", False)
    assert await environment.read_file("m.py") == b"a = '\\1 \xc3\xa9'\nb = \xff\r\n# \xc3\xa9\r\n"
    await call("edit_file", path="m.py", old="# é\r\n", new="")
    assert await environment.read_file("m.py") == b"a = '\\1 \xc3\xa9'\nb = \xff\r\n"


@pytest.mark.parametrize(
    ("path", "old", "content"),
    [
        ("m.py", "zz", 'Error: "old" not found in m.py'),
        ("m.py", "x", 'Error: "old" found 3 times in m.py; give more context'),
        ("m.py", "", 'Error: "old" is empty; give the text to replace'),
        ("none.py", "x", "Error: none.py does not exist; list the directory to see what does"),
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


@pytest.mark.parametrize(
    ("content", "old", "told"),
    [
        ("foo\nfoo\nfoo\n", "foo\nfoo\n", '"old" found 2 times in f; give more context'),
        ("aaaa", "aa", '"old" found 3 times in f; give more context'),
        ("abababa", "aba", '"old" found 3 times in f; give more context'),
        ("a" * 100_000, "a" * 100, '"old" found more than 1000 times in f; give more context'),
        ("x", "x", '"old" and "new" are the same; nothing would change'),
        ("one\ntwo", "two\n", '"old" not found in f; the file does not end in a newline, but "old" does'),
        ("one\n", "two\n", '"old" not found in f'),
        ("a\nb\n", "a\r\nb\r\n", f'"old" not found in f{ENDS}'),
        ("a\r\nb\nc", "a\nb\n", f'"old" not found in f{ENDS}'),
    ],
)
async def test_missing_and_ambiguous_matches_are_refused_with_a_reason(
    call: Call, environment: Environment, content: str, old: str, told: str
) -> None:
    await environment.write_file("f", content)
    result = await call("edit_file", path="f", old=old, new="x")
    assert (result.content, result.is_error) == (f"Error: {told}", True)
    assert await environment.read_file("f") == content.encode()


@pytest.mark.parametrize(
    ("content", "old", "new", "edited"),
    [
        (b"a\r\nb\r\nc\r\n", "a\nb\n", "x\ny\nz\n", b"x\r\ny\r\nz\r\nc\r\n"),
        (b"a\r\nb\r\n", "b", "x\ny", b"a\r\nx\r\ny\r\n"),
        (b"a\r\nb\r\n", "a\nb", "x\r\ny", b"x\r\ny\r\n"),
        (b"a\r\nb\r\n", "a\r\n", "x\n", b"x\nb\r\n"),  # explicit CRLF: not translated
        (b"a\r\nb\nc", "b\n", "x\n", b"a\r\nx\nc"),  # mixed line ends: not translated
        (b"\xef\xbb\xbfa\n", "a", "b", b"\xef\xbb\xbfb\n"),
        (b"caf\xe9 au lait", "au", "du", b"caf\xe9 du lait"),
        (b"a\0b", "b", "c", b"a\0c"),
        (b"no end", "end", "end\n", b"no end\n"),
        (b"aXa", "X", "", b"aa"),
    ],
)
async def test_an_edit_keeps_line_ends_and_surrounding_bytes(
    call: Call, environment: Environment, content: bytes, old: str, new: str, edited: bytes
) -> None:
    await environment.write_file("f", content)
    assert (await call("edit_file", path="f", old=old, new=new)).content == "Replaced 1 occurrence in f"
    assert await environment.read_file("f") == edited


async def test_encoding_and_size_errors_are_explained(call: Call, environment: Environment) -> None:
    await environment.write_file("latin", b"caf\xe9")
    result = await call("edit_file", path="latin", old="é", new="e")
    assert result.content == 'Error: "old" not found in latin; the file is not UTF-8, but "old" is'
    await environment.exec("truncate -s 17M big")
    result = await call("edit_file", path="big", old="a", new="b")
    assert result.content == "Error: File too large: big; use bash to read part of it"


lines = st.lists(st.sampled_from(["a", "b", "ab", "", "é"]), min_size=1, max_size=6)


@settings(deadline=None)
@given(lines, lines, st.sampled_from(["\n", "\r\n"]))
def test_count_includes_overlapping_occurrences(content: list[str], wanted: list[str], end: str) -> None:
    data, old = end.join(content).encode(), end.join(wanted).encode()
    assume(old)
    places = [place for place in range(len(data)) if data.startswith(old, place)]
    assert _count(data, old) == len(places)
