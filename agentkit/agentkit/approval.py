"""Approvals: a chain of policies decides on each call before it runs.

    from agentkit import Agent, Approve, Refuse, ask_before_changes

    def no_network(call):
        if call.tool.name == "bash" and "curl" in call.arguments["command"]:
            return Refuse("there is no network; work with the files that are here")

    def yes_or_no(call, reason):
        return Approve() if input(f"Run {call.tool.name}? ") == "y" else Refuse("the user said no")

    agent = Agent("tiny", approval=[no_network, ask_before_changes], on_ask=yes_or_no)

The first policy that returns a decision ends the chain, and a call on which no policy decides is approved. Every call
with valid arguments goes through the chain, including calls of read-only tools. The policies of an agent also decide on
the calls of its sub-agents, after the sub-agents' own policies.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import anyio
from pydantic_core import to_json

from agentkit.events import CallDecided
from agentkit_tools import BUILTINS, TextPart, Tool, ToolCall, ToolContext, ToolResult, cut
from agentkit_tools.model_texts import ERROR
from agentkit_tools.results import belongs_to_the_loop, error_text
from agentkit_tools.schema import parse_object
from agentkit_tools.workers import run_in_thread

MAX_SHOWN_BYTES: Final = 2_000
"""Maximum bytes of changed arguments in the line that tells the model about the change."""


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A call that waits for a decision.

    Attributes:
        id: The id of the call.
        tool: The tool.
        arguments: The JSON object that the model wrote. It fits the tool's schema; defaults are not filled in.
        context: The context that the call will run in.
    """

    id: str
    tool: Tool
    arguments: Mapping[str, Any]
    context: ToolContext


@dataclass(frozen=True, slots=True)
class Approve:
    """The call runs."""


@dataclass(frozen=True, slots=True)
class Modify:
    """The call runs with other arguments, which the tool validates. The model is told that they were changed."""

    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Refuse:
    """The call does not run. The model reads the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A human decides: the agent's `on_ask` is called with `reason`."""

    reason: str = ""


Decision = Approve | Modify | Refuse
Policy = Callable[[PendingCall], Decision | Ask | Awaitable[Decision | Ask | None] | None]
"""A function, async or not, that decides on a call. None leaves it to the next policy."""
AskHuman = Callable[[PendingCall, str], Decision | Awaitable[Decision]]
"""A function, async or not, that takes a call and the reason to ask, and returns the human's decision. It is called for
one call at a time."""


class ApprovalWarning(UserWarning):
    """A policy failed, and the call that it had to decide on was refused."""


def ask_before_changes(call: PendingCall) -> Ask | None:
    """Ask about every call, except calls of read-only tools and `submit`, which change nothing."""
    return None if _changes_nothing(call.tool) else Ask()


def refuse_changes(call: PendingCall) -> Refuse | None:
    """Refuse every call, except calls of read-only tools and `submit`."""
    return None if _changes_nothing(call.tool) else Refuse("only read-only tools may be used in this run")


def _changes_nothing(tool: Tool) -> bool:
    return tool.read_only or tool is BUILTINS["submit"]


