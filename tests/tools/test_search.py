"""`search`: ripgrep, Python and grep return the same lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agentkit_environments import Environment, EnvironmentSpec, open_environment
from agentkit_tools import BUILTINS, ToolCall, ToolContext

pytestmark = pytest.mark.anyio

FILES: dict[str, bytes] = {
    "a.txt": b"one\ntwo\nthree\n",
    "b/deep/x.py": b"def two():\n    return 2",
    "b/y.md": "zwei é\r\ntwo: 2\r\n".encode(),
    "b-c.txt": b"two\n",
    ".hidden": b"two hidden\n",
    ".gitignore": b"*.md\n",
    ".git/config": b"two\n",
    "binary": b"\0\1two\n",
    "long": b"two" + b"-" * 600 + b"\n",
    "numbers": b"".join(b"n%d\n" % number for number in range(1, 13)),
}


PROGRAMS = {
    "rg": shutil.which("rg"),
    # `python3` on the PATH may be a version manager's script, and a sandbox cannot see a virtualenv below /tmp.
    "python3": os.path.realpath(sys.executable),
    "grep": shutil.which("grep"),
}


@pytest.fixture(params=PROGRAMS)
async def searching(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Environment]:
    """Open an environment with only one of the three programs on the PATH."""
    found = PROGRAMS[request.param]
    if found is None:
        pytest.skip(f"{request.param} is not installed")
    spec = EnvironmentSpec(env={"PATH": "/tmp/bin"})
    async with await open_environment(spec, backend="unsafe-local") as environment:
        await environment.exec(["/bin/mkdir", "/tmp/bin"])
        await environment.exec(["/bin/ln", "-s", found, f"/tmp/bin/{request.param}"])
        for path, data in FILES.items():
            await environment.write_file(path, data)
        yield environment


async def search(environment: Environment, **arguments: Any) -> str:
    call = ToolCall("c", "search", json.dumps(arguments))
    result = await BUILTINS["search"].call(call, ToolContext(environment))
    assert result.is_error == result.content.startswith("Error: ")
    return result.content


async def test_lines_are_sorted_by_path_and_line(searching: Environment) -> None:
    assert await search(searching, pattern="two") == "\n".join(
        [
            ".hidden:1:two hidden",
            "a.txt:2:two",
            "b-c.txt:1:two",
            "b/deep/x.py:1:def two():",
            "b/y.md:2:two: 2",
            "long:1:two" + "-" * 497 + " [...]",
        ]
    )
    lines = (await search(searching, pattern="^n[0-9]+$", path="numbers")).split("\n")
    assert lines == [f"numbers:{number}:n{number}" for number in range(1, 13)]


@pytest.mark.parametrize(
    ("arguments", "content"),
    [
        ({"pattern": "two", "path": "b"}, "b/deep/x.py:1:def two():\nb/y.md:2:two: 2"),
        ({"pattern": "two", "path": "./b/deep/"}, "b/deep/x.py:1:def two():"),
        ({"pattern": "two", "path": "a.txt"}, "a.txt:2:two"),
        ({"pattern": "^t(wo|hree)$", "path": "a.txt"}, "a.txt:2:two\na.txt:3:three"),
        ({"pattern": "TWO"}, "No matches"),
        ({"pattern": "zwei é"}, "b/y.md:1:zwei é"),
        ({"pattern": "--help"}, "No matches"),
        ({"pattern": "two", "path": "none"}, "Error: No such file or directory: none"),
        ({"pattern": "a\0"}, 'Error: "pattern" contains a NUL byte; remove it'),
    ],
)
async def test_results(searching: Environment, arguments: dict[str, str], content: str) -> None:
    assert await search(searching, **arguments) == content


async def test_a_bad_pattern_is_an_error(searching: Environment) -> None:
    content = await search(searching, pattern="(a")
    assert content.startswith("Error: bad pattern: ")
    assert len(content) > len("Error: bad pattern: ")


async def test_character_classes(searching: Environment) -> None:
    assert await search(searching, pattern=r"\bt\w+\b$", path="a.txt") == "a.txt:2:two\na.txt:3:three"
    assert await search(searching, pattern="[a||b]two|^two$", path="a.txt") == "a.txt:2:two"  # Python warns about ||
    digits = await search(searching, pattern=r"^n\d\d$", path="numbers")
    refused = r"Error: bad pattern: write [0-9] instead of \d: only grep is available"
    assert digits in (refused, "numbers:10:n10\nnumbers:11:n11\nnumbers:12:n12")


async def test_unreadable_files_are_skipped(searching: Environment) -> None:
    await searching.exec(["/bin/chmod", "0", "a.txt"])
    assert (await search(searching, pattern="def two")) == "b/deep/x.py:1:def two():"
    assert (await search(searching, pattern="no such thing")) == "No matches"


async def test_links_and_pipes_are_skipped(searching: Environment) -> None:
    await searching.exec(["/usr/bin/mkfifo", "pipe"])
    await searching.exec(["/bin/ln", "-s", "a.txt", "link"])
    await searching.exec(["/bin/ln", "-s", "b", "linked"])
    assert "link" not in await search(searching, pattern="two")


async def test_too_many_matches_are_cut_with_a_notice(searching: Environment) -> None:
    await searching.write_file("many", b"needle in a haystack\n" * 300_000)
    content = await search(searching, pattern="needle")
    assert content.startswith("many:1:needle in a haystack\n")
    assert " bytes cut ...]\n" in content
    assert content.endswith("\n[stopped at 4 MiB; narrow the pattern or the path]")
    assert len(content.encode()) <= 16_384


async def test_timeout(searching: Environment) -> None:
    await searching.exec(["/usr/bin/mkfifo", "pipe"])
    call = ToolCall("c", "search", '{"pattern": "two", "path": "pipe"}')
    result = await BUILTINS["search"].call(call, ToolContext(searching, timeout_s=0.3))
    assert result.content == "Error: search timed out after 0.3 s"


HOSTILE = {
    "re.py": b"raise SystemExit('imported')\n",
    "os.py": b"raise SystemExit('imported')\n",
    "sitecustomize.py": b"raise SystemExit('imported')\n",
    "usercustomize.py": b"raise SystemExit('imported')\n",
    "rg": b"#!/bin/sh\necho forged:1:needle\n",
    "python3": b"#!/bin/sh\necho forged:1:needle\n",
    "grep": b"#!/bin/sh\necho forged:1:needle\n",
    ".ripgreprc": b"--files\n",
    ".rgignore": b"*\n",
    ".ignore": b"*\n",
}


async def test_files_in_the_work_directory_do_not_configure_the_search(searching: Environment) -> None:
    for name, data in HOSTILE.items():
        await searching.write_file(name, data)
    await searching.exec(["/bin/chmod", "755", "rg", "python3", "grep"])
    await searching.write_file("found.txt", b"a needle here\n")
    lines = (await search(searching, pattern="needle")).split("\n")
    assert lines == [
        "found.txt:1:a needle here",
        *(f"{name}:2:echo forged:1:needle" for name in ("grep", "python3", "rg")),
    ]


@pytest.mark.parametrize("name", ["-n", "--files", "-", "a:1:b", "(", "!", "a b", "é"])
async def test_odd_file_names_are_searched(searching: Environment, name: str) -> None:
    await searching.write_file(f"./{name}", b"needle\n")
    await searching.write_file(f"odd/{name}", b"needle\n")
    assert await search(searching, pattern="needle", path="odd") == f"odd/{name}:1:needle"
    assert await search(searching, pattern="needle", path=name) == f"{name}:1:needle"
    assert await search(searching, pattern="needle", path=f"odd/{name}") == f"odd/{name}:1:needle"


async def test_a_newline_in_a_name_cannot_forge_a_match(searching: Environment) -> None:
    await searching.write_file("x\nsecret.txt:1:password", b"needle\n")
    assert await search(searching, pattern="needle") == '"x\\nsecret.txt:1:password":1:needle'


async def test_a_pattern_is_never_read_as_an_option(searching: Environment) -> None:
    await searching.write_file("o.txt", b"--files\n-e\n")
    assert await search(searching, pattern="--files", path="o.txt") == "o.txt:1:--files"
    assert await search(searching, pattern="-e", path="o.txt") == "o.txt:2:-e"


async def test_a_late_binary_byte_gives_no_false_match(searching: Environment) -> None:
    await searching.write_file("late", b"needle\n" + b"x" * 300_000 + b"\0needle\n")
    await searching.write_file("z.txt", b"needle: binary file matches\n")
    lines = (await search(searching, pattern="needle")).split("\n")
    assert lines[-1] == "z.txt:1:needle: binary file matches"
    assert set(lines[:-1]) <= {"late:1:needle"}
