"""DeepSeek-V4's completions: from sampled ids, or text, to reasoning, content and tool calls.

`StreamParser` reads a completion as it is sampled. Fed with ids it knows control tokens by id, so text that only spells
`</think>` or `｜DSML｜` stays text; fed with text it goes by the spelling. It is lenient, as serving a model demands:

- the end-of-sentence token may be missing (length stop); what comes after it is ignored;
- a tool block need not follow an empty line, may lack its `tool_calls` wrapper, and ends the reasoning when it starts
  before `</think>`;
- a call that is cut off or breaks the grammar is reported as `CallMalformed`, and its DSML never reaches the content;
- inside a parameter value only `</｜DSML｜parameter>` means anything, every other marker is text;
- `string="false"` on what is not JSON falls back to a string; where the schema of a parameter, references and unions
  included, cannot accept what the attribute says and can accept the other reading, the other one is taken;
- `<think>`, `</think>` and `｜DSML｜` where they mean nothing are dropped; other control tokens stay as text.

`parse(..., strict=True)` is the grammar of DeepSeek's own parser, with an error for each departure from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentkit_engine.chat.errors import ParseError
from agentkit_engine.chat.tokenizer import Tokenizer
from agentkit_engine.chat.tokens import BOS, DSML, EOS, THINK, THINK_END
from agentkit_engine.schema_types import MAX_LOOKS, could_accept, read_json, resolve

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
class CallStarted:
    """The call's name is known; its arguments are still being written."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallReady:
    """The call's `</｜DSML｜invoke>` has closed. `arguments_json` is JSON text of an object."""

    index: int
    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class CallMalformed:
    """A call that cannot be run: cut off, or outside the grammar. `name` is None when even that was not reached."""

    index: int
    name: str | None
    error: str


@dataclass(frozen=True, slots=True)
class ParseFinished:
    """The turn is over: "stop" and "tool_calls" (any call, malformed or not) ended with EOS, "length" did not."""

    reason: FinishReason


ParseEvent = ReasoningDelta | TextDelta | CallStarted | CallReady | CallMalformed | ParseFinished


_State = Literal[
    "reasoning",
    "content",
    "block",  # inside tool_calls, between calls
    "skip",  # after a malformed call: until the next call, or the block's end
    "call",  # inside an invoke, between parameters
    "value",  # inside a parameter
    "after",  # after the block: white space at the end is dropped
    "done",
]

# The end of a text that may yet turn out to belong to a tag: up to two newlines, then `<` or `</`.
_HELD = re.compile(r"\n{0,2}</?\Z|\n{1,2}\Z")
_TAG_STARTS = ("tool_calls>", 'invoke name="', 'parameter name="', "invoke>", "parameter>")
_TAG_HEAD = re.compile(r'(tool_calls|invoke|parameter)(?: name="([^"]*)")?(?: string="(true|false)")?[^>"]*>')
_VALUE_END = "parameter>"


@dataclass(slots=True)
class _Tag:
    """A DSML tag being read: `lead` is the `<` or `</` before the marker, `text` what has come after it."""

    lead: str
    text: str = ""

    def could_be_known(self) -> bool:
        return self.text.startswith(_TAG_STARTS) or any(start.startswith(self.text) for start in _TAG_STARTS)


@dataclass(slots=True)
class _Call:
    """The call being read: parameters as (raw value, its `string` attribute if any)."""

    index: int
    name: str
    parameters: dict[str, tuple[str, str | None]]
    key: str = ""
    string: str | None = None


