"""Tools that the model can call: typed functions with JSON schemas, and the built-ins."""

from __future__ import annotations

from agentkit_tools.bash_session import bash_session
from agentkit_tools.command import CommandTool
from agentkit_tools.declared import DeclaredTool
from agentkit_tools.edit import edit_file
from agentkit_tools.errors import (
    ArgumentsError,
    MCPConfigError,
    MCPError,
    MCPServerError,
    ToolDefinitionError,
    ToolError,
)
from agentkit_tools.files import list_dir, read_file, write_file
from agentkit_tools.function import FunctionTool, as_tool, tool
from agentkit_tools.mcp import (
    MCPServer,
    MCPServerHttpInSandbox,
    MCPServerInSandbox,
    MCPServerStdio,
    MCPServerStreamableHttp,
    load_mcp_servers,
)
from agentkit_tools.output import cut
from agentkit_tools.parts import ImagePart, TextPart
from agentkit_tools.python import python
from agentkit_tools.search import search
from agentkit_tools.shell import bash
from agentkit_tools.submit import submit
from agentkit_tools.tool import (
    Tool,
    ToolCall,
    ToolContext,
    ToolOutput,
    ToolResult,
    unknown_tool,
)

BUILTINS: dict[str, Tool] = {
    builtin.name: builtin for builtin in (bash, read_file, write_file, edit_file, list_dir, search, python, submit)
}
"""The tools of an agent that names none."""
NAMED_TOOLS: dict[str, Tool] = {**BUILTINS, bash_session.name: bash_session}
"""The tools that a task can name; `bash_session` is not a default."""

__all__ = [
    "BUILTINS",
    "NAMED_TOOLS",
    "ArgumentsError",
    "CommandTool",
    "DeclaredTool",
    "FunctionTool",
    "ImagePart",
    "MCPConfigError",
    "MCPError",
    "MCPServer",
    "MCPServerError",
    "MCPServerHttpInSandbox",
    "MCPServerInSandbox",
    "MCPServerStdio",
    "MCPServerStreamableHttp",
    "TextPart",
    "Tool",
    "ToolCall",
    "ToolContext",
    "ToolDefinitionError",
    "ToolError",
    "ToolOutput",
    "ToolResult",
    "as_tool",
    "bash_session",
    "cut",
    "load_mcp_servers",
    "tool",
    "unknown_tool",
]
