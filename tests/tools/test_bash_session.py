"""`bash_session`: what one command leaves is there for the next."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence

import pytest

from agentkit_environments import Environment, EnvironmentSpec, available_backends, open_environment
from agentkit_tools import ToolCall, ToolContext, bash_session

pytestmark = pytest.mark.anyio
UNUSABLE = {backend: reason for backend, reason in available_backends().items() if reason}


@pytest.fixture(
    params=[
        "unsafe-local",
        pytest.param("process", marks=pytest.mark.sandbox),
        pytest.param("docker", marks=pytest.mark.docker),
    ]
)
async def sandbox(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Environment]:
    if request.param in UNUSABLE and not (request.param == "docker" and os.environ.get("AGENTKIT_REQUIRE_DOCKER")):
        pytest.skip(UNUSABLE[request.param])
    spec = EnvironmentSpec(env={"TOKEN": "given"})
    async with await open_environment(spec, backend=request.param) as environment:
        yield environment


async def said(environment: Environment, *commands: str, restart: bool = False, timeout_s: float = 60) -> str:
    """Run commands one after the other, and return the text of the last."""
    context = ToolContext(environment, timeout_s=timeout_s)
    text = ""
    for command in commands:
        arguments = json.dumps({"command": command, "restart": restart})
        text = (await bash_session.call(ToolCall("call_0_0", "bash_session", arguments), context)).content
    return text


@pytest.mark.parametrize(
    ("commands", "text"),
    [
        (["mkdir -p 'a b/c'; cd 'a b/c'", "pwd; cd - >/dev/null; pwd"], "/workspace/a b/c\n/workspace"),
        (["export X=1; y='two words'; z=$'a\\nb'", 'env | grep ^X=; echo "$y"; echo "$z"'], "X=1\ntwo words\na\nb"),
        (["list=(1 'b c'); declare -A map=([k]=v); readonly fixed=1", 'echo "${list[1]} ${map[k]}"'], "b c v"),
        (["double() { echo $(($1 * 2)); }; status=mine name=yours", "double 4; echo $status $name"], "8\nmine yours"),
        (
            ["set -o pipefail; shopt -s extglob; IFS=,", "false | true; echo $?; [[ ab == +(a|b) ]] && echo yes"],
            "1\nyes",
        ),
        (["set -u; x=1; exit 3", "[[ $- == *u* ]] && echo $x"], "1"),
        (["set -e; x=5", "false; echo never", "echo $x"], "5"),
        (["unset -f nothing; x=1; unset x", 'echo "${x-gone}"'], "gone"),
        (["shopt -s expand_aliases; alias hi='echo hello'", "hi"], "hello"),
        (["trap 'echo bye' EXIT; x=7", "echo $x"], "7"),
        (["PATH=/nowhere", "PATH=/usr/bin:/bin; true", "ls / >/dev/null && echo back"], "back"),
        (
            ["cd /tmp; mkdir gone; cd gone; rmdir ../gone; x=1", "pwd; echo $x"],
            "/workspace\n1\nthe directory /tmp/gone is gone",
        ),
        (["false", "echo $?; (exit 4)"], "0\n[exit code 4]"),
    ],
)
async def test_a_command_finds_what_the_one_before_it_left(
    sandbox: Environment, commands: Sequence[str], text: str
) -> None:
    assert await said(sandbox, *commands) == text


async def test_restart_forgets_the_session(sandbox: Environment) -> None:
    assert await said(sandbox, "x=1; cd /tmp", "echo ${x-none}; pwd", restart=True) == "none\n/workspace"


async def test_a_command_that_times_out_leaves_the_session_as_it_was(sandbox: Environment) -> None:
    await said(sandbox, "x=1")
    assert "timed out" in await said(sandbox, "x=2; sleep 30", timeout_s=0.5)
    assert await said(sandbox, "echo $x") == "1"


async def test_values_that_every_call_is_given_are_not_saved_unless_they_change(sandbox: Environment) -> None:
    state = "cat /tmp/.agentkit-bash-session"
    assert await said(sandbox, "true", f"{state} | grep -c given") == "0\n[exit code 1]"
    assert await said(sandbox, "TOKEN=mine", "echo $TOKEN") == "mine"


async def test_a_fork_has_a_session_of_its_own(sandbox: Environment) -> None:
    await said(sandbox, "mkdir sub; cd sub; x=1")
    async with sandbox.fork(2) as (one, other):
        assert await said(one, "x=2; pwd", "echo $x; pwd") == "2\n/workspace/sub"
        assert await said(other, "echo $x; pwd") == "1\n/workspace/sub"
    assert await said(sandbox, "echo $x") == "1"
