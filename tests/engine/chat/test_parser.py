"""Parsing of completions: every split of the stream, every truncation, every violation of the grammar."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentkit_engine.chat import (
    CallMalformed,
    CallOpened,
    CallReady,
    CallsWithdrawn,
    ParseError,
    ParseEvent,
    ParseFinished,
    ReasoningDelta,
    StreamParser,
    TextDelta,
    Tokenizer,
    encode,
    encode_completion_ids,
    parse,
)

D, E = "｜DSML｜", "<｜end▁of▁sentence｜>"
CALLS = f"""

<{D}tool_calls>
<{D}invoke name="bash">
<{D}parameter name="command" string="true">ls -l < a
echo "</b>"</{D}parameter>
<{D}parameter name="limit" string="false">[1, {{"k": null}}]</{D}parameter>
</{D}invoke>
<{D}invoke name="submit">

</{D}invoke>
</{D}tool_calls>"""
TURN = f"I look.\n</think>Let me <see>.{CALLS}{E}"
FIRST = '{"command": "ls -l < a\\necho \\"</b>\\"", "limit": [1, {"k": null}]}'


def joined(events: Iterable[ParseEvent]) -> list[ParseEvent]:
    """Return the events with adjacent deltas of one kind joined."""
    out: list[ParseEvent] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            out[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            out[-1] = ReasoningDelta(last.text + event.text)
        else:
            out.append(event)
    return out


def run(
    pieces: Iterable[str | Sequence[int]], think: bool = True, **options: Any
) -> tuple[list[ParseEvent], StreamParser]:
    parser = StreamParser(think, **options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish()), parser


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [call(**c["function"]) for c in message["tool_calls"]]}


def shown_text(events: Iterable[ParseEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, ReasoningDelta | TextDelta))


EXPECTED: list[ParseEvent] = [
    ReasoningDelta("I look.\n"),
    TextDelta("Let me <see>."),
    CallOpened(0, "bash"),
    CallReady(0, "call_3_0", "bash", FIRST),
    CallOpened(1, "submit"),
    CallReady(1, "call_3_1", "submit", "{}"),
    ParseFinished("tool_calls"),
]


# Splits of the stream


def test_text_split_anywhere_gives_the_same_events() -> None:
    for cut in range(len(TURN) + 1):
        assert run([TURN[:cut], TURN[cut:]], turn=3)[0] == EXPECTED
    assert run(TURN, turn=3)[0] == EXPECTED


def test_ids_split_anywhere_give_the_same_events(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TURN)
    for cut in range(len(ids) + 1):
        assert run([ids[:cut], ids[cut:]], turn=3, tokenizer=tokenizer)[0] == EXPECTED
    assert run([[token_id] for token_id in ids], turn=3, tokenizer=tokenizer)[0] == EXPECTED


def test_a_call_is_ready_the_moment_its_invoke_closes(v4: Tokenizer) -> None:
    parser = StreamParser(True, tokenizer=v4)
    fed = ""
    for token_id in v4.encode(f"I look.\n</think>{CALLS}{E}"):
        fed += v4.decode([token_id])
        if any(isinstance(event, CallReady) for event in parser.feed([token_id])):
            break
    assert fed.rstrip("\n").endswith(f"</{D}invoke>")
    assert fed.count("invoke>") == 1


def test_text_is_emitted_without_delay() -> None:
    parser = StreamParser(False)
    shown = [shown_text(parser.feed(character)) for character in "a\nb\n\n<c </d"]
    assert shown == ["a", "", "\nb", "", "", "", "\n\n<c", " ", "", "", "</d"]


soup = st.lists(
    st.sampled_from(
        [
            *(
                "a",
                "\n",
                "\n\n",
                "<",
                "</",
                ">",
                " ",
                '"',
                "{bad",
                "1",
                "é💡",
                D,
                E,
                "<think>",
                "</think>",
                "<｜User｜>",
            ),
            *(f"<{D}tool_calls>\n", f"\n\n<{D}tool_calls>\n", f"</{D}tool_calls>", f"</{D}invoke>\n"),
            *(f'<{D}invoke name="f">\n', f'<{D}parameter name="x" string="true">', f'<{D}parameter name="y">'),
            *(f"</{D}parameter>\n", "tool_calls>", 'invoke name="', "parameter>", CALLS, TURN),
        ]
    ),
    max_size=14,
)


EXAMPLES = int(os.environ.get("AGENTKIT_FUZZ_EXAMPLES", "300"))
"""Examples of the fuzz test; 20,000 take minutes."""


@settings(deadline=None, max_examples=EXAMPLES)
@given(pieces=soup, think=st.booleans(), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_any_text_split_anywhere_gives_the_same_events(
    tiny: Tokenizer, pieces: list[str], think: bool, cuts: list[int]
) -> None:
    text = "".join(pieces)
    bounds = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    whole, parser = run([text], think)
    assert run(text, think)[0] == whole
    assert run([text[i:j] for i, j in pairwise(bounds)], think)[0] == whole
    ids = tiny.encode(text)
    assert run([ids], think, tokenizer=tiny)[0] == run([[i] for i in ids], think, tokenizer=tiny)[0] == whole
    assert isinstance(whole[-1], ParseFinished)
    assert sum(isinstance(event, ParseFinished) for event in whole) == 1
    assert all(isinstance(json.loads(e.arguments_json), dict) for e in whole if isinstance(e, CallReady))
    withdrawn = max((event.first for event in whole if isinstance(event, CallsWithdrawn)), default=-1)
    last = max((i for i, event in enumerate(whole) if isinstance(event, CallsWithdrawn)), default=-1)
    ends = [event.index for event in whole if isinstance(event, CallReady | CallMalformed)]
    assert ends == sorted(set(ends)) and (withdrawn >= 0 or ends == list(range(len(ends))))
    counted = [event.id for event in whole[last + 1 :] if isinstance(event, CallReady)]
    assert [each["id"] for each in parser.message.get("tool_calls", [])] == counted


# Truncation


OPEN, CLOSE = f"<{D}", f"</{D}invoke>"
FIRST_END = TURN.index(CLOSE) + len(CLOSE)
SECOND_START = TURN.index(OPEN, FIRST_END) + len(OPEN)
INSIDE_CALLS = [range(TURN.index(OPEN) + len(OPEN), FIRST_END), range(SECOND_START, TURN.rindex(CLOSE) + len(CLOSE))]
"""Ranges of TURN in which a truncation leaves a call incomplete; the first one begins with the block."""


def check_truncated(events: list[ParseEvent], length: int) -> None:
    """Check the events of the first `length` characters of TURN."""
    assert events[-1] == ParseFinished("length")
    assert "I look.\n</think>".startswith("".join(e.text for e in events if isinstance(e, ReasoningDelta)))
    assert "Let me <see>.\n\n".startswith("".join(e.text for e in events if isinstance(e, TextDelta)))
    assert sum(isinstance(e, CallReady) for e in events) == TURN[:length].count(CLOSE)
    malformed = [(e.index, e.error) for e in events if isinstance(e, CallMalformed)]
    assert malformed == [(i, "the turn ended inside the call") for i, r in enumerate(INSIDE_CALLS) if length in r]


def test_text_truncated_at_every_character() -> None:
    for end in range(len(TURN) - len(E) + 1):
        check_truncated(run([TURN[:end]])[0], end)


def test_ids_truncated_at_every_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TURN)
    for end in range(len(ids)):
        check_truncated(run([ids[:end]], tokenizer=tokenizer)[0], len(tokenizer.decode(ids[:end])))


def test_a_truncated_call_keeps_its_name(v4: Tokenizer) -> None:
    events, parser = run([TURN.partition('string="true">')[0]])
    assert events[-2:] == [CallMalformed(0, "bash", "the turn ended inside the call"), ParseFinished("length")]
    assert "tool_calls" not in parser.message
    events, _ = run([f"</think>a\n\n<{D}tool"])
    assert events == [TextDelta("a"), CallMalformed(0, None, "the turn ended inside the call"), ParseFinished("length")]


def test_a_character_cut_by_the_end_is_replaced(tiny: Tokenizer) -> None:
    ids = tiny.encode_text("ж")
    assert run([ids[:1]], think=False, tokenizer=tiny)[1].message["content"] == "�"


# The lenient rules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r</think>c", [ReasoningDelta("r"), TextDelta("c"), ParseFinished("length")]),
        (f"r</think>c\n\n<{E}more", [ReasoningDelta("r"), TextDelta("c\n\n<"), ParseFinished("stop")]),
        (f"r{E}", [ReasoningDelta("r"), ParseFinished("stop")]),
        (f"<think>r</think><think>c</think>{E}", [ReasoningDelta("r"), TextDelta("c"), ParseFinished("stop")]),
        (f"</think>a {D} b</{D}invoke>c{E}", [TextDelta("a  bc"), ParseFinished("stop")]),
        (f"</think>a<{D}function_calls>b{E}", [TextDelta("a<function_calls>b"), ParseFinished("stop")]),
        (f"</think><｜User｜>{E}", [TextDelta("<｜User｜>"), ParseFinished("stop")]),
    ],
)
def test_text_of_unusual_completions(text: str, expected: list[ParseEvent]) -> None:
    assert run([text])[0] == expected


F = f'<{D}invoke name="f">\n\n</{D}invoke>\n'
F_EVENTS: list[ParseEvent] = [CallOpened(0, "f"), CallReady(0, "call_0_0", "f", "{}"), ParseFinished("tool_calls")]


@pytest.mark.parametrize(
    ("text", "before"),
    [
        (f"</think>c<{D}tool_calls>\n{F}</{D}tool_calls>{E}", [TextDelta("c")]),
        (f"</think>c\n<{D}tool_calls>\n{F}</{D}tool_calls>{E}", [TextDelta("c")]),
        (f"</think>c\n\n\n<{D}tool_calls>\n{F}</{D}tool_calls>{E}", [TextDelta("c\n")]),
        (f"</think><{D}tool_calls>{F}</{D}tool_calls>\n{E}", []),
        (f"</think>{F}{E}", []),
        (f"</think><{D}tool_calls>\n{F}{E}", []),
        (f"r\n\n<{D}tool_calls>\n{F}</{D}tool_calls>{E}", [ReasoningDelta("r")]),
        (f"r\n\n<{D}tool_calls>\n{F}</{D}tool_calls></think>{E}", [ReasoningDelta("r")]),
    ],
)
def test_blocks_in_unusual_places(text: str, before: list[ParseEvent]) -> None:
    assert run([text])[0] == before + F_EVENTS


@pytest.mark.parametrize("text", ["invite", "😀"])
def test_a_tag_that_a_thought_breaks_off_and_the_answer_does_not_end_is_text(text: str) -> None:
    events, _ = run([f"I <{D}inv</think>{text}", f" you.{E}"])
    assert events == [ReasoningDelta("I <inv"), TextDelta(f"{text} you."), ParseFinished("stop")]


def test_a_call_left_open_after_a_thought_does_not_begin_the_block_anew() -> None:
    events, _ = run([f'r\n\n<{D}tool_calls>\n</think>{F}<{D}invoke name="g">\n{F}</{D}tool_calls>{E}'])
    assert events == [
        ReasoningDelta("r"),
        CallOpened(0, "f"),
        CallReady(0, "call_0_0", "f", "{}"),
        CallOpened(1, "g"),
        CallMalformed(1, "g", "the call is not closed"),
        CallOpened(2, "f"),
        CallReady(2, "call_0_2", "f", "{}"),
        ParseFinished("tool_calls"),
    ]


def test_text_after_a_block_that_opens_the_answer_withdraws_its_calls() -> None:
    text = f"<{D}tool_calls>\n{F}</{D}tool_calls>\n\nand so"
    events, parser = run([f"</think>{text}{E}"])
    assert events == [*F_EVENTS[:2], CallsWithdrawn(0), TextDelta(text), ParseFinished("stop")]
    assert parser.message == {"role": "assistant", "content": text, "reasoning_content": ""}


@pytest.mark.parametrize(
    ("inside", "name", "error"),
    [
        (f"<{D}invoke>\n</{D}invoke>\n", None, "the call has no name"),
        (f'<{D}invoke name="g">\n', "g", "the call is not closed"),
        (f'<{D}invoke name="g">\n{{"a": 1}}\n</{D}invoke>\n', "g", "text between parameters: '{\"a\": 1}'"),
        (f'<{D}invoke name="g">\nx<{D}parameter name="k">v</{D}parameter>\n</{D}invoke>\n', "g", "text between param"),
        (
            f'<{D}invoke name="g">\n' + 2 * f'<{D}parameter name="k" string="true">v</{D}parameter>\n',
            "g",
            "'k' is given twice",
        ),
        (f'<{D}invoke name="g">\n<{D}oops>', "g", "unknown or unfinished tag"),
        (f'<{D}invoke name="g">\n<{D}parameter>v', "g", "unexpected tag 'parameter>'"),
        (f'<{D}parameter name="k" string="true">v</{D}parameter>\n', None, "unexpected tag 'parameter name="),
        (f"</{D}invoke>\n", None, "unexpected tag 'invoke>'"),
        (f'<{D}invoke name="g">\n</{D}parameter>\n', "g", "unexpected tag 'parameter>'"),
        (f'<{D}invoke name="g">\n</{D}tool_calls>\n<{D}tool_calls>\n', "g", "the call is not closed"),
        (f'<{D}invoke name="g<', None, "unknown or unfinished tag"),
    ],
)
def test_a_malformed_call_does_not_affect_the_next(inside: str, name: str | None, error: str) -> None:
    events, parser = run([f"</think>\n\n<{D}tool_calls>\n{inside}{F}</{D}tool_calls>{E}"])
    malformed = [event for event in events if isinstance(event, CallMalformed)]
    assert [(event.index, event.name) for event in malformed] == [(0, name)]
    assert error in malformed[0].error
    assert events[-3:] == [CallOpened(1, "f"), CallReady(1, "call_0_1", "f", "{}"), ParseFinished("tool_calls")]
    assert [c["id"] for c in parser.message["tool_calls"]] == ["call_0_1"]


def test_a_block_without_calls_is_malformed() -> None:
    events, _ = run([f"</think>\n\n<{D}tool_calls>\nread a.txt\n</{D}tool_calls>{E}"])
    assert events == [CallMalformed(0, None, "the tool_calls block holds no call"), ParseFinished("tool_calls")]


@pytest.mark.parametrize(
    "value",
    [
        f"<{D}tool_calls>\n{F}",
        f"</{D}invoke>",
        f"</{D}parameters>",
        f"</{D}</",
        f"{D}{D}",
        "</think><think>",
        "<",
        "\n\n",
    ],
)
def test_markers_inside_a_value_are_text(value: str) -> None:
    block = f'<{D}invoke name="f">\n<{D}parameter name="x" string="true">{value}</{D}parameter>\n</{D}invoke>\n'
    _, parser = run([f"</think>\n\n<{D}tool_calls>\n{block}</{D}tool_calls>{E}"])
    assert [json.loads(c["function"]["arguments"]) for c in parser.message["tool_calls"]] == [{"x": value}]


def spelt(tokenizer: Tokenizer, *parts: str) -> Iterator[list[int]]:
    """Yield the ids of the parts; every second part only spells control tokens."""
    for i, part in enumerate(parts):
        yield tokenizer.encode_text(part) if i % 2 else tokenizer.encode(part)


def test_ids_distinguish_control_tokens_from_text_that_spells_them(tokenizer: Tokenizer) -> None:
    echo = f"</think> is a tag and so is {CALLS}{E}"
    events, _ = run(spelt(tokenizer, "so ", echo, "</think>", echo, E), tokenizer=tokenizer)
    assert events == [ReasoningDelta("so " + echo), TextDelta(echo), ParseFinished("stop")]


# Values


def arguments_of(parameter: str, schema: Any = None) -> Any:
    tools = [] if schema is None else [{"function": {"name": "f", "parameters": {"properties": {"x": schema}}}}]
    text = f'<{D}tool_calls>\n<{D}invoke name="f">\n<{D}parameter name="x"{parameter}</{D}parameter>\n</{D}invoke>\n'
    _, parser = run([text], think=False, tools=tools)
    return json.loads(parser.message["tool_calls"][0]["function"]["arguments"])["x"]


@pytest.mark.parametrize(
    ("parameter", "schema", "value"),
    [
        (' string="true">3', None, "3"),
        (' string="false">3', None, 3),
        (' string="false">{bad', None, "{bad"),
        (' string="false">NaN', None, "NaN"),
        (' string="false">' + "[" * 100_000, None, "[" * 100_000),
        (">3", None, "3"),
        (">3", {"type": "integer"}, 3),
        (">3", {"type": "string"}, "3"),
        (' string="true">3', {"type": "integer"}, 3),
        (' string="true">3', {"type": "number"}, 3),
        (' string="true">3.5', {"type": "integer"}, "3.5"),
        (' string="true">3', {"type": ["integer", "string"]}, "3"),
        (' string="true">true', {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, True),
        (' string="true">true', {"anyOf": [{"type": "boolean"}, {"enum": ["true"]}]}, "true"),
        (' string="true">{"a": [1]}', {"type": "object"}, {"a": [1]}),
        (' string="true">null', {"enum": [None]}, None),
        (' string="true">1.0', {"type": "integer"}, 1.0),
        (' string="false">12345', {"type": "string"}, "12345"),
        (' string="false">1.50', {"type": ["string", "null"]}, "1.50"),
        (' string="false">{"a": 1}', {"type": "string"}, '{"a": 1}'),
        (' string="false">true', {"enum": ["true", "false"]}, "true"),
        (' string="false">null', {"type": "string"}, None),
        (' string="true">5', {"anyOf": [{"const": "auto"}, {"type": "integer"}]}, 5),
        (' string="true">auto', {"anyOf": [{"const": "auto"}, {"type": "integer"}]}, "auto"),
        (' string="true">5', {"anyOf": [{"type": "string", "minLength": 3}, {"type": "integer"}]}, "5"),
        (' string="true">null', {"type": ["string", "null"]}, "null"),
        (' string="true">[1]', {"allOf": [{"type": ["array", "string"]}, {"type": "array"}]}, [1]),
        (' string="true">3', {"const": 3}, 3),
        (' string="false">3', {"const": "3"}, "3"),
        (' string="true">[1]', {"not": {"type": "string"}}, [1]),
        (' string="true">{"x": 1}', {"type": "array"}, '{"x": 1}'),
        (' string="false">7', {"$ref": "#/nowhere"}, 7),
    ],
)
def test_values_and_their_types(parameter: str, schema: Any, value: Any) -> None:
    assert arguments_of(parameter, schema) == value


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}
BEHIND = {
    "Point": POINT,
    "Maybe": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
    "Name": {"type": "string"},
    "Loop": {"$ref": "#/$defs/Loop"},
    "Anchored": {"$anchor": "here", "type": "integer"},
}


@pytest.mark.parametrize(
    ("parameter", "schema", "value"),
    [
        (' string="true">{"x": 1}', {"$ref": "#/$defs/Point"}, {"x": 1}),
        (' string="true">{"x": 1}', {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, {"x": 1}),
        (' string="true">{"x": 1}', {"$ref": "#/$defs/Maybe", "description": "d"}, {"x": 1}),
        (' string="true">null', {"allOf": [{"$ref": "#/$defs/Maybe"}]}, None),
        (' string="true">{"x": 1}', {"anyOf": [{"$ref": "#/$defs/Point"}, {"$ref": "#/$defs/Name"}]}, '{"x": 1}'),
        (' string="false">12', {"$ref": "#/$defs/Name"}, "12"),
        (' string="true">3', {"$ref": "#here"}, 3),
        (' string="true">3', {"$ref": "#/$defs/Loop"}, "3"),
        (' string="true">3', {"$ref": "#"}, "3"),
    ],
)
@pytest.mark.parametrize("place", ["properties", "$ref", "allOf", "oneOf", "additionalProperties"])
def test_types_behind_references_are_found(parameter: str, schema: Any, value: Any, place: str) -> None:
    properties: dict[str, Any] = {"type": "object", "properties": {"x": schema}}
    parameters = {
        "properties": properties,
        "$ref": {"$ref": "#/$defs/Root"},
        "allOf": {"allOf": [{"$ref": "#/$defs/Root"}]},
        "oneOf": {"oneOf": [{"properties": {"y": {}}}, {"$ref": "#/$defs/Root"}]},
        "additionalProperties": {"additionalProperties": schema},
    }[place]
    if schema == {"$ref": "#"} and place == "additionalProperties":
        pytest.skip("the parameters are then any value")
    parameters = {**parameters, "$defs": {**BEHIND, "Root": properties}}
    text = f'<{D}tool_calls>\n<{D}invoke name="f">\n<{D}parameter name="x"{parameter}</{D}parameter>\n</{D}invoke>\n'
    _, parser = run([text], think=False, tools=[{"function": {"name": "f", "parameters": parameters}}])
    assert json.loads(parser.message["tool_calls"][0]["function"]["arguments"])["x"] == value


def test_valid_json_is_not_rewritten() -> None:
    block = CALLS.replace('[1, {"k": null}]', '[1,{ "k":null}]')
    assert parse(f"{block}{E}", effort="none")["tool_calls"][0]["function"]["arguments"].endswith(
        '"limit": [1,{ "k":null}]}'
    )


# Strict


def test_strict_parses_the_encoders_output() -> None:
    message = parse(TURN, effort="high", strict=True)
    assert message == parse(TURN, effort="high")
    assert message["reasoning_content"] == "I look.\n"
    assert message["content"] == "Let me <see>."
    assert [c["function"]["arguments"] for c in message["tool_calls"]] == [FIRST, "{}"]
    assert parse(f"hi{E}", effort="none", strict=True) == {"role": "assistant", "content": "hi"}


def test_strict_leaves_json_values_unchecked_as_the_reference_does() -> None:
    block = CALLS.replace('[1, {"k": null}]', "{bad")
    message = parse(f"{block}{E}", effort="none", strict=True)
    assert message["tool_calls"][0]["function"]["arguments"].endswith('"limit": {bad}')


INVOKE, PARAMETER = (
    f'\n\n<{D}tool_calls>\n<{D}invoke name="f">\n',
    f'<{D}parameter name="k" string="true">v</{D}parameter>\n',
)


@pytest.mark.parametrize(
    ("text", "effort", "error"),
    [
        ("hi", "none", "missing <｜end▁of▁sentence｜>"),
        (f"hi{E}", "high", "missing </think>"),
        (f"{CALLS}{E}", "high", "missing </think>"),
        (f"r{CALLS}</think>{E}", "high", "missing </think>"),
        (f"{CALLS}more{E}", "none", "right after the tool_calls block"),
        (CALLS, "none", "right after the tool_calls block"),
        (f"hi{E}more", "none", "text after <｜end▁of▁sentence｜>"),
        (f"{CALLS}{E}more", "none", "text after <｜end▁of▁sentence｜>"),
        (f"<think>{E}", "none", "control token <think> inside the content"),
        (f"<｜begin▁of▁sentence｜></think>{E}", "high", "inside the reasoning"),
        (f"</think></think>{E}", "high", "control token </think> inside the content"),
        (f"a{CALLS.lstrip()}{E}", "none", "control token ｜DSML｜ inside the content"),
        (f"\n\n<{D}tool_calls> {E}", "none", "after the tool_calls marker"),
        (f"\n\n<{D}tool_calls>\nx</{D}tool_calls>{E}", "none", "expected an invoke"),
        (f'{INVOKE}<{D}parameter name="k">v</{D}parameter>\n', "none", "'k' lacks its string attribute"),
        (f"{INVOKE}{PARAMETER}{PARAMETER}", "none", "'k' is given twice"),
        (f"{INVOKE}{PARAMETER[:-1]}", "none", "'k' is not closed"),
        (f"{INVOKE}x", "none", "expected a parameter"),
    ],
)
def test_strict_errors(text: str, effort: Any, error: str) -> None:
    with pytest.raises(ParseError, match=error):
        parse(text, effort=effort, strict=True)


def test_ids_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="pass tokenizer="):
        StreamParser(False).feed([1])


# Round trips

words = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
nasty = st.one_of(words, st.sampled_from(["\n\n", "<", "</", D, "</think>", E, CALLS, f"</{D}parameter>", "a\n"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | nasty,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty, inner, max_size=3),
    max_leaves=5,
)
keys = st.text(st.characters(blacklist_characters='"<>', blacklist_categories=["Cs"]), min_size=1, max_size=8)


def messages(text: st.SearchStrategy[str], values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    arguments = st.dictionaries(keys, values, max_size=3).map(lambda a: json.dumps(a, ensure_ascii=False))
    calls = st.lists(st.builds(call, keys, arguments), min_size=1, max_size=3)
    plain = {"role": st.just("assistant"), "content": text, "reasoning_content": text}
    return st.fixed_dictionaries(plain, optional={"tool_calls": calls})


@settings(deadline=None)
@given(message=messages(nasty, json_values), think=st.booleans())
def test_ids_round_trip_for_any_text(v4: Tokenizer, tiny: Tokenizer, message: dict[str, Any], think: bool) -> None:
    expected = message if think else {key: value for key, value in message.items() if key != "reasoning_content"}
    for tokenizer in (v4, tiny):
        ids = encode_completion_ids(message, tokenizer=tokenizer, think=think)
        events, parser = run([[token_id] for token_id in ids], think, tokenizer=tokenizer)
        assert without_ids(parser.message) == expected
        assert events[-1] == ParseFinished("tool_calls" if "tool_calls" in message else "stop")


def harmless(text: str) -> bool:
    return not any(mark in text for mark in (D, "</think>", "<think>", E, "<｜begin▁of▁sentence｜>"))


@settings(deadline=None)
@given(
    message=messages(words.filter(harmless), json_values.filter(lambda v: harmless(json.dumps(v, ensure_ascii=False))))
)
@example(
    message={
        "role": "assistant",
        "content": "a\n<",
        "reasoning_content": "\n\n<",
        "tool_calls": [call("f", '{"x": "</"}')],
    }
)
def test_text_round_trips(message: dict[str, Any]) -> None:
    question = {"role": "user", "content": "q"}
    prompt, text = encode([question], effort="high"), encode([question, message], effort="high")
    completion = text.removeprefix(prompt)
    assert without_ids(parse(completion, effort="high")) == message
    assert without_ids(parse(completion, effort="high", strict=True)) == message
    again = encode([question, parse(completion, effort="high")], effort="high")
    assert again == text
