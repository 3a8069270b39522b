"""In every sandbox, file tools follow permissions and links as a command does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agentkit_environments import Environment, EnvironmentSpec, open_environment
from agentkit_environments.docker import docker_failure
from agentkit_environments.process import process_failure
from agentkit_tools import BUILTINS, ToolCall, ToolContext

pytestmark = pytest.mark.anyio

SETUP = r"""
mkdir d sealed locked empty odd
echo inner > d/f; echo one > plain; echo one > ro; chmod 444 ro; echo one > none; chmod 000 none
echo hidden > sealed/f; chmod 000 sealed; echo one > locked/f; chmod 555 locked
ln -s plain link; ln -s d dlink; ln -s nowhere dangling; ln -s loop loop; ln -s link chain
mkfifo pipe; printf '#!/bin/sh\n' > x.sh; chmod 755 x.sh; ln -s /etc etc
echo odd > odd/-n; echo odd > 'odd/a
b'; mkdir odd/é
"""

CASES: list[tuple[str, dict[str, str], str]] = [
    ("read_file", {"path": "ro"}, "one\n"),
    ("read_file", {"path": "none"}, "Error: Permission denied: none"),
    ("read_file", {"path": "sealed/f"}, "Error: Permission denied: sealed/f"),
    ("read_file", {"path": "link"}, "one\n"),
    ("read_file", {"path": "chain"}, "one\n"),
    ("read_file", {"path": "dlink/f"}, "inner\n"),
    ("read_file", {"path": "dlink"}, "Error: Is a directory: dlink"),
    ("read_file", {"path": "dangling"}, "Error: dangling does not exist; list the directory to see what does"),
    ("read_file", {"path": "loop"}, "Error: Bad path: loop is a loop of links"),
    ("read_file", {"path": "pipe"}, "Error: not a regular file: pipe"),
    ("read_file", {"path": "/dev/zero"}, "Error: not a regular file: /dev/zero"),
    ("read_file", {"path": "plain/x"}, "Error: Not a directory: plain/x"),
    ("read_file", {"path": "odd/a\nb"}, "odd\n"),
    ("read_file", {"path": "odd/-n"}, "odd\n"),
    ("read_file", {"path": "a" * 300}, f"Error: File name too long: {'a' * 300}"),
    ("write_file", {"path": "ro", "content": ""}, "Error: Permission denied: ro"),
    ("write_file", {"path": "none", "content": ""}, "Error: Permission denied: none"),
    ("write_file", {"path": "sealed/f", "content": ""}, "Error: Permission denied: sealed/f"),
    ("write_file", {"path": "locked/g", "content": ""}, "Error: Permission denied: locked/g"),
    ("write_file", {"path": "locked/n/g", "content": ""}, "Error: Permission denied: locked/n/g"),
    ("write_file", {"path": "etc/x", "content": ""}, "Error: Read-only file system: etc/x"),
    ("write_file", {"path": "loop", "content": ""}, "Error: Bad path: loop is a loop of links"),
    ("write_file", {"path": "plain/x", "content": ""}, "Error: Not a directory: plain/x"),
    ("write_file", {"path": "d", "content": ""}, "Error: Is a directory: d"),
    ("edit_file", {"path": "ro", "old": "one", "new": "two"}, "Error: Permission denied: ro"),
    ("edit_file", {"path": "none", "old": "one", "new": "two"}, "Error: Permission denied: none"),
    (
        "edit_file",
        {"path": "dangling", "old": "one", "new": "two"},
        "Error: dangling does not exist; list the directory to see what does",
    ),
    ("list_dir", {"path": "locked"}, "f"),
    ("list_dir", {"path": "sealed"}, "Error: Permission denied: sealed"),
    ("list_dir", {"path": "dlink"}, "f"),
    ("list_dir", {"path": "dangling"}, "Error: No such directory: dangling"),
    ("list_dir", {"path": "loop"}, "Error: No such directory: loop"),
    ("list_dir", {"path": "link"}, "Error: Not a directory: link"),
    ("list_dir", {"path": "empty"}, "(empty)"),
    ("list_dir", {"path": "odd"}, '-n\n"a\\nb"\né/'),
    ("search", {"pattern": "o(ne|dd)|hid", "path": "odd"}, 'odd/-n:1:odd\n"odd/a\\nb":1:odd'),
    ("search", {"pattern": "one", "path": "none"}, "No matches"),
    ("search", {"pattern": "one", "path": "link"}, "link:1:one"),
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(
    scope="module",
    params=[pytest.param("process", marks=pytest.mark.sandbox), pytest.param("docker", marks=pytest.mark.docker)],
)
async def sandbox(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Environment]:
    reason = docker_failure() if request.param == "docker" else process_failure()
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    async with await open_environment(EnvironmentSpec(), backend=request.param) as environment:
        assert (await environment.exec(SETUP)).exit_code == 0
        yield environment


async def use(sandbox: Environment, name: str, **arguments: Any) -> str:
    result = await BUILTINS[name].call(ToolCall("c", name, json.dumps(arguments)), ToolContext(sandbox, timeout_s=20))
    return result.content


@pytest.mark.parametrize(("name", "arguments", "content"), CASES)
async def test_permissions_and_links(sandbox: Environment, name: str, arguments: dict[str, str], content: str) -> None:
    assert await use(sandbox, name, **arguments) == content


async def test_writing_through_a_link_writes_its_target(sandbox: Environment) -> None:
    await sandbox.exec("echo one > target; ln -s target pointer; ln -s made missing; mkdir place; ln -s place way")
    assert await use(sandbox, "edit_file", path="pointer", old="one", new="two") == "Replaced 1 occurrence in pointer"
    assert await use(sandbox, "write_file", path="missing", content="new\n") == "Wrote 4 bytes to missing"
    assert await use(sandbox, "write_file", path="way/f", content="in\n") == "Wrote 3 bytes to way/f"
    after = await sandbox.exec("cat target made place/f; readlink pointer missing way")
    assert after.stdout == "two\nnew\nin\ntarget\nmade\nplace\n"


async def test_an_edit_keeps_owner_mode_and_hard_links(sandbox: Environment) -> None:
    await sandbox.exec("printf '#!/bin/sh\\necho one\\n' > run.sh; chmod 750 run.sh; ln run.sh same.sh")
    assert await use(sandbox, "edit_file", path="run.sh", old="one", new="two") == "Replaced 1 occurrence in run.sh"
    after = await sandbox.exec("stat -c '%a %u' run.sh same.sh; id -u; cat same.sh | tail -n 1")
    mode, same_mode, uid, line = after.stdout.splitlines()
    assert (mode, same_mode, line) == (f"750 {uid}", f"750 {uid}", "echo two")


async def test_files_in_the_work_directory_do_not_change_the_tools(sandbox: Environment) -> None:
    """Programs that the tools could start, modules that Python could import, and shell and ripgrep settings."""
    await sandbox.exec(
        """
        mkdir trap; cd trap; echo needle > found
        for name in rg grep python3 ls cat head mkdir sh bash; do
            printf '#!/bin/sh\\necho forged\\n' > $name; chmod 755 $name; cp $name ~/$name
        done
        for name in re os sitecustomize usercustomize io encodings; do echo "raise SystemExit('forged')" > $name.py
        done
        cp *.py ~/; echo 'echo forged' > ~/.bashrc; cp ~/.bashrc ~/.profile; cp ~/.bashrc ~/.bash_profile
        cp ~/.bashrc ~/.shrc; echo '--files' > ~/.ripgreprc
        """
    )
    assert await use(sandbox, "search", pattern="^needle$", path="trap") == "trap/found:1:needle"
    assert "forged" not in await use(sandbox, "list_dir", path="trap")
    assert await use(sandbox, "read_file", path="trap/found") == "needle\n"
    assert await use(sandbox, "write_file", path="trap/made/x", content="") == "Wrote 0 bytes to trap/made/x"
    assert await use(sandbox, "bash", command="echo fine") == "fine"
