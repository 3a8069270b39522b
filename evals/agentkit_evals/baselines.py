"""Baseline policies that do not solve tasks, to show which tasks of a suite need no agent.

Each is a `ScriptedModel` policy and runs through the same loop, tools, sandboxes and verifiers as any model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from agentkit.messages import Message, UserMessage
from agentkit.models.scripted import AssistantTurn, Policy

_WORD = re.compile(r"[\w./-]*\w")


def nothing(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """End at once with an empty message."""
    return AssistantTurn(reasoning="" if think else None)


def constant(answer: str) -> Policy:
    """Return a policy that submits `answer` to every task."""

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        return AssistantTurn(reasoning="" if think else None, calls=[("submit", {"answer": answer})])

    return policy


def parrot(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Answer with the last word of the instruction, without a tool call."""
    asked = next(message.content for message in messages if isinstance(message, UserMessage))
    words = _WORD.findall(asked)
    return AssistantTurn(reasoning="" if think else None, content=words[-1] if words else "")


BASELINES: dict[str, Policy] = {
    "do nothing": nothing,
    "constant answer: done": constant("done"),
    "constant answer: 3": constant("3"),
    "no tool calls": parrot,
}
"""Baselines that `python -m agentkit_evals.measure` runs, by name."""
