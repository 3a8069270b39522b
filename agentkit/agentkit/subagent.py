"""Sub-agents: a tool that runs an agent, with its own conversation and budget, and returns its answer."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

from agentkit.events import Event, SubagentEvent
from agentkit.run import RunContext
from agentkit_tools import ArgumentsError, Tool, ToolCall, ToolContext, ToolError, ToolOutput, ToolResult
from agentkit_tools.schema import check_schema, parse_object, problems

if TYPE_CHECKING:
    from agentkit.agent import Agent

PARAMETERS: Final = {
    "type": "object",
    "properties": {
        "task": {
            "type": "string",
            "description": "The task, with all that the agent has to know: it sees nothing of this conversation.",
        }
    },
    "required": ["task"],
    "additionalProperties": False,
}


class AgentTool(Tool):
    """A tool that runs an agent on a task; see `Agent.as_tool`."""

    delegates = True

    def __init__(self, agent: Agent[Any], name: str, description: str, *, own_sandbox: bool) -> None:
        super().__init__(name, description, PARAMETERS)
        self.agent = agent
        self.own_sandbox = own_sandbox
        self.needs_environment = not own_sandbox and any(tool.needs_environment for tool in agent.tools.values())
        self.deps_types = tuple(needed for tool in agent.tools.values() for needed in tool.deps_types)
        self._validator = check_schema(PARAMETERS, name=name)

    def parse(self, arguments: str) -> dict[str, Any]:
        value = parse_object(arguments, name=self.name)
        if found := problems(self._validator, value):
            raise ArgumentsError(self.name, found)
        return value

    def deadline_s(self, context: ToolContext) -> float:
        """Return infinity, because the limits of the agent and of the calling run end the call."""
        return inf

    async def call(self, call: ToolCall, context: ToolContext) -> ToolResult:
        if isinstance(context, RunContext):
            context = replace(context, call=call)
        return await super().call(call, context)

    async def run(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        above = context if isinstance(context, RunContext) else None
        if above is not None and above.run.depth < 1:
            raise ToolError("not run: agents are nested as deeply as the run allows; do this part without the tool")

        def emit(event: Event) -> None:
            if above is not None and above.call is not None:
                above.run.emit(SubagentEvent(above.call.id, event))

        environment = None if self.own_sandbox else context.environment
        result = await self.agent._run(arguments["task"], emit, environment=environment, deps=context.deps, above=above)
        if result.answer is None:
            why = f"the limit {result.limit} was reached" if result.limit else result.error
            raise ToolError(f"the agent gave no valid answer: {why}")
        return ToolOutput(result.answer)
