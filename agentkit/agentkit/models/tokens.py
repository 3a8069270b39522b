"""The session adapter, which converts messages to token ids and back for every source of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from itertools import takewhile
from typing import Any, Protocol

import anyio

from agentkit.errors import ContextFullError
from agentkit.events import Compacted, MessageAdded, TurnStarted
from agentkit.messages import AssistantMessage, Message, ToolMessage, to_openai_all
from agentkit.model import (
    CallMalformed,
    CallReady,
    CallsWithdrawn,
    Dialect,
    Effort,
    Generated,
    GenerationLimits,
    History,
    ModelEvent,
    ReasoningDelta,
    SegmentKind,
    StopReason,
    TextDelta,
    ThoughtCut,
    TokenSegment,
    Usage,
)
from agentkit.repetition import IN_CALLS, is_due, repeats
from agentkit.trajectory import Trajectory
from agentkit_engine import chat
from agentkit_engine.chat import StreamParser, Tokenizer
from agentkit_engine.chat.tokens import USER
from agentkit_tools import Tool, ToolCall

MIN_PREFILL = 1024
"""Characters of new results that are worth a prefill. All results so far are encoded again for it, so they must also
have grown by a quarter since the last one."""
CLOSING_TOKENS = 2
"""Positions reserved at the end of the context for closing a turn that is stopped while thinking."""


class Sampled(Protocol):
    """A token id that was sampled, with its log-probability at temperature 1, or that a grammar forced."""

    @property
    def id(self) -> int: ...

    @property
    def logprob(self) -> float: ...

    @property
    def top(self) -> tuple[tuple[int, float], ...]: ...

    @property
    def forced(self) -> bool: ...


class TokenSession(Protocol):
    """An append-only list of token ids that sampling continues: an engine session or a script."""

    @property
    def token_ids(self) -> Sequence[int]:
        """All ids, fed and sampled."""
        ...

    @property
    def max_length(self) -> int | None:
        """Maximum number of ids of the session; None without a limit."""
        ...

    @property
    def cache_usage(self) -> tuple[int, int]:
        """Number of fed ids found in a cache, and number of fed ids computed."""
        ...

    async def append(self, ids: Sequence[int], /) -> None:
        """Feed ids."""
        ...

    async def clear(self) -> None:
        """Remove all ids."""
        ...

    async def checkpoint(self) -> None:
        """Hint that other sessions are likely to start with the ids so far."""
        ...

    async def keep(self) -> None:
        """Hint that another process may have to continue from the ids so far, should this one be killed."""
        ...

    async def prefill(self) -> None:
        """Compute the state of the ids so far, while those that follow are not known."""
        ...

    async def park(self) -> None:
        """Hint that the session will be idle, so that other sessions may use its memory."""
        ...

    def generate(self, *, max_tokens: int | None) -> AsyncGenerator[Sampled, None]:
        """Sample until a stop id, or for `max_tokens` sampled ids. Each id is in `token_ids` when it is yielded."""
        ...


class TokenizedSession:
    """A `ModelSession` over a `TokenSession`. Token ids are never rendered again."""

    def __init__(
        self,
        tokens: TokenSession,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Tool],
        effort: Effort,
        dialect: Dialect,
        grammar_off: str | None = "the model does not use one",
    ) -> None:
        self.dialect: Dialect = dialect
        self.grammar_off = grammar_off
        self.messages: list[Message] = []
        self.segments: list[TokenSegment] = []
        self.usage = Usage()
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._tools = [tool.spec for tool in tools]
        self._effort = effort
        self._length = 0
        self._ahead: list[int] = []  # ids of the next prompt that were fed already, and are not recorded yet
        self._ahead_characters = 0  # of the messages that they came from
        self._counts = Counter[SegmentKind]()  # ids of this run, by kind
        self.turns = 0
        self._unread: list[Message] = []
        self._eos = tokenizer.eos_id
        self._user = tokenizer.control_id(USER)
        self._think_end = tokenizer.control_id("</think>")
        self._after_thought = (self._think_end, self._eos)

    async def restore(self, history: History) -> None:
        """Continue a recorded conversation by feeding its exact token ids."""
        await self._tokens.append([token for segment in history.segments for token in segment.ids])
        self.segments.extend(history.segments)
        self.messages.extend(history.messages)
        self._length = len(self._tokens.token_ids)
        said = [index for index, message in enumerate(self.messages) if isinstance(message, AssistantMessage)]
        self.turns = history.turns
        self._unread = self.messages[said[-1] + 1 if said and self.segments else 0 :]

    async def append(self, messages: Sequence[Message]) -> None:
        """Add `messages`. They are encoded at the next `generate`, which determines whether the turn thinks.

        Assistant turns, which come from a message history, may only be among the first messages.
        """
        self.turns += sum(isinstance(message, AssistantMessage) for message in messages)
        self.messages.extend(messages)
        self._unread.extend(messages)

    async def restart(self, messages: Sequence[Message]) -> None:
        """Replace the whole conversation; the next `generate` encodes it anew."""
        await self._tokens.clear()
        self.messages[:] = messages
        self.segments.clear()
        self._unread = list(messages)
        self._length = 0
        self._ahead, self._ahead_characters = [], 0

    async def prefill(self, messages: Sequence[Message]) -> None:
        """Feed and compute the ids that the next prompt begins with, if `messages` are worth it.

        The last ids of a text depend on what follows it, so only those are fed that do not differ if a result follows.
        """
        characters = sum(len(message.content) for message in messages)
        if characters - self._ahead_characters < max(MIN_PREFILL, self._ahead_characters // 4):
            return
        self._ahead_characters = characters
        unread = [*self._unread, *messages]
        ends: tuple[list[Message], list[Message]] = ([], [ToolMessage("", "", "")])
        one, other = (self._encode([*unread, *end], think=False) for end in ends)
        ids = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
        count, limit = len(self._ahead), self._tokens.max_length
        if ids[:count] != self._ahead or (limit is not None and self._length + len(ids) + CLOSING_TOKENS >= limit):
            return
        self._ahead = ids
        await self._tokens.append(ids[count:])
        await self._tokens.prefill()
        await self._tokens.park()

    @property
    def context_window(self) -> int | None:
        """Maximum number of ids of the session."""
        return self._tokens.max_length

    @property
    def context_tokens(self) -> int:
        """Number of ids of the next prompt, with a turn that does not think."""
        return self._length + len(self._encode(self._unread, think=False)) if self._unread else self._length

    async def generate(self, *, think: bool, limits: GenerationLimits) -> AsyncGenerator[ModelEvent, None]:
        """Generate one turn; see `ModelSession.generate`.

        Raises:
            ContextFullError: the unread messages do not fit into the context; none of them was recorded.
        """
        room = await self._feed_prompt(think)
        parser = StreamParser(
            think,
            tokenizer=self._tokenizer,
            turn=self.turns,
            tools=self._tools,
            calls=bool(self._tools),
            ends_after_block=self.grammar_off is None,
        )
        thinking, thought, sampled, length, last_id = think, 0, 0, 0, -1
        run: list[Sampled] = []  # all sampled, or all forced
        said: list[int] = []  # all ids of the turn
        cut, repeated, left_early = True, False, True
        try:
            while cut:
                cut = False
                left = None if limits.max_tokens is None else limits.max_tokens - sampled
                async with aclosing(self._tokens.generate(max_tokens=left)) as stream:
                    async for token in stream:
                        last_id = token.id
                        if run and run[-1].forced != token.forced:
                            self._record_run(run)
                        run.append(token)
                        said.append(last_id)
                        sampled += not token.forced
                        length += 1
                        thought += thinking
                        news = parser.feed((last_id,))
                        if thinking:
                            only_thought = all(type(new) is chat.ReasoningDelta for new in news)
                            thinking = only_thought and last_id not in self._after_thought
                        for new in news:
                            if event := model_event(new):
                                yield event
                        full = length == room and last_id != self._eos
                        repeated = self._repeats(said, limits, in_block=parser.in_block)
                        spent = thinking and thought == limits.max_thinking_tokens
                        cut = spent and not full and not repeated and sampled != limits.max_tokens
                        if cut or full or repeated:
                            break
                if cut:
                    self._record_run(run)
                    await self._force([self._think_end])
                    thinking = False
                    yield ThoughtCut(thought)
                    for new in parser.feed((self._think_end,)):
                        if event := model_event(new):
                            yield event
            left_early = False
        finally:
            self._record_run(run)
            closing: list[int] = []
            if last_id != self._eos:
                closing = [self._think_end, self._eos] if thinking else [self._eos]
                with anyio.CancelScope(shield=True):
                    await self._force(closing)
            last = parser.finish(stopped=last_id != self._eos)
            unheard: set[str] = set()
            if left_early:  # nobody will hear of calls that the end of the turn made ready, so they get no results
                unheard = {event.id for event in last if isinstance(event, chat.CallReady)}
            message = parsed_message(parser.message, think, unheard=unheard)
            self.messages.append(message)
            self.turns += 1
            hits, misses = self._tokens.cache_usage
            self.usage = Usage(
                prompt_tokens=self._counts["prompt"],
                cache_hit_tokens=hits,
                cache_miss_tokens=misses,
                sampled_tokens=self._counts["sampled"],
                thinking_tokens=self.usage.thinking_tokens + thought,
                forced_tokens=self._counts["forced"],
                turns=self.usage.turns + 1,
            )
        await self._tokens.park()  # the session is idle while the calls run
        for new in last:
            if event := model_event(new):
                yield event
        reason: StopReason = "stop"  # end-of-sentence id, or the caller's stop id or stop text
        if last_id != self._eos and sampled == limits.max_tokens:
            reason = "max_tokens"
        elif last_id != self._eos and length == room:
            reason = "context"
        elif repeated:
            reason = "repetition"
        yield Generated(message, reason)

    async def _feed_prompt(self, think: bool) -> int | None:
        """Feed the unread messages; return how many ids may now be sampled, None without a limit."""
        ids = self._encode(self._unread, think=think)
        room = None
        if self._tokens.max_length is not None:
            room = self._tokens.max_length - self._length - len(ids) - CLOSING_TOKENS
            if room < 1:
                raise ContextFullError(
                    f"the next prompt of {len(ids)} ids does not fit: {self._length} of the model's "
                    f"{self._tokens.max_length} positions are taken"
                )
        ahead, self._ahead, self._ahead_characters = self._ahead, [], 0
        if ids[: len(ahead)] != ahead:
            await self._tokens.clear()
            await self._tokens.append([token for segment in self.segments for token in segment.ids])
            ahead = []
        head = ids.index(self._user) if not self.segments and self._user in ids else 0
        if head:  # system prompt and tools, which all runs of an agent share
            await self._tokens.append(ids[:head])
            await self._tokens.checkpoint()
        await self._tokens.append(ids[head or len(ahead) :])
        await self._tokens.keep()
        self._record(TokenSegment("prompt", tuple(ids)))
        self._unread.clear()
        return room

    def _encode(self, messages: Sequence[Message], *, think: bool) -> list[int]:
        """Return the ids of a prompt that adds `messages`."""
        return prompt_ids(
            messages,
            first=not self.segments,
            think=think,
            tools=self._tools,
            effort=self._effort,
            dialect=self.dialect,
            tokenizer=self._tokenizer,
        )

    def _repeats(self, said: list[int], limits: GenerationLimits, *, in_block: bool) -> bool:
        bound = limits.max_repeated_tokens
        if bound is None or not is_due(len(said), bound):
            return False
        return repeats(said, bound * IN_CALLS if in_block else bound, self._tokenizer.token_bytes)

    async def _force(self, ids: list[int]) -> None:
        await self._tokens.append(ids)
        self._record(TokenSegment("forced", tuple(ids)))

    def _record_run(self, run: list[Sampled]) -> None:
        if run:
            ids = tuple(token.id for token in run)
            if run[0].forced:
                self._record(TokenSegment("forced", ids))
            else:
                top = tuple(token.top for token in run) if run[0].top else ()
                self._record(TokenSegment("sampled", ids, tuple(token.logprob for token in run), top))
            run.clear()

    def _record(self, segment: TokenSegment) -> None:
        self.segments.append(segment)
        self._length += len(segment.ids)
        self._counts[segment.kind] += len(segment.ids)


def prompt_ids(
    messages: Sequence[Message],
    *,
    first: bool,
    think: bool,
    tools: list[dict[str, Any]],
    effort: Effort,
    dialect: Dialect,
    tokenizer: Tokenizer,
) -> list[int]:
    """Return the ids that feed `messages`, either at the start of a session or after an assistant turn."""
    shaped = to_openai_all(messages)
    if first:
        return chat.encode_ids(
            shaped, tokenizer=tokenizer, tools=tools or None, effort=effort, dialect=dialect, think=think
        )
    return chat.encode_continuation_ids(shaped, tokenizer=tokenizer, think=think)


def rebuild_token_ids(trajectory: Trajectory, tokenizer: Tokenizer) -> list[int]:
    """Rebuild the token ids of a session, encoding every prompt anew from the recorded messages.

    Of a session that was compacted, these are the ids since then.

    The result equals `trajectory.token_ids` if the record is complete and the encoder is the one that wrote it.

    Raises:
        EncodeError: the messages before a prompt are not a conversation that can be encoded.
    """
    header = trajectory.header
    assert header.dialect is not None, "the record of a model behind an API has no ids"
    ids: list[int] = []
    unread: list[Message] = []
    think = False
    for record in trajectory.records:
        match record:
            case MessageAdded(message) if not (ids and isinstance(message, AssistantMessage)):  # not one sampled here
                unread.append(message)
            case Compacted():
                ids.clear()
                unread[:] = record.messages
            case TurnStarted():
                think = record.think
            case TokenSegment(kind="prompt"):
                ids += prompt_ids(
                    unread,
                    first=not ids,
                    think=think,
                    tools=list(header.tools),
                    effort=header.effort,
                    dialect=header.dialect,
                    tokenizer=tokenizer,
                )
                unread.clear()
            case TokenSegment():
                ids += record.ids
    return ids


def model_event(parsed: chat.ParseEvent) -> ModelEvent | None:
    """Convert a parser event; return None for the start of a call and the end of parsing."""
    match parsed:
        case chat.ReasoningDelta():
            return ReasoningDelta(parsed.text)
        case chat.TextDelta():
            return TextDelta(parsed.text)
        case chat.CallReady():
            return CallReady(parsed.index, ToolCall(parsed.id, parsed.name, parsed.arguments_json))
        case chat.CallMalformed():
            return CallMalformed(parsed.index, parsed.name, parsed.error)
        case chat.CallsWithdrawn():
            return CallsWithdrawn(parsed.first)
        case _:
            return None


def parsed_message(parsed: dict[str, Any], think: bool, *, unheard: Collection[str] = ()) -> AssistantMessage:
    """Return a turn's message from `StreamParser.message`, without the calls whose ids are in `unheard`."""
    return AssistantMessage(
        content=parsed.get("content") or "",
        reasoning=(parsed.get("reasoning_content") or "") if think else None,
        calls=tuple(
            ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in parsed.get("tool_calls") or ()
            if call["id"] not in unheard
        ),
    )
