"""The stream parser reads any text or ids, in any pieces, with tools of any schema; the strict one has one error."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import strategies as st
from tests.fuzz import amounts, fuzz, near, near_text

from agentkit_engine.chat import (
    CallReady,
    ParseError,
    ParseEvent,
    ParseFinished,
    StreamParser,
    Tokenizer,
    TokenizerError,
    parse,
)

from .test_parser import CALLS, TURN, D, E, joined

SCHEMA = {
    "type": "object",
    "properties": {
        "command": {"type": "string", "enum": ["a"]},
        "x": {"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]},
        "limit": {"$ref": "#/$defs/P/properties/z/items"},
    },
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"P": {"type": "object", "properties": {"z": {"type": "array", "items": {"const": 3}}}}},
    "allOf": [{"properties": {"limit": {"not": {"type": "string"}}}}],
}
PIECES = [
    *(
        D,
        E,
        "<think>",
        "</think>",
        f"<{D}tool_calls>\n",
        f"</{D}tool_calls>",
        f'<{D}invoke name="f">\n',
        f"</{D}invoke>\n",
    ),
    *(
        f'<{D}parameter name="x" string="true">',
        f'<{D}parameter name="arguments">',
        f"</{D}parameter>\n",
        f"<{D}calls>",
    ),
    *("<", "</", ">", "/>", '"', "'", "\n\n", '{"x": 1}', "1", "9" * 5000, "[" * 950 + "]" * 950, "NaN", "1e999"),
    *("｜", "<｜User｜>", "\ud800", "💡", CALLS, TURN),
]
texts = st.one_of(
    near_text(TURN, PIECES, 6),
    near_text(f"</think>{CALLS}{E}", PIECES, 4),
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.text(max_size=40),
)
inputs = st.fixed_dictionaries(
    {
        "text": texts,
        "schema": st.none() | near(SCHEMA),
        "think": st.booleans(),
        "calls": st.booleans(),
        "ends_after_block": st.booleans(),
        "stopped": st.booleans(),
        "cuts": st.lists(st.integers(0, 600), max_size=8),
    }
)


def run(pieces: Any, value: dict[str, Any], tokenizer: Tokenizer | None = None) -> list[ParseEvent]:
    schema = value["schema"]
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("f", "bash")]
    parser = StreamParser(
        value["think"],
        tokenizer=tokenizer,
        tools=tools if schema is not None else [],
        calls=value["calls"],
        ends_after_block=value["ends_after_block"],
    )
    events = [event for piece in pieces for event in parser.feed(piece)]
    found = joined(events + parser.finish(stopped=value["stopped"]))
    json.dumps(parser.message)
    return found


@amounts(100, 5_000)
def test_any_text_in_any_pieces_gives_the_same_events(examples: int) -> None:
    def check(value: dict[str, Any]) -> None:
        text = value["text"]
        whole = run([text], value)
        bounds = sorted({0, *(min(cut, len(text)) for cut in value["cuts"]), len(text)})
        assert run([text[i:j] for i, j in pairwise(bounds)], value) == whole
        if len(text) < 2000:
            assert run(text, value) == whole
        assert [event for event in whole if isinstance(event, ParseFinished)] == whole[-1:]
        for event in whole:
            assert not isinstance(event, CallReady) or isinstance(json.loads(event.arguments_json), dict)
        for effort in ("high", "none"):
            assert parse(text, effort=effort)["role"] == "assistant"
            try:
                parse(text, effort=effort, strict=True)
            except ParseError as error:
                assert len(str(error)) < 500

    fuzz(check, inputs, examples)


@amounts(100, 2_500)
def test_any_ids_in_any_pieces_give_the_same_events(examples: int, tiny: Tokenizer) -> None:
    markers = [tiny.control_id(token) for token in (D, E, "<think>", "</think>")]
    some = st.lists(st.sampled_from(markers) | st.integers(0, tiny.vocab_size - 1), max_size=30)
    ids = some | st.builds(lambda text, more: tiny.encode(text) + more, near_text(TURN, PIECES[:12], 4), some)

    def check(value: tuple[dict[str, Any], list[int]]) -> None:
        options, tokens = value
        whole = run([tokens], options, tiny)
        assert run([[token] for token in tokens], options, tiny) == whole
        with pytest.raises(TokenizerError):
            run([[*tokens[:3], tiny.vocab_size + 7], [-1]], options, tiny)

    fuzz(check, st.tuples(inputs, ids), examples)


def test_the_end_of_a_broken_tag_may_begin_the_next_one() -> None:
    """Also while a malformed call is skipped, and however the text is split."""
    text = f"<{D}invoke><{D}><{D}invoke>"
    value = {"schema": None, "think": False, "calls": True, "ends_after_block": False, "stopped": False}
    assert run([text], value) == run(text, value)


def nested(depth: int, keyword: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {keyword: [schema]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        *(nested(5000, keyword) for keyword in ("allOf", "anyOf", "oneOf")),
        {"$ref": "#/$defs/0", "$defs": {str(each): {"$ref": f"#/$defs/{each + 1}"} for each in range(5000)}},
        {"properties": {"x": {"$ref": "#/allOf/" + "9" * 5000}}, "allOf": [1]},
        {"properties": {"x": {"type": 3, "enum": 5, "allOf": True, "anyOf": {}}}},
        {"properties": {"x": {"type": [["integer"]], "enum": "ab"}}},
        {"properties": [], "required": 7, "allOf": 1, "anyOf": False},
        {"required": [[]]},
        True,
        [],
    ],
)
def test_a_schema_that_is_deep_or_malformed_does_not_stop_the_parser(schema: Any) -> None:
    for parameter in (
        'name="x" string="true">3',
        'name="x" string="false">3',
        'name="arguments" string="false">{"x": 3}',
    ):
        block = f'<{D}invoke name="f">\n<{D}parameter {parameter}</{D}parameter>\n</{D}invoke>'
        value = {"schema": schema, "think": False, "calls": True, "ends_after_block": False, "stopped": False}
        assert isinstance(run([block], value)[-2], CallReady)