class Approvals:
    """The policies of an agent, and the function that asks a human."""

    def __init__(self, policies: Sequence[Policy] = (), on_ask: AskHuman | None = None) -> None:
        """Create a chain of policies, which are asked in order.

        Raises:
            TypeError: a policy or `on_ask` is not a function.
        """
        for policy in (*policies, *([on_ask] if on_ask is not None else [])):
            if not callable(policy):
                hint = f"; pass an instance: {policy.__name__}()" if isinstance(policy, type) else ""
                raise TypeError(f"an approval policy or on_ask must be a function of a call, got {policy!r}{hint}")
        self._policies = tuple(policies)
        self._on_ask = on_ask
        self._above: Approvals | None = None
        self._lock = anyio.Lock(fast_acquire=True)  # held while a human is asked

    def below(self, above: Approvals) -> Approvals:
        """Return the approvals of a sub-agent: these policies decide first, then the policies of the agent above it."""
        if above.is_empty:
            return self
        both = Approvals(self._policies, self._on_ask or above._on_ask)
        both._above, both._lock = above, above._lock
        return both

    @property
    def is_empty(self) -> bool:
        """True if there is no policy."""
        return not self._policies and self._above is None

    @property
    def can_ask(self) -> bool:
        """True if there is a function that asks a human."""
        return self._on_ask is not None or (self._above is not None and self._above.can_ask)

    async def decide(self, call: ToolCall, tool: Tool, context: ToolContext) -> CallDecided:
        """Decide on a call with valid arguments.

        Raises:
            SandboxError: a policy used the environment, which is lost.
        """
        pending = PendingCall(call.id, tool, parse_object(call.arguments, name=tool.name), context)
        decided = CallDecided(call.id, tool.name, "approved", None, call.arguments)
        level: Approvals | None = self
        while level is not None:
            for policy in level._policies:
                decision, asked = await level._consult(policy, pending)
                if decision is not None:
                    break
            else:
                level = level._above
                continue
            match decision:
                case Refuse(reason):
                    return replace(decided, decision="refused", policy=_name(policy), reason=reason, asked=asked)
                case Modify(arguments):
                    pending = replace(pending, arguments=arguments)
                    text = to_json(arguments).decode()
                    decided = replace(decided, decision="modified", policy=_name(policy), modified=text, asked=asked)
                case Approve() if decided.policy is None:
                    decided = replace(decided, policy=_name(policy), asked=asked)
            level = level._above
        return decided

    async def _consult(self, policy: Policy, call: PendingCall) -> tuple[Decision | None, bool]:
        """Return the decision of a policy, or of the human that it asks, and whether a human was asked."""
        asked = False
        try:
            answer = policy(call)
            if inspect.isawaitable(answer):
                answer = await answer
            if isinstance(answer, Ask):
                asked = self._on_ask is not None
                answer = await self._ask_human(call, answer.reason)
                if answer is None:
                    raise TypeError("on_ask returned None, expected Approve(), Modify(...) or Refuse(...)")
            if isinstance(answer, Modify):
                answer = await _checked(answer, call)
            elif answer is not None and not isinstance(answer, Approve | Refuse):
                raise TypeError(
                    f"returned {answer!r:.100}, expected Approve(), Modify(...), Refuse(...), Ask() or None"
                )
        except Exception as error:
            if belongs_to_the_loop(error):
                raise
            reason = f"the approval policy {_name(policy)} failed: {error_text(error)}"
            warnings.warn(f"{reason}. The call was refused.", ApprovalWarning, stacklevel=2)
            return Refuse(reason), asked
        return answer, asked

    async def _ask_human(self, call: PendingCall, reason: str) -> Decision:
        on_ask = self._on_ask
        if on_ask is None:
            return Refuse("a human has to approve this call, and there is nobody to ask")
        async with self._lock:
            answer = await run_in_thread(lambda: on_ask(call, reason))
            return await answer if inspect.isawaitable(answer) else answer


async def _checked(change: Modify, call: PendingCall) -> Modify:
    """Return the change with its arguments as plain JSON. Raise ValueError if the tool rejects them."""
    text = to_json(change.arguments).decode()
    if (problem := await call.tool.refusal(ToolCall(call.id, call.tool.name, text))) is not None:
        raise ValueError(f"it changed the arguments to invalid ones: {problem.content}")
    return Modify(parse_object(text, name=call.tool.name))


def _name(policy: Policy) -> str:
    return getattr(policy, "__name__", None) or type(policy).__name__


def refused(call: ToolCall, decided: CallDecided) -> ToolResult:
    """Return the result of a refused call."""
    return ToolResult(
        call.id, call.name, ERROR.format(message=f"the call was refused: {decided.reason}"), is_error=True
    )


def told_of_change(result: ToolResult, decided: CallDecided) -> ToolResult:
    """Return the result, with a line about the change if the call ran with other arguments. Answers are unchanged."""
    if decided.modified is None or result.final:
        return result
    line = f"[This call was changed before it ran. Its arguments were: {cut(decided.modified, MAX_SHOWN_BYTES)}]"
    parts = (TextPart(line), *result.parts) if result.parts else ()
    return replace(result, content=f"{line}\n{result.content}", parts=parts)
