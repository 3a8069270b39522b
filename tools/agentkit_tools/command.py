"""`CommandTool`: a tool that is a shell command, as tasks declare them in YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentkit_tools.errors import ArgumentsError, ToolDefinitionError
from agentkit_tools.schema import check_schema, parse_object, problems
from agentkit_tools.shell import run_command
from agentkit_tools.tool import Tool, ToolContext, ToolOutput


class CommandTool(Tool):
    """Runs `command` with `/bin/sh -c` in the environment, the arguments as one JSON object on stdin.

    The output reads as that of `bash`. `parameters` is a JSON schema (2020-12) of an object, used as it is: unknown
    arguments are refused only when it says `additionalProperties: false`.

    Raises:
        ToolDefinitionError: an empty command, a bad name, or a schema that is none.
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
