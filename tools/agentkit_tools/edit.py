"""`edit_file`: replace a text that occurs exactly once; anything ambiguous is refused."""

from __future__ import annotations

from agentkit_tools.errors import ToolError
from agentkit_tools.files import file_errors
from agentkit_tools.function import tool
from agentkit_tools.tool import ToolContext


@tool(description="Replace a text that occurs exactly once in a file.")
async def edit_file(path: str, old: str, new: str, context: ToolContext) -> str:
    """Replace `old` by `new`, compared byte for byte, so that the rest of the file (any encoding) stays as it is."""
    if not old:
        raise ToolError('"old" is empty; give the text to replace')
    async with context.lock:
        with file_errors(path):
            data = await context.environment.read_file(path)
        count = data.count(old.encode())
        if count == 0:
            raise ToolError(f'"old" not found in {path}')
        if count > 1:
            raise ToolError(f'"old" found {count} times in {path}; give more context')
        with file_errors(path):
            await context.environment.write_file(path, data.replace(old.encode(), new.encode()))
    return f"Edited {path}"
