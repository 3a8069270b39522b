"""`DeclaredTool`: a tool that the model can call but that never runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from agentkit_tools.schema import check_schema, parse_object
from agentkit_tools.tool import Tool, ToolContext, ToolOutput


@lru_cache(maxsize=8192)
def _check(name: str, parameters: str) -> None:
    """Check a schema. Results are cached, because a check takes milliseconds and many rows declare the same tools."""
    check_schema(json.loads(parameters), name=name)


class DeclaredTool(Tool):
    """A tool without an implementation, for tasks that score the calls themselves. A call ends the run.

    The arguments must be a JSON object, but they are not checked against `parameters`; scoring does that.

    Raises:
        ToolDefinitionError: the name is invalid, or `parameters` is not a valid JSON schema of an object.
    """

    def __init__(self, name: str, description: str, parameters: Mapping[str, Any]) -> None:
        super().__init__(name, description, parameters)
        _check(name, json.dumps(self.parameters))

    def parse(self, arguments: str) -> dict[str, Any]:
        return parse_object(arguments, name=self.name)

    async def run(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        return ToolOutput("", final=True)
