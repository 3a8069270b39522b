"""DeepSeek-V4's completions: sampled ids or text to reasoning, content and tool calls.

`StreamParser` reads a completion while it is sampled. Given ids, it recognises control tokens by id, so text that only
spells `</think>` or `｜DSML｜` stays text; given text, it recognises them by spelling. The time is linear in the input.

A block of calls counts only where the chat format has one: the turn ends right after it.

- A block that opens the answer (after `</think>`, or at the start of a turn that does not think) gives `CallReady` at
  each `</｜DSML｜invoke>`. If text follows the block after all, `CallsWithdrawn` retracts those calls.
- A block after text, or inside a thought, gives no event until the turn ends right after it.
- A block with anything after it is a quotation or a rehearsal, and stays text or reasoning, byte for byte.
- Without tools there are no calls, and every marker stays text.

Otherwise the parser is lenient:

- The end-of-sentence token may be missing (length stop); everything after it is ignored.
- A tool block need not follow an empty line; it may lack its `tool_calls` wrapper or misspell it (`function_calls`),
  may lack its end, and may come before `</think>`. A thought that was cut inside a tag continues after `</think>`.
- Tags may have extra white space, other quotes, and attributes in any order.
- A call that is cut off or violates the grammar is reported as `CallMalformed`; its DSML never becomes content.
- Inside a parameter value only `</｜DSML｜parameter>` is special; every other marker is text.
- `string="false"` on a value that is not JSON falls back to a string. If a parameter's schema, including references
  and unions, rejects the attribute's interpretation and accepts the other one, the other one is used.
- Arguments wrapped in one parameter `arguments`, or given as a JSON body of the invoke, are unwrapped if they fit the
  tool's schema only when unwrapped.
- `<think>`, `</think>` and `｜DSML｜` are dropped where they have no meaning; other control tokens stay as text.

`parse(..., strict=True)` implements the grammar of DeepSeek's own parser and raises on every deviation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agentkit_engine.chat.format import BLOCK, PARAMETER
from agentkit_engine.chat.tokenizer import Tokenizer
from agentkit_engine.chat.tokens import DSML, EOS, THINK, THINK_END
from agentkit_engine.chat.v4_arguments import body_json, parameters_json
from agentkit_engine.chat.v4_strict import parse_strict
from agentkit_engine.chat.v4_tags import MAX_TAG, Head, Tag, read_tag, value_end

FinishReason = Literal["stop", "tool_calls", "length"]


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallOpened:
    """The call's name is known; its arguments are not complete yet."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallReady:
    """A complete call. `arguments_json` is JSON text of an object."""

    index: int
    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class CallMalformed:
    """A call that is cut off or violates the grammar, so it cannot run. `name` is None if it was not reached."""

    index: int
    name: str | None
    error: str


@dataclass(frozen=True, slots=True)
class CallsWithdrawn:
    """Text follows the block that opened the answer, so its calls, from index `first` on, are retracted."""

    first: int


@dataclass(frozen=True, slots=True)
class ParseFinished:
    """The turn ended: by EOS for "stop" and "tool_calls" (any call, malformed or not), without EOS for "length"."""

    reason: FinishReason


ParseEvent = ReasoningDelta | TextDelta | CallOpened | CallReady | CallMalformed | CallsWithdrawn | ParseFinished

_State = Literal[
    "between",  # in a block between calls, or after the block's end
    "skip",  # after a malformed call, until the next call or the block's end
    "call",  # inside an invoke, between parameters
    "value",  # inside a parameter
]

_HELD = re.compile(r"\n{0,2}(?:</?)?\Z")
"""End of a text that may belong to a tag: up to two newlines, then `<` or `</`."""
_LEADS = ("", "<", "</")


class _Pieces:
    """An append-only text whose last characters can be removed."""

    __slots__ = ("_pieces", "tail")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.tail = ""
        """The last two characters."""

    def add(self, text: str) -> None:
        self._pieces.append(text)
        self.tail = (self.tail + text[-2:])[-2:]

    def chop(self, count: int) -> None:
        """Remove the last `count` characters."""
        while count:
            last = self._pieces.pop()
            if len(last) > count:
                self._pieces.append(last[:-count])
            count = max(0, count - len(last))
        self.tail = ""

    def __str__(self) -> str:
        return "".join(self._pieces)


