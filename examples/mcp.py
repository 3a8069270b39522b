"""An agent with the tools of an MCP server. `pip install mcp-server-time`, then `python examples/mcp.py`."""

import json
import sys
from collections.abc import Sequence

sys.path.pop(0)  # this folder, where this file would hide the package `mcp`

import anyio

from agentkit import Agent, AssistantTurn, MCPServerStdio, Message, ScriptedModel, ToolMessage


def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Stand in for a model: call the tool, then answer with its result."""
    if isinstance(messages[-1], ToolMessage):
        return AssistantTurn(content=json.loads(messages[-1].content)["time_difference"])
    times = {"source_timezone": "Asia/Tokyo", "time": "16:30", "target_timezone": "Asia/Kolkata"}
    return AssistantTurn(calls=[("time__convert_time", times)])


async def main() -> None:
    async with MCPServerStdio(sys.executable, ["-m", "mcp_server_time"], name="time") as server:
        agent = Agent(ScriptedModel(policy), server.tools)
        print((await agent.run("How far is Delhi's time from Tokyo's?")).answer)


anyio.run(main)
