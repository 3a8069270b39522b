"""`agentkit mcp`, and `--mcp` of the other commands."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import typer.testing
from rich.console import Console

from agentkit.agent import Agent
from agentkit.cli.run import Job
from agentkit.models.scripted import Policy, ScriptedModel
from agentkit.task import Task
from agentkit.trajectory import Trajectory
from agentkit_engine.chat import Tokenizer
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_tools import load_mcp_servers

from .conftest import agentkit

MakeScript = Callable[..., Policy]
ROUGH = Path(__file__).parents[1] / "tools" / "rough_mcp_server.py"
TIME = {"command": sys.executable, "args": ["-m", "mcp_server_time"]}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`file(name=entry, ...)` writes a file with these servers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def write(**servers: Any) -> Path:
        path = tmp_path / "mcp.json"
        path.write_text(json.dumps({"mcpServers": servers}))
        return path

    return write


def test_the_tools_of_a_file_are_listed(file: Any) -> None:
    shown = agentkit("mcp", file(time=TIME)).output
    assert "✓ time\n  time__get_current_time  Get current time" in shown


def test_the_tools_of_a_file_as_json(file: Any) -> None:
    path = file(rough={"command": sys.executable, "args": [str(ROUGH), "odd"]}, none={"command": "no-such-program"})
    shown = agentkit("mcp", path, "--json", code=3).stdout
    rough, none = json.loads(shown)["servers"]
    assert [tool["name"] for tool in rough["tools"]] == ["rough__fine", "rough__also_fine"]
    assert rough["error"] is None and rough["dropped"]["null"] == "parameters: given null, expected a JSON schema"
    assert none["error"].startswith("MCP server none: there is no program no-such-program") and not none["tools"]


def test_a_tool_that_is_left_out_is_said_on_standard_error_alone(file: Any, tmp_path: Path) -> None:
    path = file(rough={"command": sys.executable, "args": [str(ROUGH), "odd"]})
    command = [sys.executable, "-m", "agentkit", "mcp", str(path), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["servers"][0]["name"] == "rough"
    lines = done.stderr.splitlines()
    assert len(lines) == 14 and all(line.startswith("MCP server rough: the tool ") for line in lines)


@pytest.mark.parametrize("command", [("mcp",), ("run", "Do it.", "--mcp"), ("chat", "--mcp")])
def test_a_file_that_is_wrong_is_a_usage_error(file: Any, command: tuple[str, ...]) -> None:
    assert "mcpServers.a.command" in agentkit(*command, file(a={"command": 7}), code=2).output
    assert "cannot be read" in agentkit(*command, "no.json", code=2).output


def test_a_server_that_does_not_start_ends_the_command(file: Any, untrained: Path) -> None:
    result = agentkit("run", "Do it.", "-m", untrained, "--mcp", file(a={"command": "no-such-program"}), code=3)
    assert "Error: MCP server a: there is no program no-such-program" in result.output


def test_a_job_has_the_servers_tools(file: Any, tokenizer: Tokenizer, script: MakeScript) -> None:
    shown = io.StringIO()
    policy = script([("time__get_current_time", {"timezone": "Asia/Tokyo"})], [("submit", {"answer": "done"})])
    agent = Agent(ScriptedModel(policy, tokenizer))
    servers = load_mcp_servers(file(time=TIME))
    console = Console(file=shown, width=200)
    job = Job(Task(id="run", instruction="x"), agent, "unsafe-local", None, None, console, servers)
    done = anyio.run(job.run)
    assert done.result.answer == "done" and '"timezone": "Asia/Tokyo"' in shown.getvalue()
    assert "time__convert_time" in [tool["function"]["name"] for tool in done.result.trajectory.header.tools]
    assert "time__convert_time" not in agent.tools


def test_two_tools_of_one_name_are_a_usage_error(file: Any, tokenizer: Tokenizer, script: MakeScript) -> None:
    first, second = load_mcp_servers(file(time=TIME)), load_mcp_servers(file(time=TIME))
    agent = Agent(ScriptedModel(script("Hello."), tokenizer))
    console = Console(file=io.StringIO())
    job = Job(Task(id="run", instruction="x"), agent, "unsafe-local", None, None, console, first + second)
    with pytest.raises(typer.BadParameter, match=r'two tools are named "time__\w+"; rename a server'):
        anyio.run(job.run)


@pytest.mark.skipif(not (PACKAGED_MODELS["tiny"] / "config.json").is_file(), reason="the tiny model is not packaged")
def test_a_chat_has_the_servers_tools(file: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentkit", "chat", "--env", "unsafe-local", "--seed", "1", "--max-tokens", "8"]
    command += ["--trajectory", "chat.jsonl", "--mcp", str(file(time=TIME))]
    subprocess.run(command, input=b"Hello\n", cwd=tmp_path, capture_output=True, timeout=120, check=False)
    tools = Trajectory.load(tmp_path / "chat.jsonl").header.tools
    assert [tool["function"]["name"] for tool in tools][-2:] == ["time__get_current_time", "time__convert_time"]
