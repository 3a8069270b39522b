"""`python`: run a script in a fresh interpreter inside the environment."""

from __future__ import annotations

from agentkit_tools.function import tool
from agentkit_tools.model_texts import DESCRIPTIONS
from agentkit_tools.shell import run_command
from agentkit_tools.tool import ToolContext, ToolOutput


@tool(description=DESCRIPTIONS["python"])
async def python(code: str, context: ToolContext) -> ToolOutput:
    """Run `code` with `python3 -` in the work directory; the output reads as that of `bash`."""
    return await run_command(["python3", "-"], context, name="python", stdin=code)
