"""`submit`: return the final answer and end the run."""

from __future__ import annotations

from agentkit_tools.function import tool
from agentkit_tools.model_texts import DESCRIPTIONS
from agentkit_tools.tool import ToolOutput


@tool(description=DESCRIPTIONS["submit"], barrier=True)
async def submit(answer: str) -> ToolOutput:
    """End the run with `answer`, which is never cut."""
    return ToolOutput(answer, final=True)