class StreamParser:
    """Turns one assistant turn, as it is sampled, into events.

    However the input is cut into pieces, the events are the same once neighbouring deltas are joined.

    Args:
        think: Whether the prompt ended with `<think>` (else with `</think>`).
        tokenizer: Needed to feed ids; None to feed text.
        turn: Number of the turn, for the call ids `call_{turn}_{index}`.
        tools: OpenAI tool dicts whose schemas settle values of unclear type.
    """

    def __init__(
        self,
        think: bool,
        *,
        tokenizer: Tokenizer | None = None,
        turn: int = 0,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._think = think
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream() if tokenizer else None
        self._turn = turn
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._state: _State = "reasoning" if think else "content"
        self._unread = ""  # text fed but not yet split into controls and text (text input only)
        self._text = ""  # plain text not yet given out, in a value: the value so far
        self._tag: _Tag | None = None
        self._call: _Call | None = None
        self._index = 0  # of the next call
        self._open_block = False  # a block was opened and has not yet shown a call
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

    def feed(self, piece: str | Iterable[int]) -> list[ParseEvent]:
        """Read more of the completion, as ids or as text, and return what it shows.

        Raises:
            ValueError: Ids were fed to a parser without a tokenizer.
            TokenizerError: An id is not in the vocabulary.
        """
        if isinstance(piece, str):
            self._read_spelt(piece)
        else:
            self._read_ids(piece)
        return self._take_events()

    def finish(self) -> list[ParseEvent]:
        """Say that nothing more comes. Without an EOS before it, the turn counts as cut off ("length")."""
        if self._state != "done":
            if self._decoder:
                self._read_text(self._decoder.finish())
            if "｜" not in self._unread:  # with one it is the beginning of a control token
                self._read_text(self._unread)
            self._end(cut=True)
        return self._take_events()

    # Input: ids or text become control tokens and plain text.

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
        self._unread += text
        while match := _SPELT.search(self._unread):
            self._unread, before = self._unread[match.end() :], self._unread[: match.start()]
            self._read_text(before)
            self._read_control(match.group())
        keep = _partial_length(self._unread)
        ready, self._unread = self._unread[: len(self._unread) - keep], self._unread[len(self._unread) - keep :]
        self._read_text(ready)

    # Reading: one state machine over controls and text.

    def _read_control(self, token: str) -> None:
        if self._state == "done":
            return
        if token == EOS:
            self._end(cut=False)
        elif token == DSML:
            self._start_tag()
        elif self._state == "value" or token not in (THINK, THINK_END):
            self._read_text(token)
        elif token == THINK_END and self._state == "reasoning":
            self._drop_tag()
            self._give_out(everything=True)
            self._state = "content"

    def _read_text(self, text: str) -> None:
        if not text or self._state == "done":
            return
        if self._tag is None:
            self._text += text
            self._give_out()
            return
        self._tag.text += text
        if self._state == "value":
            self._end_value()
        elif not self._tag.could_be_known():
            self._drop_tag()
        elif head := _TAG_HEAD.match(self._tag.text):
            rest = self._tag.text[head.end() :]
            closing = self._tag.lead == "</"
            self._tag = None
            self._enter(head, closing=closing)
            self._read_text(rest)

    def _start_tag(self) -> None:
        if self._state == "value" and self._tag is not None:
            self._text += self._tag.lead + DSML + self._tag.text
            self._tag = None
        self._drop_tag()
        lead = _lead(self._text)
        if self._state == "value" and lead != "</":
            self._text += DSML
        elif lead:
            self._text = self._text[: -len(lead)]
            self._tag = _Tag(lead)

    def _end_value(self) -> None:
        """In a value: the tag either is the parameter's end or was part of the value."""
        assert self._tag is not None and self._call is not None
        if self._tag.text.startswith(_VALUE_END):
            rest = self._tag.text[len(_VALUE_END) :]
            call = self._call
            value, self._text, self._tag = self._text, "", None
            self._state = "call"
            if call.key in call.parameters:
                self._malformed(f"parameter {call.key!r} is given twice")
            else:
                call.parameters[call.key] = (value, call.string)
            self._read_text(rest)
        elif not _VALUE_END.startswith(self._tag.text):
            text = self._tag.lead + DSML + self._tag.text
            self._tag = None
            self._read_text(text)

    def _drop_tag(self) -> None:
        """The tag being read is none: in a block the call is malformed, elsewhere the marker goes and text stays."""
        tag, self._tag = self._tag, None
        if tag is None:
            return
        if self._state in ("block", "call"):
            self._malformed("unknown or unfinished tag")
        if tag.could_be_known():  # a control token broke it off, and the text's end may be the start of a tag
            self._text += _lead(tag.text)
        else:
            self._read_text(tag.lead + tag.text)

    def _enter(self, head: re.Match[str], *, closing: bool) -> None:
        """Act on a complete tag; never called inside a value."""
        kind, name, string = head.groups()
        if self._state in ("reasoning", "content", "after"):
            if closing or kind == "parameter":
                return
            self._text = self._text.removesuffix("\n").removesuffix("\n")
            self._give_out(everything=True)
            self._state, self._text, self._open_block = "block", "", True
        if kind == "tool_calls" and closing:
            if self._state == "call":
                self._malformed("the call is not closed")
            self._end_block()
        elif kind == "invoke" and not closing:
            if self._state == "call":
                self._malformed("the call is not closed")
            self._state, self._text, self._open_block = "call", "", False
            if name is None:
                self._malformed("the call has no name")
                return
            self._call = _Call(self._index, name, {})
            self._events.append(CallStarted(self._index, name))
            self._index += 1
        elif kind == "invoke" and self._state == "call":
            self._end_call()
        elif kind == "parameter" and not closing and name is not None and self._state == "call":
            assert self._call is not None
            if self._text.strip():
                self._malformed(f"text between parameters: {self._text.strip()[:40]!r}")
                return
            self._call.key, self._call.string = name, string
            self._state, self._text = "value", ""
        elif self._state == "skip":
            if kind == "invoke":
                self._state = "block"
        elif not (kind == "tool_calls" and self._state == "block"):
            self._malformed(f"unexpected tag {head.group()[:40]!r}")

    def _end_call(self) -> None:
        call = self._call
        assert call is not None
        if self._text.strip():
            self._malformed(f"text between parameters: {self._text.strip()[:40]!r}")
            self._state = "block"
            return
        schema = self._schemas.get(call.name, {})
        arguments = ", ".join(
            f"{_dumps(key)}: {_value_json(value, string, _parameter(schema, key), schema)}"
            for key, (value, string) in call.parameters.items()
        )
        ready = CallReady(call.index, f"call_{self._turn}_{call.index}", call.name, "{" + arguments + "}")
        self._ready.append(ready)
        self._events.append(ready)
        self._call, self._text, self._state = None, "", "block"

    def _end_block(self) -> None:
        if self._open_block:
            self._malformed("the tool_calls block holds no call")
        self._text, self._state, self._open_block = "", "after", False

    def _malformed(self, error: str) -> None:
        """Report the call being read, or one that never got a name, and skip to where the next can start."""
        if self._call is not None:
            self._events.append(CallMalformed(self._call.index, self._call.name, error))
        else:
            self._events.append(CallMalformed(self._index, None, error))
            self._index += 1
        self._call, self._text, self._tag = None, "", None
        self._state, self._open_block = "skip", False

    def _end(self, *, cut: bool) -> None:
        """The turn is over: by EOS, or cut off."""
        call_begun = self._tag is not None and self._tag.lead == "<" and self._state != "skip"
        if self._call is not None or self._open_block or call_begun:
            self._malformed("the turn ended inside the call")
        if not (cut and self._text == "\n\n<"):
            self._give_out(everything=True)
        self._state = "done"
        reason: FinishReason = "length" if cut else "tool_calls" if self._index else "stop"
        self._events.append(ParseFinished(reason))

    # Output

    def _give_out(self, *, everything: bool = False) -> None:
        """Emit the text that can no longer belong to a tag."""
        if self._state == "after" and self._text.strip() not in ("", "<", "</"):
            self._state = "content"
        if self._state not in ("reasoning", "content"):
            return
        held = None if everything else _HELD.search(self._text)
        cut = held.start() if held else len(self._text)
        text, self._text = self._text[:cut], self._text[cut:]
        if not text:
            return
        if self._state == "reasoning":
            self._reasoning.append(text)
            self._events.append(ReasoningDelta(text))
        else:
            self._content.append(text)
            self._events.append(TextDelta(text))

    def _take_events(self) -> list[ParseEvent]:
        events, self._events = self._events, []
        return events


def _lead(text: str) -> str:
    """The beginning of a tag at the end of `text`: `</`, `<` or nothing."""
    return "</" if text.endswith("</") else "<" if text.endswith("<") else ""


_SPELT = re.compile("|".join(map(re.escape, (THINK, THINK_END, DSML, EOS))))


def _partial_length(text: str) -> int:
    """Length of the longest end of `text` that begins one of the spelt control tokens."""
    longest = min(len(text), max(map(len, (THINK, THINK_END, DSML, EOS))) - 1)
    for length in range(longest, 0, -1):
        if any(token.startswith(text[-length:]) for token in (THINK, THINK_END, DSML, EOS)):
            return length
    return 0


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value_json(value: str, string: str | None, schema: Any, root: Any) -> str:
    """JSON text of a parameter, from its raw value, its `string` attribute and, when those leave doubt, its schema.

    The attribute is believed unless the schema cannot accept what it says and can accept the other reading.
    """
    is_json, read = read_json(value)
    if not is_json:
        return _dumps(value)
    as_text, as_json = could_accept(schema, root, value), could_accept(schema, root, read)
    if string == "false":
        text = as_text and not as_json and read is not None  # null says "nothing", not the text "null"
        return _dumps(value) if text else value
    return _dumps(value) if as_text or not as_json else value


def _parameter(schema: Any, key: str) -> Any:
    """The schema of one parameter, as far as `properties` tell, those behind references and in branches among them."""
    found: list[Any] = []
    looks = 0

    def look(part: Any, inside: tuple[int, ...]) -> None:
        nonlocal looks
        looks += 1
        if not isinstance(part, Mapping) or id(part) in inside or looks > MAX_LOOKS:
            return
        inside = (*inside, id(part))
        properties = part.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            found.append(properties[key])
        look(resolve(part.get("$ref"), schema), inside)
        for keyword in ("allOf", "anyOf", "oneOf"):
            for branch in part.get(keyword) or ():
                look(branch, inside)
        if not found and isinstance(part.get("additionalProperties"), Mapping):
            found.append(part["additionalProperties"])

    look(schema, ())
    return {"anyOf": found} if found else True


def parse(text: str, *, effort: str, strict: bool = False) -> dict[str, Any]:
    """The assistant message in a completion's text: what follows the prompt, `</think>` and EOS included.

    Args:
        text: The completion, as `Tokenizer.decode` gives it.
        effort: The effort of the prompt; with "none" the text has no reasoning.
        strict: Hold the text to DeepSeek's grammar. Otherwise read it as `StreamParser` does; calls that are malformed
            are left out, so use the parser itself where they matter.

    Raises:
        ParseError: `strict`, and the text departs from the grammar.
    """
    if strict:
        return _parse_strict(text, think=effort != "none")
    parser = StreamParser(effort != "none")
    parser.feed(text)
    parser.finish()
    return parser.message


_BLOCK_START = f"\n\n<{DSML}tool_calls"
_STRICT_INVOKE = re.compile(rf'<{DSML}invoke name="([^"<>]*)">\n')
_STRICT_PARAMETER = re.compile(rf'<{DSML}parameter name="([^"<>]*)"( string="(?:true|false)")?>')


def _parse_strict(text: str, *, think: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    rest = text
    reasoning = ""
    if think:
        reasoning, found, rest = rest.partition(THINK_END)
        if not found or _BLOCK_START in reasoning or EOS in reasoning:
            raise ParseError(f"missing {THINK_END} before the answer; the completion starts {text[:60]!r}")
    content, block_start, block = rest.partition(_BLOCK_START)
    calls: list[dict[str, Any]] = []
    if EOS in content or not block_start:
        content, found, after = rest.partition(EOS)
        if not found:
            raise ParseError(f"missing {EOS} at the end; the completion ends {text[-60:]!r}")
    else:
        calls, after = _parse_block_strict(block)
        if not after.startswith(EOS):
            raise ParseError(f"expected {EOS} right after the tool_calls block; got {after[:60]!r}")
        after = after.removeprefix(EOS)
    if after:
        raise ParseError(f"text after {EOS}: {after[:60]!r}")
    for part, name in ((reasoning, "reasoning"), (content, "content")):
        for token in (BOS, EOS, THINK, THINK_END, DSML):
            if token in part:
                raise ParseError(f"control token {token} inside the {name}")
    message["content"] = content
    if think:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _parse_block_strict(block: str) -> tuple[list[dict[str, Any]], str]:
    """The calls of a block, and what follows it. `block` starts after `<｜DSML｜tool_calls`."""
    calls: list[dict[str, Any]] = []
    end = f"</{DSML}tool_calls>"
    if not block.startswith(">\n"):
        raise ParseError(f"expected '>\\n' after the tool_calls marker; got {block[:60]!r}")
    rest = block[2:]
    while not rest.startswith(end):
        invoke = _STRICT_INVOKE.match(rest)
        if invoke is None:
            raise ParseError(f"expected an invoke or the end of the tool_calls block; got {rest[:60]!r}")
        arguments, rest = _parse_parameters_strict(rest[invoke.end() :])
        function = {"name": invoke[1], "arguments": arguments}
        calls.append({"id": f"call_0_{len(calls)}", "type": "function", "function": function})
    return calls, rest[len(end) :]


def _parse_parameters_strict(text: str) -> tuple[str, str]:
    """The arguments of a call as JSON text, and what follows its `</invoke>` line."""
    arguments: dict[str, str] = {}
    end = f"</{DSML}invoke>\n"
    rest = text.removeprefix("\n")  # a call without parameters has an empty line
    while not rest.startswith(end):
        parameter = _STRICT_PARAMETER.match(rest)
        if parameter is None:
            raise ParseError(f"expected a parameter or the end of the invoke; got {rest[:60]!r}")
        key, string = parameter.groups()
        if string is None:
            raise ParseError(f"parameter {key!r} lacks its string attribute")
        if key in arguments:
            raise ParseError(f"parameter {key!r} is given twice")
        value, found, rest = rest[parameter.end() :].partition(f"/{DSML}parameter")
        if not found or not value.endswith("<") or not rest.startswith(">\n"):
            raise ParseError(f"parameter {key!r} is not closed by its tag and a newline; got {rest[:60]!r}")
        rest = rest[2:]
        arguments[key] = _dumps(value[:-1]) if "true" in string else value[:-1]
    return "{" + ", ".join(f"{_dumps(key)}: {value}" for key, value in arguments.items()) + "}", rest[len(end) :]
