"""`CommandTool`: a tool that runs a shell command, as declared in a task's YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentkit_tools.errors import ArgumentsError, ToolDefinitionError
from agentkit_tools.schema import check_schema, parse_object, problems
from agentkit_tools.shell import run_command
from agentkit_tools.tool import Tool, ToolContext, ToolOutput


class CommandTool(Tool):
    """A tool that runs `command` with `/bin/sh -c` in the environment, with the arguments as one JSON object on stdin.

    The result has the format of `bash`. `parameters` is a JSON schema (2020-12) of an object and is used unchanged:
    unknown arguments are refused only if it sets `additionalProperties: false`.

    Raises:
        ToolDefinitionError: the command is empty, the name is invalid, or `parameters` is not a valid JSON schema.
    """

    def __init__(
        self,
        name: str,
        description: str,
        parameters: Mapping[str, Any],
        command: str,
        *,
        read_only: bool = False,
        barrier: bool = False,
    ) -> None:
        super().__init__(name, description, parameters, read_only=read_only, barrier=barrier)
        self._validator = check_schema(parameters, name=name)
        if not command.strip():
            raise ToolDefinitionError(f"tool {name!r}: command is empty, expected a shell command")
        self.command = command

    def parse(self, arguments: str) -> dict[str, Any]:
        value = parse_object(arguments, name=self.name)
        if found := problems(self._validator, value):
            raise ArgumentsError(self.name, found)
        return value

    async def run(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        stdin = json.dumps(arguments, ensure_ascii=False)
        return await run_command(self.command, context, name=self.name, stdin=stdin)
