"""Exceptions of agentkit_tools.

ToolDefinitionError      invalid signature, name or schema; raised where the tool is defined
ToolError                failure reported to the model as the result "Error: <message>"
  ArgumentsError         the arguments of a call do not match the tool's schema
MCPError                 base class of errors of MCP servers
  MCPServerError         a server cannot be started or reached, or does not speak the protocol
  MCPConfigError         a file that lists servers is wrong

A lost sandbox is not a tool error: `agentkit_environments.SandboxError` propagates through every tool to the agent
loop.
"""

from __future__ import annotations


class ToolDefinitionError(Exception):
    """An invalid tool definition; the message names the tool and the parameter."""


class ToolError(Exception):
    """A failure to report to the model; the result is `Error: ` followed by the message."""


class ArgumentsError(ToolError):
    """Arguments that do not match the tool's schema; one problem per item.

    Each problem gives the path, the given value and the expected value, as in
    `$.path: given 3 (integer), expected string`.
    """

    def __init__(self, tool_name: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"invalid arguments for {tool_name}: {'; '.join(problems)}")


class MCPError(Exception):
    """Base class of errors of MCP servers."""


class MCPServerError(MCPError):
    """An MCP server cannot be started or reached, or does not speak the protocol; the message names the server."""


class MCPConfigError(MCPError):
    """A file that lists MCP servers is wrong; the message names the file and the place, and never contains a value."""
