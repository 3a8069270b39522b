"""Sub-agents: tools that run an agent with its own budget and return its answer.

`AgentTool` runs another agent, in a conversation of its own. `ForkTool` runs the same agent in a fork of its session.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from agentkit.checks import check_type
from agentkit.events import Event, MessageAdded, SubagentEvent
from agentkit.interrupted import NOTHING, ResumePoint
from agentkit.limits import Limits
from agentkit.messages import AssistantMessage
from agentkit.run import RunContext
from agentkit_tools import ArgumentsError, Tool, ToolCall, ToolContext, ToolError, ToolOutput, ToolResult
from agentkit_tools.schema import check_schema, parse_object, problems

if TYPE_CHECKING:
    from agentkit.agent import Agent
    from agentkit.result import RunResult
    from agentkit.trajectory import Trajectory

FORKED: Final = (
    "This is a copy of the conversation, made for this call. Do only the following task, then answer; your answer "
    "becomes the result of the call.\n\n{task}"
)
ELSEWHERE: Final = "[This call runs outside this copy of the conversation.]"


class SubagentTool(Tool):
    """Base class of tools that run an agent on a task; subclasses start it."""

    delegates = True

    def __init__(self, name: str, description: str, *, task: str) -> None:
        """`task` describes the parameter of this name."""
        parameters = {
            "type": "object",
            "properties": {"task": {"type": "string", "description": task}},
            "required": ["task"],
            "additionalProperties": False,
        }
        super().__init__(name, description, parameters)
        self._validator = check_schema(parameters, name=name)

    @abstractmethod
    async def start(
        self, task: str, context: ToolContext, above: RunContext | None, emit: Callable[[Event], None]
    ) -> RunResult:
        """Run the agent. `above` is the context of the call, if an agent made it."""

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

        result = await self.start(arguments["task"], context, above, emit)
        if result.answer is None:
            why = f"the limit {result.limit} was reached" if result.limit else result.error
            raise ToolError(f"the agent gave no valid answer: {why}")
        return ToolOutput(result.answer)


class AgentTool(SubagentTool):
    """A tool that runs an agent on a task; see `Agent.as_tool`."""

    def __init__(self, agent: Agent[Any], name: str, description: str, *, own_sandbox: bool) -> None:
        task = "The task, with all that the agent has to know: it sees nothing of this conversation."
        super().__init__(name, description, task=task)
        self.agent = agent
        self.own_sandbox = own_sandbox
        self.needs_environment = not own_sandbox and any(tool.needs_environment for tool in agent.tools.values())
        self.deps_types = tuple(needed for tool in agent.tools.values() for needed in tool.deps_types)

    async def start(
        self, task: str, context: ToolContext, above: RunContext | None, emit: Callable[[Event], None]
    ) -> RunResult:
        environment = None if self.own_sandbox else context.environment
        return await self.agent._run(task, emit, environment=environment, deps=context.deps, above=above)


class ForkTool(SubagentTool):
    """A tool that runs the agent that calls it in a fork of its session, so that a part of the work leaves only its
    answer in the conversation.

    The fork knows the conversation up to the turn of the call, and shares its token ids, whose state the engine finds
    in its prefix cache. It has the agent's tools, its environment and its approvals. It gets the task as the result of
    the call, and no results of the turn's other calls. Its record begins with that of the caller. Otherwise it is a
    sub-agent like one of `Agent.as_tool`.
    """

    needs_environment = False

    def __init__(self, name: str, description: str, *, limits: Limits | None = None) -> None:
        """`limits` is the budget of each fork. Default: the agent's own limits.

        Raises:
            TypeError: `limits` is not a `Limits`.
            ToolDefinitionError: the name or description is invalid.
        """
        check_type("ForkTool(limits=...)", limits, Limits | None, "a Limits or None")
        super().__init__(name, description, task="The task. The agent knows this conversation.")
        self.limits = limits

    async def start(
        self, task: str, context: ToolContext, above: RunContext | None, emit: Callable[[Event], None]
    ) -> RunResult:
        if above is None or above.call is None:
            raise ToolError("not run: only an agent can be forked, and none made this call")
        run = above.run
        agent = copy(run.agent)
        agent.limits = agent._bounded(self.limits or agent.limits)
        place, turn = _last_turn(run.trajectory)
        texts = {call.id: FORKED.format(task=task) if call.id == above.call.id else ELSEWHERE for call in turn.calls}
        results = [ToolResult(call.id, call.name, texts[call.id]) for call in turn.calls]
        header = run.trajectory.header
        metadata = {"parent": header.id, "call_id": above.call.id}
        own = replace(header, id=uuid4().hex, metadata=metadata)
        history = run.trajectory.branch(own, run.subagent_path(), place + 1)
        point = ResumePoint(
            len(history.records),
            news=[],
            retried=False,
            shared=NOTHING,
            results=results,
            unrecorded=results,
            unread=set(texts),
            turn_open=True,
            is_fork=True,
        )
        return await agent._run(
            None, emit, environment=context.environment, history=history, point=point, deps=context.deps, above=above
        )


def _last_turn(trajectory: Trajectory) -> tuple[int, AssistantMessage]:
    """Return the place of the last turn's message among the records, and the message."""
    return [
        (place, record.message)
        for place, record in enumerate(trajectory.records)
        if isinstance(record, MessageAdded) and isinstance(record.message, AssistantMessage)
    ][-1]
