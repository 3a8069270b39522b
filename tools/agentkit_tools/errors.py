"""Errors of the tools room.

ToolDefinitionError      the tool is wrong: a bad signature, name or schema; raised where the tool is defined
ToolError                what a tool raises to say something to the model: the result reads "Error: <message>"
  ArgumentsError         the arguments of a call do not fit the tool's schema

A dead sandbox is neither: `agentkit_environments.SandboxError` passes through every tool to the loop.
"""

from __future__ import annotations


class ToolDefinitionError(Exception):
    """The definition of a tool cannot be used; the message names the tool and the parameter."""


class ToolError(Exception):
    """A failure the model should read; its message becomes the result, after `Error: `."""


class ArgumentsError(ToolError):
    """The arguments of a call are not what the schema asks for; one problem per item.

    Each problem names the path, what was given and what was expected, as in
    `$.path: given 3 (integer), expected string`.
    """

    def __init__(self, tool_name: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"invalid arguments for {tool_name}: {'; '.join(problems)}")