@dataclass(slots=True)
class _Call:
    """The call being read; `parameters` holds (raw value, `string` attribute or None)."""

    index: int
    name: str
    word: str
    parameters: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    key: str = ""
    string: str | None = None
    value_word: str = PARAMETER


@dataclass(slots=True)
class _Block:
    """The block being read. Whether it counts or is text is decided when the turn ends or continues after it."""

    at_once: bool
    """True if events are emitted immediately, False if `events` holds them back."""
    first: int
    first_ready: int
    state: _State = "between"
    wrapped: bool = False
    misspelt: bool = False
    closed: bool = False
    outcomes: int = 0
    made_in_thought: int = 0
    """Number of outcomes before `</think>`."""
    begun_in_thought: int = 0
    """Index of the first call that started after `</think>`."""
    call: _Call | None = None
    text: _Pieces = field(default_factory=_Pieces)
    ink: str = ""
    """First non-space characters of `text`, outside a value."""
    events: list[ParseEvent] = field(default_factory=list)

    def clear_text(self) -> None:
        self.text, self.ink = _Pieces(), ""

    @property
    def complete(self) -> bool:
        """True if the turn may end here."""
        return self.closed or (self.state == "between" and self.outcomes > 0 and self.ink in _LEADS)


class StreamParser:
    """Converts one assistant turn to events while it is sampled.

    The events do not depend on how the input is split, once adjacent deltas are joined.

    Args:
        think: Whether the prompt ended with `<think>` (else with `</think>`).
        tokenizer: Required to feed ids; None to feed text.
        turn: Number of the turn, for the call ids `call_{turn}_{index}`.
        tools: OpenAI tool dicts whose schemas resolve values of unclear type; calls of other names are parsed too.
        calls: Whether tools exist; if False, every marker is text.
        ends_after_block: True if a grammar lets nothing follow a block, so any block in the answer emits its calls at
            once.
    """

    def __init__(
        self,
        think: bool,
        *,
        tokenizer: Tokenizer | None = None,
        turn: int = 0,
        tools: Sequence[Mapping[str, Any]] = (),
        calls: bool = True,
        ends_after_block: bool = False,
    ) -> None:
        self._think = think
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream() if tokenizer else None
        self._turn = turn
        self._reads_calls = calls
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        self._schemas = {name: schema if isinstance(schema, Mapping) else {} for name, schema in schemas.items()}
        self._ends_after_block = ends_after_block
        self._mode: Literal["reasoning", "content", "done"] = "reasoning" if think else "content"
        self._unread = ""  # text not yet split into controls and text (text input only)
        self._held = ""  # end of the text that may belong to a tag
        self._carried = ""  # `_held` of a thought that just ended; its tag may continue after `</think>`
        self._said = False  # True once the answer has text
        self._tag: Tag | None = None
        self._block: _Block | None = None
        self._before = ""  # newlines and lead before the first marker of the current tag or block
        self._raw: list[str] = []  # everything from that marker on; each marker is a piece of its own
        self._think_end: int | None = None  # index in `_raw` at which the thought ended
        self._index = 0  # index of the next call
        self._failed = False  # True once a call was malformed
        self._events: list[ParseEvent] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._ready: list[CallReady] = []

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message so far: `content`, `reasoning_content` if it thinks, `tool_calls` if any are ready."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content)}
        if self._think:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._ready:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments_json}}
                for c in self._ready
            ]
        return message

    @property
    def in_block(self) -> bool:
        """True while a block of calls is being read."""
        return self._block is not None

    def feed(self, piece: str | Iterable[int]) -> list[ParseEvent]:
        """Read more of the completion, as ids or as text, and return the new events.

        Raises:
            ValueError: Ids were fed to a parser without a tokenizer.
            TokenizerError: An id is not in the vocabulary.
        """
        if isinstance(piece, str):
            self._read_spelt(piece)
        else:
            self._read_ids(piece)
        return self._take_events()

    def finish(self, *, stopped: bool = False) -> list[ParseEvent]:
        """End the input. Without a preceding EOS the turn counts as cut off ("length").

        `stopped` means that the model did not end the turn, so a block at the end of a thought is not a call.
        """
        if self._mode != "done":
            if self._decoder:
                self._read_text(self._decoder.finish())
            if "｜" not in self._unread:  # otherwise it is the beginning of a control token
                self._read_text(self._unread)
            self._end(cut=True, stopped=stopped)
        return self._take_events()

    # Input: ids or text to control tokens and plain text.

    def _read_ids(self, ids: Iterable[int]) -> None:
        if self._tokenizer is None or self._decoder is None:
            raise ValueError("this parser has no tokenizer and reads text only; pass tokenizer= to feed ids")
        for token_id in ids:
            control = self._tokenizer.control_token(token_id)
            if control is None:
                self._read_text(self._decoder.feed(token_id))
            else:
                self._read_text(self._decoder.finish())
                self._read_control(control)

    def _read_spelt(self, text: str) -> None:
        text = self._unread + text
        at = 0
        for match in _SPELT.finditer(text):
            self._read_text(text[at : match.start()])
            self._read_control(match.group())
            at = match.end()
        end = len(text) - _partial_length(text[at:][-_LONGEST_SPELT:])
        self._read_text(text[at:end])
        self._unread = text[end:]

    # Reading: one state machine over controls and text.

    def _read_control(self, token: str) -> None:
        if self._mode == "done":
            return
        if token == EOS:
            self._end(cut=False, stopped=False)
        elif token == DSML and self._reads_calls:
            self._read_marker()
        elif token == THINK_END and self._mode == "reasoning":
            self._end_thought()
        elif token not in (THINK, THINK_END) or (self._block and self._block.state == "value"):
            self._read_text(token)

    def _read_text(self, text: str) -> None:
        if not text or self._mode == "done":
            return
        if self._tag is None and self._block is None:
            self._give(text)
        else:
            self._raw.append(text)
            self._consume(text)

    def _consume(self, text: str) -> None:
        """Read text inside a tag or a block; it is already in `_raw`."""
        if self._tag is not None:
            self._read_tag(self._tag, text)
        elif text and self._block is not None:
            block = self._block
            block.text.add(text)
            if block.state == "value":
                return
            if len(block.ink) < 3:
                block.ink = (block.ink + text).strip()
            if block.state == "between" and block.ink not in _LEADS:
                if block.closed:
                    self._take_back()
                elif block.misspelt and not block.outcomes:
                    self._take_back(markers=False)  # a stray tag

    def _read_marker(self) -> None:
        block, tag = self._block, self._tag
        if tag is not None and not tag.text and not (block and block.state == "value"):
            return  # repeated marker
        if tag is not None:
            self._break_tag(tag)
            block = self._block
        if block is None:
            if self._held:
                self._emit_carried()
            held = self._carried or self._held
            lead = _lead(held)
            if not lead:
                return
            if self._carried:  # the thought was cut before the marker
                self._before, self._carried = held, ""
                self._think_end = 0
            else:
                self._before, self._held = lead, held[: -len(lead)]
            self._raw = [DSML]
            self._tag = Tag(lead, 0)
            return
        self._raw.append(DSML)
        lead = _lead(block.text.tail)
        if lead and (block.state != "value" or lead == "</" or self._think_end is not None):
            block.text.chop(len(lead))
            block.ink = "" if block.ink in _LEADS else block.ink
            self._tag = Tag(lead, len(self._raw) - 1)
        elif block.state == "value":
            block.text.add(DSML)

    def _read_tag(self, tag: Tag, text: str) -> None:
        tag.text += text
        block = self._block
        if block is not None and block.state == "value":
            self._read_value_tag(block, tag, text)
            return
        head = read_tag(tag, ended=">" in text)
        if head == "partial":
            return
        self._tag = None
        if head is None:
            self._fail_tag(tag)
            return
        rest = tag.text[len(head.text) :]
        self._enter(head, tag)
        if self._block is not None:
            self._consume(rest)
        elif block is None:  # otherwise the block was turned back into text, including the rest
            self._read_text(rest)

    def _read_value_tag(self, block: _Block, tag: Tag, text: str) -> None:
        """Read a tag inside a value; it either ends the parameter or is part of the value."""
        call = block.call
        assert call is not None
        found, rest = value_end(tag.text, call.value_word)
        if self._think_end is not None and tag.lead == "<":  # the answer may start a block of its own
            head = read_tag(tag, ended=">" in text)
            if head == "partial":
                return
            if head is not None and self._begins_anew(head, block):
                self._tag = None
                self._enter(head, tag)
                self._consume(tag.text[len(head.text) :])
                return
            found = False
        elif found is None and len(tag.text) < MAX_TAG:
            return
        self._tag = None
        if not found:
            block.text.add(tag.lead + DSML + tag.text)
            return
        value = str(block.text)
        block.clear_text()
        block.state = "call"
        if call.key in call.parameters:
            self._malformed(f"parameter {call.key!r} is given twice")
        else:
            call.parameters[call.key] = (value, call.string)
        self._consume(rest)

    def _break_tag(self, tag: Tag) -> None:
        """End the tag being read at a control token; the end of its text may be the start of the next tag."""
        self._tag = None
        block = self._block
        if block is None:
            self._drop_tag(_lead(tag.text))
        elif block.state == "value":
            block.text.add(tag.lead + DSML + tag.text)
        else:
            if block.state in ("between", "call"):
                self._malformed("unknown or unfinished tag")
            if lead := _lead(tag.text):
                block.text.add(lead)

    def _fail_tag(self, tag: Tag) -> None:
        """Handle text that is not a tag: in a block the call is malformed; elsewhere only the marker is dropped."""
        block = self._block
        if block is None or block.closed:
            self._take_back(markers=block is not None)
        else:
            if block.state != "skip":
                self._malformed("unknown or unfinished tag")
            block.text.add(tag.text)  # its end may be the start of the next tag

    def _drop_tag(self, rest: str) -> None:
        """Outside a block, drop the tag and emit only `rest`, the end of its text."""
        self._before, self._think_end, self._raw = "", None, []
        self._give(rest)

    def _begins_anew(self, head: Head, block: _Block) -> bool:
        """Return whether a tag after `</think>` opens a new block instead of continuing the thought's open one."""
        if self._think_end is None or head.closing or head.kind == "parameter":
            return False
        cut_call = block.call is not None and block.call.index < block.begun_in_thought
        return head.kind == "wrapper" or block.made_in_thought > 0 or cut_call

    def _enter(self, head: Head, tag: Tag) -> None:
        """Process a complete tag."""
        block = self._block
        if block is not None and self._begins_anew(head, block):
            fresh = self._raw[tag.place :]
            self._take_back(upto=tag.place)
            self._before, self._held = tag.lead, self._held.removesuffix(tag.lead)
            self._raw, block = fresh, None
        if block is None:
            if head.closing or head.kind == "parameter":  # it has no meaning here
                self._drop_tag("")
                return
            block = self._open_block()
        word = block.call.word if block.call else ""
        if head.kind == "invoke" and not head.closing:
            self._open_call(block, head)
        elif block.state == "call" and head.closing and (head.kind == "invoke" or head.word == word):
            self._end_call(block)
        elif head.kind == "wrapper" and head.closing:
            if block.state == "call":
                self._malformed("the call is not closed")
            elif not block.outcomes:
                self._malformed("the tool_calls block holds no call")
            block.clear_text()
            block.state, block.wrapped, block.closed = "between", False, True
        elif head.kind == "parameter" and not head.closing and "name" in head.attributes and block.state == "call":
            self._open_value(block, head)
        elif head.kind == "wrapper" and block.state == "between":
            block.wrapped, block.closed = True, False
            block.misspelt = head.word != BLOCK
            block.clear_text()
        elif block.state == "skip":
            if head.kind == "invoke":
                self._after_call(block)
        elif block.closed and not head.closing:
            self._take_back()
        elif not block.closed:
            self._malformed(f"unexpected tag {head.text[:40]!r}")

    def _begin_block(self) -> None:
        """Emit the text before a block, except the newlines that belong to the block."""
        newlines = _newlines(self._held)
        self._held = self._held.removesuffix(newlines)
        self._before = newlines + self._before
        self._flush()

    def _open_block(self) -> _Block:
        self._begin_block()
        opens = self._mode == "content" and self._think_end is None and (not self._said or self._ends_after_block)
        self._block = _Block(opens, self._index, len(self._ready))
        return self._block

    def _open_call(self, block: _Block, head: Head) -> None:
        if block.state == "call":
            self._malformed("the call is not closed")
        block.state, block.closed = "call", False
        block.clear_text()
        name = head.attributes.get("name")
        if name is None:
            self._malformed("the call has no name")
            return
        block.call = _Call(self._index, name, head.word)
        self._note(block, CallOpened(self._index, name))
        self._index += 1
        if head.empty:
            self._end_call(block)

    def _open_value(self, block: _Block, head: Head) -> None:
        assert block.call is not None
        if block.ink:
            self._malformed(f"text between parameters: {str(block.text).strip()[:40]!r}")
            return
        block.call.key, block.call.value_word = head.attributes["name"], head.word
        string = head.attributes.get("string", "").lower()
        block.call.string = string if string in ("true", "false") else None
        block.clear_text()
        block.state = "value"

    def _end_call(self, block: _Block) -> None:
        call = block.call
        assert call is not None
        schema = self._schemas.get(call.name)
        text = str(block.text).strip()
        if text:
            arguments = None if call.parameters else body_json(text, schema)
            if arguments is None:
                self._malformed(f"text between parameters: {text[:40]!r}")
                self._after_call(block)
                return
        else:
            arguments = parameters_json(call.parameters, schema)
        ready = CallReady(call.index, f"call_{self._turn}_{call.index}", call.name, arguments)
        self._ready.append(ready)
        self._note(block, ready)
        block.call = None
        block.outcomes += 1
        self._after_call(block)

    def _after_call(self, block: _Block) -> None:
        block.state, block.closed = "between", not block.wrapped
        block.clear_text()

    def _malformed(self, error: str) -> None:
        """Report the current call, or one without a name, as malformed and skip to the next possible call."""
        block = self._block
        assert block is not None
        if block.call is not None:
            event = CallMalformed(block.call.index, block.call.name, error)
        else:
            event = CallMalformed(self._index, None, error)
            self._index += 1
        self._note(block, event)
        block.call = None
        block.outcomes += 1
        block.clear_text()
        block.state = "skip"

    def _note(self, block: _Block, event: ParseEvent) -> None:
        (self._events if block.at_once else block.events).append(event)
        self._failed = self._failed or (block.at_once and isinstance(event, CallMalformed))

    # The end of a thought, of a block and of the turn.

    def _end_thought(self) -> None:
        """Handle `</think>`: an incomplete tag or block may continue in the answer."""
        if self._tag is None and self._block is None:
            if self._held.endswith("<"):
                self._carried = _newlines(self._held[:-1]) + "<"
                self._held = self._held[: -len(self._carried)]
            self._flush()
        else:
            self._think_end = len(self._raw)
            if self._block is None:
                self._begin_block()
            else:
                self._block.made_in_thought, self._block.begun_in_thought = self._block.outcomes, self._index
        self._mode = "content"

    def _take_back(self, *, upto: int | None = None, markers: bool = True) -> None:
        """Turn the tag or block back into text: the part before `</think>` into reasoning, the rest into content."""
        block, before, think_end = self._block, self._before, self._think_end
        raw = [piece if markers or piece is not DSML else "" for piece in self._raw[:upto]]
        self._block, self._tag, self._before, self._raw, self._think_end = None, None, "", [], None
        if block is not None:
            del self._ready[block.first_ready :]
            if not block.at_once:
                self._index = block.first
            elif self._index > block.first:
                self._failed = False
                self._events.append(CallsWithdrawn(block.first))
        if think_end is None:
            self._give(before + "".join(raw))
        else:
            self._emit("reasoning", before + "".join(raw[:think_end]))
            self._give("".join(raw[think_end:]))

    def _end(self, *, cut: bool, stopped: bool) -> None:
        """End the turn, by EOS or cut off."""
        block, tag = self._block, self._tag
        if block is None and tag is not None:
            if self._mode == "content" and self._think_end is None and tag.lead == "<":
                block = self._open_block()
            else:
                self._take_back(markers=False)
        if block is not None:
            self._end_block(block, tag, stopped=stopped)
        self._emit_carried()
        if not (cut and self._held == "\n\n<"):
            self._flush()
        self._mode = "done"
        self._events.append(ParseFinished("length" if cut else "tool_calls" if self._ready or self._failed else "stop"))

    def _end_block(self, block: _Block, tag: Tag | None, *, stopped: bool) -> None:
        """End the turn in or after a block: its calls count, or it becomes text."""
        begun = tag is not None and tag.lead == "<" and block.state != "skip"
        complete = block.complete and not begun
        followed = block.state == "between" and block.outcomes > 0 and block.ink not in _LEADS  # by text
        if self._mode == "reasoning":
            counts = complete and not stopped
        elif self._think_end is not None:
            counts = complete or (not followed and any(piece is DSML for piece in self._raw[self._think_end :]))
        else:
            counts = not followed
        if not counts:
            self._take_back()
            return
        if block.call is not None or begun or not block.outcomes:
            self._malformed("the turn ended inside the call")
        self._events += block.events
        self._failed = self._failed or any(isinstance(event, CallMalformed) for event in block.events)
        self._block = self._tag = None

    # Output

    def _give(self, text: str) -> None:
        """Emit text, except an end that may belong to a tag."""
        text = self._held + text
        held = _HELD.search(text, max(0, len(text) - 4))
        assert held is not None  # it may be empty
        self._held = held.group()
        self._emit(self._mode, text[: held.start()])

    def _flush(self) -> None:
        """Emit the text that was held back."""
        held, self._held = self._held, ""
        self._emit(self._mode, held)

    def _emit(self, mode: str, text: str) -> None:
        if not text:
            return
        self._emit_carried()
        if mode == "reasoning":
            self._reasoning.append(text)
            self._events.append(ReasoningDelta(text))
        else:
            self._said = self._said or not text.isspace()
            self._content.append(text)
            self._events.append(TextDelta(text))

    def _emit_carried(self) -> None:
        if self._carried:
            carried, self._carried = self._carried, ""
            self._emit("reasoning", carried)

    def _take_events(self) -> list[ParseEvent]:
        events, self._events = self._events, []
        return events


