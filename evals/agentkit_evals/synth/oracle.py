"""Oracles: programs that solve their tasks turn by turn, as a fluent agent would.

An oracle runs through `agentkit.Agent` as the policy of a `ScriptedModel`, or without a tokenizer by `transcript`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentkit.agent import DEFAULT_SYSTEM
from agentkit.history import opening_messages
from agentkit.messages import AssistantMessage, Message, ToolMessage, UserMessage
from agentkit.models.scripted import AssistantTurn
from agentkit.thinking import Thinking
from agentkit_environments import Environment
from agentkit_evals.errors import EvalError
from agentkit_evals.statistics import SOLVED
from agentkit_evals.verify import verify
from agentkit_tools import ToolCall, ToolContext

if TYPE_CHECKING:
    from agentkit_evals.synth.task import SynthTask


class OracleError(EvalError):
    """An oracle did not solve its own task: a bug in the operation. The message gives the task and the answer."""


@dataclass(frozen=True, slots=True)
class Act:
    """One turn of an oracle: its reasoning (dropped on turns without thinking), content and calls."""

    reasoning: str
    calls: Sequence[tuple[str, dict[str, Any]]] = ()
    content: str = ""


Step = Callable[[list[str]], Act]  # receives the result texts of the previous turn's calls
Oracle = Callable[[Sequence[Message], bool], AssistantTurn]  # (messages so far, think) -> the next turn


def submit(reasoning: str, answer: str = "done") -> Act:
    return Act(reasoning, [("submit", {"answer": answer})])


def play(steps: Sequence[Step], messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Return the oracle's next turn, given the tool results at the end of `messages`."""
    turn = sum(isinstance(message, AssistantMessage) for message in messages)
    results = [m.content for m in itertools.takewhile(lambda m: isinstance(m, ToolMessage), reversed(messages))][::-1]
    act = steps[turn](results)
    return AssistantTurn(act.reasoning if think else None, act.content, act.calls)


async def require_solved(synth: SynthTask, archive: bytes, answer: str | None) -> None:
    """Score an outcome. Raises OracleError unless the reward is full."""
    verdict = await verify(synth.task, archive=archive, answer=answer, backend="unsafe-local")
    if verdict.reward < SOLVED:
        raise OracleError(
            f"{synth.task.id}: answered {answer!r}, which scores {verdict.reward:g}, expected 1: {verdict.output}"
        )


async def transcript(
    synth: SynthTask, environment: Environment, *, thinking: Thinking = "auto"
) -> tuple[list[Message], str]:
    """Run an oracle without a tokenizer, calling the tools directly; return its messages and its answer.

    `environment` must contain the task's files.
    """
    policy = synth.oracle()
    task = synth.task
    system = DEFAULT_SYSTEM if task.system is None else task.system
    messages = opening_messages(None, UserMessage(task.instruction), system=system, output_schema=task.output_schema)
    tools = {tool.name: tool for tool in task.build_tools()}
    context = ToolContext(environment)
    failed = False
    while True:
        first = not isinstance(messages[-1], ToolMessage)
        turn = policy(messages, thinking == "always" or (thinking == "auto" and (first or failed)))
        number = sum(isinstance(message, AssistantMessage) for message in messages)
        calls = tuple(
            ToolCall(f"call_{number}_{index}", name, json.dumps(arguments, ensure_ascii=False))
            for index, (name, arguments) in enumerate(turn.calls)
        )
        messages.append(AssistantMessage(turn.content, turn.reasoning, calls))
        if not calls:
            return messages, turn.content
        results = [await tools[call.name].call(call, context) for call in calls]
        if results[-1].final:
            return messages, results[-1].content
        messages += [ToolMessage.of(result) for result in results]
        failed = any(result.is_error for result in results)