def _lead(text: str) -> str:
    """Return the beginning of a tag at the end of `text`: `</`, `<` or nothing."""
    return "</" if text.endswith("</") else "<" if text.endswith("<") else ""


def _newlines(text: str) -> str:
    """Return the newlines at the end of `text` that belong to a block, at most two."""
    return text[-2:] if text.endswith("\n\n") else text[-1:] if text.endswith("\n") else ""


_SPELT_TOKENS = (THINK, THINK_END, DSML, EOS)
_SPELT = re.compile("|".join(map(re.escape, _SPELT_TOKENS)))
_LONGEST_SPELT = max(map(len, _SPELT_TOKENS))


def _partial_length(text: str) -> int:
    """Return the length of the longest suffix of `text` that begins a spelt control token."""
    lengths = range(min(len(text), _LONGEST_SPELT - 1), 0, -1)
    return next((n for n in lengths if any(token.startswith(text[-n:]) for token in _SPELT_TOKENS)), 0)


def parse(text: str, *, effort: str, strict: bool = False) -> dict[str, Any]:
    """Return the assistant message in a completion's text, which includes `</think>` and EOS but not the prompt.

    Args:
        text: The completion, as `Tokenizer.decode` returns it.
        effort: The effort of the prompt; with "none" the text has no reasoning.
        strict: Require DeepSeek's grammar. Otherwise parse as `StreamParser` does and omit malformed calls; use the
            parser itself to get them.

    Raises:
        ParseError: `strict`, and the text violates the grammar.
    """
    if strict:
        return parse_strict(text, think=effort != "none")
    parser = StreamParser(effort != "none")
    parser.feed(text)
    parser.finish()
    return parser.message
