"""Grammars: calls are valid, everything else is free, and the mask depends only on the ids."""

from __future__ import annotations

import json
import math
import random
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agentkit_engine import AsyncEngine, Engine, GrammarError, GrammarMissingError, ModelSpec, SamplingParams
from agentkit_engine.chat import CallReady, StreamParser, Tokenizer, encode_completion_ids, encode_ids, parse
from agentkit_engine.chat.tokens import ASSISTANT, DSML, THINK, THINK_END
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.grammar import Grammar, Grammars, GrammarWarning, Matcher
from agentkit_engine.model import Decoder
from agentkit_engine.runtime.scheduled import Computed, ScheduledTokens
from agentkit_engine.schema_forms import whole_text

from .conftest import randomize_, small_config

TOKENIZER = Tokenizer.from_dir(PACKAGED_MODELS["tiny"])
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)
EOS, MARKER = TOKENIZER.eos_id, TOKENIZER.control_id(DSML)
TURN = [TOKENIZER.bos_id, TOKENIZER.control_id(ASSISTANT), TOKENIZER.control_id(THINK_END)]
THINKING_TURN = [*TURN[:2], TOKENIZER.control_id(THINK)]


def tool(parameters: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def with_value(schema: Any) -> dict[str, Any]:
    """Return a tool with one required parameter `v`."""
    return tool({"type": "object", "properties": {"v": schema}, "required": ["v"]})


def call_ids(arguments: Any, name: str = "f") -> list[int]:
    """Return the ids of a completion that is only this call, as the chat encoding writes it."""
    call = {"function": {"name": name, "arguments": json.dumps(arguments)}}
    return encode_completion_ids({"role": "assistant", "tool_calls": [call]}, tokenizer=TOKENIZER, think=False)


def accepts(grammar: Grammar, ids: Sequence[int], turn: Sequence[int] = TURN) -> bool:
    """Return whether the mask allows every id and the turn is complete after the last one."""
    matcher, done = grammar.matcher(), list(turn)
    for token_id in ids:
        matcher.follow(done)
        mask_V = matcher.mask()
        if mask_V is not None and mask_V[token_id] != 0:
            return False
        done.append(token_id)
    matcher.follow(done)
    return matcher.mask() is None


def unpacked(matcher: Matcher) -> list[int]:
    """Return the ids that the packed mask allows."""
    bits = matcher.bitmask()
    assert bits is not None and len(bits) % 4 == 0
    found: list[int] = np.unpackbits(bits, bitorder="little")[: GRAMMARS.vocab_size].nonzero()[0].tolist()
    return found


def starting_with(*starts: bytes) -> frozenset[int]:
    return frozenset(n for n in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(n).startswith(starts))


CLOSERS = (frozenset([MARKER, EOS]), starting_with(b"</"), starting_with(b'"', b"]", b"}"))


def walk(grammar: Grammar, seed: int, turn: Sequence[int] = TURN, longest: int = 40_000) -> list[int]:
    """Return a turn of random allowed ids, drawn one at a time and biased towards ids that close something."""
    draw, matcher, ids = random.Random(seed), grammar.matcher(), list(turn)
    while ids[-1] != EOS:
        matcher.follow(ids)
        mask_V = matcher.mask()
        assert mask_V is not None
        allowed = (mask_V == 0).nonzero().flatten().tolist()
        assert allowed, "a dead end"
        assert allowed == unpacked(matcher)
        forced = matcher.forced()
        assert forced is None or allowed == [forced]
        closing = [group for starts in CLOSERS if (group := [token_id for token_id in allowed if token_id in starts])]
        ids.append(draw.choice(draw.choice(closing) if closing and draw.random() < 0.7 else allowed))
        assert len(ids) < longest, "too long"
    return ids[len(turn) :]


def check(ids: Sequence[int], tools: Sequence[dict[str, Any]]) -> None:
    """Check that the turn parses strictly, as text and as ids, and that each call names a tool and fits its schema."""
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
    parser = StreamParser(False, tokenizer=TOKENIZER, tools=tools)
    ready = [event for event in parser.feed(ids) if isinstance(event, CallReady)]
    strict = parse(TOKENIZER.decode(ids), effort="none", strict=True)["tool_calls"]
    assert len(ready) == len(strict) >= 1
    for event, call in zip(ready, strict, strict=True):
        arguments = json.loads(event.arguments_json)
        assert event.name == call["function"]["name"]
        assert arguments == json.loads(call["function"]["arguments"])
        jsonschema.Draft202012Validator(schemas[event.name]).validate(arguments)


NAMES = st.text("abcdefgh_", min_size=1, max_size=6)
INTEGERS = st.fixed_dictionaries({"type": st.just("integer")}, optional={"minimum": st.integers(-50, 50)})
STRINGS = st.one_of(
    st.just({"type": "string"}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, *[st.integers(0, 5)] * 2
    ),
    st.sampled_from(["^[A-Z][a-z]*$", r"\d", "^(a|b)+", "[^x]$"]).map(lambda p: {"type": "string", "pattern": p}),
)
ENUMS = st.lists(st.one_of(st.text(max_size=5), st.integers(-9, 99), st.none(), st.booleans()), min_size=1).map(
    lambda values: {"enum": values}
)
SCALARS = st.one_of(
    INTEGERS, STRINGS, ENUMS, st.sampled_from([{"type": "number"}, {"type": "boolean"}, {"type": ["string", "null"]}])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda fields: objects(fields, len(fields) // 2), st.dictionaries(NAMES, inner, max_size=3)),
    ),
    max_leaves=4,
)


def objects(fields: dict[str, Any], required: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields)[:required],
        "additionalProperties": False,
    }


SLOWLY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOWLY
@given(
    st.lists(st.dictionaries(NAMES, VALUES, max_size=4), min_size=1, max_size=3),
    st.integers(0, 4),
    st.integers(0, 2**32),
)
@example([{"_": {"enum": ["0", "\x80"]}}], 0, 2)  # the first byte of a character is sampled and its second one forced
def test_random_allowed_ids_form_valid_calls(fields: list[dict[str, Any]], required: int, seed: int) -> None:
    tools = [tool(objects(each, required), f"tool_{number}") for number, each in enumerate(fields)]
    check(walk(GRAMMARS.calls(tools, required=True), seed), tools)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=8)
"""llguidance accepts U+007F in JSON only if it is escaped, which RFC 8259 does not require."""


@SLOWLY
@given(
    st.dictionaries(NAMES, st.recursive(
        st.one_of(TEXTS, st.integers(), st.booleans(), st.none(), st.floats(-1e6, 1e6)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=4,
    ), max_size=4),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_every_encoded_call_is_allowed(arguments: dict[str, Any], order: random.Random) -> None:
    """Any order of the parameters is allowed, and any value that the schema leaves open."""
    grammar = GRAMMARS.calls([tool({"type": "object", "properties": {key: {} for key in sorted(arguments)}})])
    keys = list(arguments)
    order.shuffle(keys)
    assert accepts(grammar, call_ids({key: arguments[key] for key in keys}))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, ["", "a</b", "<｜DSML｜", "\n\n", '"', "é😀"], [1, None, ["a"]]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "é\n😀"], ["", "a", "abcd"]),
        ({"type": "string", "pattern": "^a\\d+$"}, ["a1", "a23"], ["a", "ba1", "a1b"]),
        ({"type": "string", "pattern": "b/c"}, ["b/c", "xb/cx"], ["bc"]),
        ({"type": "string", "pattern": "a", "maxLength": 2}, ["a", "ba"], ["b", "bba"]),
        ({"enum": ["x", 'q"\n', 2, None, {"k": [1]}]}, ["x", 'q"\n', 2, None, {"k": [1]}], ["y", 3, "2", True]),
        ({"type": "string", "enum": ["x", 2]}, ["x"], [2]),
        ({"const": "only"}, ["only"], ["onl", ""]),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 6}, [3, 5], [2, 6, 3.5, "3"]),
        ({"type": "integer", "multipleOf": 7}, [14, -7], [15]),
        ({"type": "number"}, [1, -2.5, 1e30], ["1", None]),
        ({"type": "boolean"}, [True, False], ["true", None, 1]),
        ({"type": ["string", "null"]}, ["null", None], [1]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1], [1, 2]],
         [[], [1, 2, 3], ["1"]]),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, [[1]], [["a"], [1, 2]]),
        (objects({"a": {"type": "integer"}, "b": {}}, 1), [{"a": 1}, {"a": 1, "b": "x"}],
         [{}, {"b": 1}, {"a": 1, "c": 1}]),
        ({"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 1}, [{}, {"x": 1}],
         [{"x": "1"}, {"x": 1, "y": 2}]),
        ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
         [{"x1": 1}], [{"y": 1}, {"x": "a"}]),
        ({"anyOf": [{"type": "string", "maxLength": 1}, {"type": "integer"}]}, ["a", 12], ["ab", None]),
        ({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "boolean"}}]}, ["a", [True]], [1, [1]]),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}], "type": "integer"}, [3], [2]),
        ({"type": "string", "allOf": [{"minLength": 2}]}, ["ab"], ["a"]),
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["x", "2023-02-29", "2024-02-30"]),
        ({"type": "string", "format": "madeUp"}, ["x", ""], [1]),
        ({"type": "string", "pattern": r"^\w+\d$"}, ["é1", "a٣"], ["é", "-1"]),
        ({"type": "array", "items": {"type": "string", "pattern": r"^[^\d]$"}}, [["é"]], [["٣"], ["ab"]]),
        ({"type": "array", "items": {"type": "string", "format": "date"}}, [["2020-02-29"]], [["2021-02-29"], ["x"]]),
        ({"type": "array", "items": {"type": "string", "pattern": "^a$", "minLength": 1}}, [["a"]], [["b"]]),
        ({"type": "integer", "description": "d", "title": "t", "default": 1, "examples": ["x"]}, [1], ["x"]),
        (True, ["a", 1, None, {"a": []}], []),
    ],
    ids=str,
)  # fmt: skip
def test_keywords_that_are_enforced(schema: Any, good: list[Any], bad: list[Any]) -> None:
    grammar = GRAMMARS.calls([with_value(schema)])
    for value in good:
        assert accepts(grammar, call_ids({"v": value})), value
    for value in bad:
        assert not accepts(grammar, call_ids({"v": value})), value


def test_references_are_followed() -> None:
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["kids"], "additionalProperties": False}  # fmt: skip
    parameters = {"type": "object", "properties": {"t": {"$ref": "#/$defs/tree"}, "c": {"$ref": "#/$defs/colour"}},
                  "$defs": {"tree": tree, "colour": {"enum": ["red", "blue"]}}}  # fmt: skip
    grammar = GRAMMARS.calls([tool(parameters)])
    assert accepts(grammar, call_ids({"c": "blue", "t": {"kids": [{"kids": []}]}}))
    assert not accepts(grammar, call_ids({"c": "green"}))
    assert not accepts(grammar, call_ids({"t": {"kids": [1]}}))


def test_names_must_exist_and_parameters_come_once() -> None:
    parameters = {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["b", "c"]}
    grammar = GRAMMARS.calls([tool(parameters), tool({"type": "object", "properties": {}}, "g")])
    assert accepts(grammar, call_ids({"c": 1, "b": 2}))
    assert accepts(grammar, call_ids({"b": 1, "a": 3, "c": 2}))
    assert accepts(grammar, call_ids({}, "g"))
    assert not accepts(grammar, call_ids({"c": 1}))
    assert not accepts(grammar, call_ids({"c": 1, "b": 2, "d": 3}))
    assert not accepts(grammar, call_ids({}))
    assert not accepts(grammar, call_ids({"a": 1}, "g"))
    assert not accepts(grammar, call_ids({}, "h"))
    twice = TOKENIZER.decode(call_ids({"c": 1, "b": 2})).replace('name="b"', 'name="c"')
    assert not accepts(grammar, TOKENIZER.encode(twice))


@pytest.mark.parametrize(
    ("schema", "named", "allowed"),
    [
        ({"type": "integer", "not": {"const": 3}}, "not", [3, 4]),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems", [[1, 1], [1, 2]]),
        ({"type": "string", "pattern": r"(?=a)\w"}, "pattern", ["a", "b"]),
        ({"type": "array", "items": {"type": "string", "pattern": r"\D"}}, "pattern", [["a"], ["1"]]),
        ({"if": {"type": "integer"}, "then": {"minimum": 3}}, "if, then", [1, "a", 5]),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", [1, 1.5]),
        ({"oneOf": [{"type": "string", "minLength": 1}, {"type": "string"}]}, "oneOf", ["", "a"]),
        ({"type": "object", "minProperties": 2}, "minProperties", [{}, {"a": 1, "b": 2}]),
        ({"type": "object", "patternProperties": {r"\D": {"type": "integer"}}, "additionalProperties": False},
         "patternProperties", [{"a": "x"}, {"1": 1}]),
        ({"type": "integer", "madeUp": 3}, "madeUp", [1]),
        ({"type": "integer", "minimum": -(10**30)}, "minimum", [10**25, -(10**25)]),
        ({"enum": [10**30, "a"]}, "enum", [10**30, "a"]),
    ],
    ids=str,
)  # fmt: skip
def test_an_unenforced_keyword_is_named_and_forbids_nothing(schema: Any, named: str, allowed: list[Any]) -> None:
    with pytest.warns(GrammarWarning, match=f"does not enforce {named} of f.v: such values are checked after parsing"):
        grammar = GRAMMARS.calls([with_value(schema)])
    for value in allowed:
        assert accepts(grammar, call_ids({"v": value})), value


def test_unenforced_keywords_of_the_whole_object_are_named() -> None:
    parameters = {"type": "object", "properties": {"a": {}}, "additionalProperties": True, "minProperties": 1}
    with pytest.warns(GrammarWarning, match="does not enforce minProperties of f:"):
        grammar = GRAMMARS.calls([tool(parameters)])
    assert grammar.unenforced == ("minProperties of f",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GRAMMARS.calls([tool(parameters)], tell_keywords=False) is grammar


@pytest.mark.parametrize(
    "pattern", ["^a|b$", r"\bx", r"(?!a)", r"\<a", "a++", "a+?", "[a&&b]", r"\p{L}", "a$b", "{,3}"]
)
def test_an_ambiguous_pattern_is_not_enforced(pattern: str) -> None:
    assert whole_text(pattern) is None


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}, "no value fits the schema of a"),
        ({"type": "object", "properties": {'a"': {}}, "required": ['a"']}, "no value fits the schema of a"),
        (objects({"v": {"type": "string", "minLength": 3, "pattern": "^a$"}}, 2), "no value fits the schema of v"),
        (objects({"v": {"type": "integer", "minimum": 3, "maximum": 2}}, 2), "no value fits the schema of v"),
        ({"type": "string"}, "no value fits the schema of an object"),
        ({"properties": 3}, "iterable"),
        ({"type": "object", "properties": {"v": {"type": "string", "minLength": "x"}}}, "invalid literal"),
    ],
    ids=str,
)
def test_a_tool_that_cannot_be_enforced_keeps_the_call_format(parameters: Any, problem: str) -> None:
    """Other tools stay enforced, and every tool stays callable."""
    other = tool(objects({"n": {"type": "integer"}}, 1), "g")
    with pytest.warns(GrammarWarning, match=f"calls of tool 'f' are not held to its schema.*{problem}"):
        grammar = GRAMMARS.calls([tool(parameters), other])
    assert len(grammar.unenforced_tools) == 1
    assert accepts(grammar, call_ids({}))
    assert accepts(grammar, call_ids({"anything": [1], "v": "text"}))
    assert accepts(grammar, call_ids({"n": 1}, "g")) and not accepts(grammar, call_ids({"n": "x"}, "g"))


def test_names_that_the_call_format_cannot_express_are_omitted() -> None:
    parameters = {"type": "object", "properties": {'a"': {}, "b": {}}}
    assert accepts(GRAMMARS.calls([tool(parameters)]), call_ids({"b": 1}))
    with pytest.warns(GrammarWarning, match="the call format cannot express the name of tool 'f<'"):
        grammar = GRAMMARS.calls([tool({}, "f<"), tool({}, "g")])
    assert accepts(grammar, call_ids({}, "g"))
    with pytest.raises(GrammarError, match="no tools are given"):
        GRAMMARS.calls([], required=True)
    assert accepts(GRAMMARS.calls([tool({"type": "object", "properties": {"a": {"enum": []}}})]), call_ids({}))


@pytest.mark.parametrize("count", [64, 65, 150])
def test_any_number_of_parameters(count: int) -> None:
    """Each comes at most once, up to the number of bits; required ones are tracked first."""
    parameters = {"type": "object", "properties": {f"p{n}": {} for n in range(count)}, "required": [f"p{count - 1}"]}
    grammar = GRAMMARS.calls([tool(parameters)], tell_keywords=False)
    last = {f"p{count - 1}": 1}
    assert accepts(grammar, call_ids({f"p{n}": n for n in reversed(range(count))}))
    assert accepts(grammar, call_ids(last)) and not accepts(grammar, call_ids({"p0": 1}))
    twice = TOKENIZER.decode(call_ids({"p0": 1, **last})).replace('name="p0"', f'name="p{count - 1}"')
    assert not accepts(grammar, TOKENIZER.encode(twice))
    many = {"type": "object", "properties": {f"p{n}": {} for n in range(70)}, "required": [f"p{n}" for n in range(70)]}
    with pytest.warns(GrammarWarning, match="required"):
        assert accepts(GRAMMARS.calls([tool(many)]), call_ids({f"p{n}": n for n in range(70)}))


POINT = objects({"x": {"type": "integer"}, "y": {"type": "integer"}}, 1)


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({"oneOf": [objects({"a": {"type": "integer"}}, 1), objects({"b": {"type": "string"}}, 1)]},
         [{"a": 1}, {"b": "x"}], [{}, {"a": "x"}, {"a": 1, "b": "x"}]),
        ({"type": "object", "properties": {"k": {"type": "integer"}}, "anyOf": [{"required": ["k"]}, {
            "properties": {"l": {"type": "boolean"}}, "required": ["l"]}]},
         [{"k": 1}, {"l": True}, {"k": 1, "l": False}, {"l": True, "k": 2}], [{}, {"k": "x"}, {"z": 1}]),
        ({"$ref": "#/$defs/P", "$defs": {"P": POINT}}, [{"x": 1}, {"y": 2, "x": 1}], [{}, {"y": 2}, {"x": "1"}]),
        ({"allOf": [{"$ref": "#/$defs/P"}, {"required": ["y"]}], "$defs": {"P": POINT}}, [{"x": 1, "y": 2}],
         [{"x": 1}]),
        ({"properties": {"p": {"$ref": "#/properties/q"}, "q": POINT}}, [{"p": {"x": 1}}, {"q": {"x": 2}}], [{"p": 3}]),
        ({"additionalProperties": {"type": "integer"}}, [{}, {"x": 1}, {"x": 1, "any name": 2}], [{"x": "1"}]),
        ({"additionalProperties": True, "properties": {"n": {"type": "integer"}}},
         [{"n": 1, "m": [1], "l": "x"}, {"nn": "x"}], [{"n": "x"}]),
        ({"patternProperties": {"^x": {"type": "integer"}}}, [{"x1": 1, "x2": 2}, {}], [{"x1": "a"}, {"y": 1}]),
        ({"patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
         [{"x1": 1, "y": "a"}], [{"x1": "a"}, {"y": 1}]),
        ({"properties": {"x1": {"minimum": 3}}, "patternProperties": {"^x": {"type": "integer"}}},
         [{"x1": 4, "x2": 1}], [{"x1": 1}, {"x1": "a"}, {"x2": "a"}]),
        ({"patternProperties": {"^x": {"type": ["integer", "null"]}, "y$": {"type": ["integer", "string"]}}},
         [{"xy": 1, "x": None, "y": "a"}], [{"xy": None}, {"xy": "a"}, {"x": "a"}]),
        ({"properties": {"x": {"type": "string"}}, "patternProperties": {"^x": {"type": "integer"}}}, [{"xx": 1}, {}],
         [{"x": "a"}, {"x": 1}]),
        ({"anyOf": [{"$ref": "#"}, objects({"a": {}}, 1)]}, [{"a": 1}], [{}]),
    ],
    ids=str,
)  # fmt: skip
def test_schemas_of_the_whole_object(parameters: Any, good: list[Any], bad: list[Any]) -> None:
    grammar = GRAMMARS.calls([tool({"type": "object", **parameters})], tell_keywords=False)
    for value in good:
        assert accepts(grammar, call_ids(value)), value
    for value in bad:
        assert not accepts(grammar, call_ids(value)), value


@pytest.mark.parametrize("values", [[f"item-{n * 7919 % 99991}" for n in range(5000)], list(range(5000))])
def test_a_long_enum_is_compiled_quickly(values: list[Any]) -> None:
    start = time.monotonic()
    grammar = GRAMMARS.calls([with_value({"enum": values})])
    assert accepts(grammar, call_ids({"v": values[4321]}))
    assert not accepts(grammar, call_ids({"v": "item"})) and not accepts(grammar, call_ids({"v": -1}))
    assert time.monotonic() - start < 10


def stuck() -> Grammar:
    """Return a grammar whose form reaches, after `ab`, a state that no id can follow."""
    return Grammar(GRAMMARS, GRAMMARS._matcher('start: "ab" T\nT: /c.*/ & /.*d/ & /.{1}/'), at_once=True)


def test_a_dead_end_frees_the_rest_of_the_turn() -> None:
    matcher, ids = stuck().matcher(), [*TURN, *TOKENIZER.encode_text("ab")]
    matcher.follow(ids)
    with pytest.warns(GrammarWarning, match="the rest of this turn is not held to its grammar"):
        assert matcher.mask() is None
    assert matcher.forced() is None
    matcher.follow([*ids, *TOKENIZER.encode_text("xyz"), EOS])
    assert matcher.mask() is None
    again = stuck().matcher()  # as in a session that continues from ids past the dead end
    with pytest.warns(GrammarWarning, match="the rest of this turn is not held to its grammar"):
        again.follow([*ids, *TOKENIZER.encode_text("xyz")])
    assert again.mask() is None


def test_thoughts_and_text_are_free() -> None:
    grammar = GRAMMARS.calls([tool({"type": "object", "properties": {}})])
    matcher, ids = grammar.matcher(), list(THINKING_TURN)
    but_a_marker = torch.arange(TOKENIZER.vocab_size) != MARKER

    def allowed(*more: int) -> list[bool] | None:
        ids.extend(more)
        matcher.follow(ids)
        mask_V = matcher.mask()
        assert matcher.forced() is None
        return None if mask_V is None else (mask_V == 0).tolist()

    assert allowed() == but_a_marker.tolist()
    assert allowed(*TOKENIZER.encode_text("x\n\n<")) == but_a_marker.tolist()
    assert allowed(TOKENIZER.control_id(THINK_END)) == but_a_marker.tolist()
    assert allowed(*TOKENIZER.encode_text("Text, and <｜DSML｜tool_calls>")) == but_a_marker.tolist()
    assert allowed(*TOKENIZER.encode_text("\n\n<")) is None
    assert allowed(*TOKENIZER.encode_text("b>")) == but_a_marker.tolist()
    assert allowed(*TOKENIZER.encode_text("\n\n<")) is None
    ids.append(MARKER)
    matcher.follow(ids)
    assert matcher.forced() is not None
    no_tools = GRAMMARS.calls([]).matcher()
    no_tools.follow([*TURN, *TOKENIZER.encode_text("\n\n<")])
    mask_V = no_tools.mask()
    assert mask_V is not None and (mask_V == 0).tolist() == but_a_marker.tolist()


def test_a_required_call_or_an_answer_starts_after_the_thought() -> None:
    for grammar in (GRAMMARS.calls([with_value({"type": "integer"})], required=True), GRAMMARS.answer()):
        matcher = grammar.matcher()
        matcher.follow(THINKING_TURN)
        mask_V = matcher.mask()
        assert mask_V is not None
        assert (mask_V != 0).nonzero().flatten().tolist() == sorted([EOS, MARKER, TOKENIZER.control_id(ASSISTANT)])
        matcher.follow([*THINKING_TURN, TOKENIZER.control_id(THINK_END)])
        mask_V = matcher.mask()
        assert mask_V is not None and int((mask_V == 0).sum()) < 10


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_is_json(seed: int) -> None:
    schema = objects(
        {"name": {"type": "string", "maxLength": 5}, "sizes": {"type": "array", "items": {"type": "number"}}}, 2
    )
    for wanted in (schema, {"type": "object"}, {"type": "string", "enum": ["a", "b"]}, {"type": "integer"}):
        text = TOKENIZER.decode(walk(GRAMMARS.answer(wanted), seed))
        answer = parse(text, effort="none", strict=True)["content"]
        jsonschema.Draft202012Validator(wanted).validate(json.loads(answer))
    with pytest.raises(GrammarError, match="no answer fits the schema"):
        GRAMMARS.answer({"enum": []})
    with pytest.warns(GrammarWarning, match="uniqueItems of the answer"):
        GRAMMARS.answer({"type": "array", "uniqueItems": True})


def test_with_tools_a_turn_is_calls_or_an_answer() -> None:
    schema = objects({"a": {"type": "integer"}}, 1)
    tools = [with_value({"type": "string", "maxLength": 4})]
    grammar = GRAMMARS.answer(schema, tools=tools)
    assert accepts(grammar, call_ids({"v": "abc"})) and accepts(grammar, [*TOKENIZER.encode_text('{"a": 7}'), EOS])
    for text in ("Yes.", '{"a": "7"}', "{}"):
        assert not accepts(grammar, [*TOKENIZER.encode_text(text), EOS])
    assert not accepts(grammar, call_ids({"v": 7}))
    assert not accepts(grammar, [*TOKENIZER.encode_text("Text."), *call_ids({"v": "abc"})])
    assert not accepts(grammar, [*TOKENIZER.encode_text('{"a": 7}'), *call_ids({"v": "abc"})])
    assert not accepts(grammar, [EOS])
    answered = 0
    for seed in range(12):
        ids = walk(grammar, seed)
        if MARKER in ids:
            check(ids, tools)
        else:
            jsonschema.validate(json.loads(TOKENIZER.decode(ids[:-1])), schema)
            answered += 1
    assert 0 < answered < 12
    with pytest.raises(GrammarError, match="no answer fits the schema"):
        GRAMMARS.answer({"enum": []}, tools=tools)
    with pytest.warns(GrammarWarning, match="uniqueItems of the answer; minProperties of g"):
        GRAMMARS.answer({"type": "array", "uniqueItems": True}, tools=[tool({"minProperties": 1}, "g")])


def test_ids_that_do_not_fit_are_refused() -> None:
    grammar = GRAMMARS.calls([tool({"type": "object", "properties": {}})], required=True)
    with pytest.raises(GrammarError, match="none has begun in this session"):
        grammar.matcher().follow([TOKENIZER.bos_id, 40])
    with pytest.raises(GrammarError, match="the grammar forbids id"):
        grammar.matcher().follow([*TURN, *TOKENIZER.encode_text("Hello")])


def test_without_llguidance_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarMissingError, match="pip install llguidance"):
        Grammars(TOKENIZER, TOKENIZER.vocab_size)


# With a model

TOOLS = [
    tool(
        objects({"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1}}, 1), "weather"
    ),
    tool(
        objects({"unit": {"enum": ["C", "F"]}, "at": {"type": "array", "items": {"type": "number"}, "maxItems": 2}}, 2),
        "set",
    ),
]
CLOSING = {MARKER: 20.0} | {
    token_id: 4.0
    for token_id in range(TOKENIZER.vocab_size)
    if TOKENIZER.token_bytes(token_id)[:1] in (b"<", b'"', b"]", b"}")
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = ModelSpec.from_config(small_config(0, 4, vocab_size=TOKENIZER.vocab_size, index_topk=8))
    decoder = randomize_(Decoder(spec), torch.Generator().manual_seed(1))
    engine = Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"))
    engine.__dict__["tokenizer"] = TOKENIZER
    yield engine
    torch.set_num_threads(threads)


def required(engine: Engine) -> Grammar:
    return engine.grammars.calls(TOOLS, required=True)


def params(engine: Engine, seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, logit_bias=CLOSING, max_tokens=400, stop_token_ids=frozenset([EOS]))


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(3))
async def test_a_random_model_makes_valid_calls(engine: Engine, seed: int) -> None:
    """Calls are the same with drafts, on the model thread and one token at a time; forced ids cost no forward."""
    runs = []
    for speculate in (False, True):
        engine.scheduler.cache.clear()
        engine.scheduler.speculate = speculate
        before = engine.scheduler.steps
        with engine.session() as session:
            session.append(TURN)
            runs.append(list(session.generate(params(engine, seed), grammar=required(engine))))
            fed = session.usage.hit_tokens + session.usage.miss_tokens
    ids = [token.id for token in runs[0]]
    sampled = [token for token in runs[0] if not token.forced]
    assert runs[1] == runs[0]
    check(ids, TOOLS)
    assert engine.scheduler.steps - before <= len(sampled) < len(ids)
    logprobs = engine.logits([*TURN, *ids]).log_softmax(-1)
    for place, token in enumerate(runs[0], start=len(TURN)):
        raw = logprobs[place - 1, token.id].item()
        assert math.isnan(token.logprob) if token.forced else token.logprob == raw
    assert len(TURN) < fed <= len(TURN) + len(ids) - len(sampled)
    async with AsyncEngine(engine) as running:
        async with running.session() as session:
            await session.append(TURN)
            assert [token async for token in session.generate(params(engine, seed), grammar=required(engine))] == runs[
                0
            ]
            assert session.usage.hit_tokens + session.usage.miss_tokens == fed
        async with running.session() as session:
            await session.append(TURN)
            one = replace(params(engine, seed), max_tokens=1)
            while session.token_ids[-1] != EOS:
                async for _ in session.generate(one, grammar=required(engine)):
                    pass
            assert list(session.token_ids) == [*TURN, *ids]


@pytest.mark.parametrize("count", [1000, 6000])
def test_a_form_beyond_llguidances_limits_frees_the_turn(count: int) -> None:
    """Thousands of parameters are constrained to their schemas, or left free with a warning; nothing raises."""
    properties = {f"p{n}": {"type": "integer"} for n in range(count)}
    grammar = GRAMMARS.calls([tool({"type": "object", "properties": properties})], tell_keywords=False)
    ids = [*TURN, *call_ids({"p7": 1})]
    matcher = grammar.matcher()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in range(len(TURN), len(ids) + 1):
            matcher.follow(ids[:length])
            mask_V = matcher.mask()
            assert mask_V is None or length == len(ids) or mask_V[ids[length]] == 0
    assert all("llguidance failed" in str(warning.message) for warning in caught)


def bomb(key: str, levels: int) -> dict[str, Any]:
    """Return references that double at each level: 2^levels schemas when expanded."""
    definitions: dict[str, Any] = {f"d{n}": {key: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    definitions[f"d{levels}"] = {"type": "integer"}
    return {"type": "object", "properties": {"v": {"$ref": "#/$defs/d0"}}, "$defs": definitions}


@pytest.mark.parametrize("key", ["anyOf", "oneOf", "allOf"])
def test_exponential_references_are_not_expanded(key: str) -> None:
    start = time.monotonic()
    grammar = GRAMMARS.calls([tool(bomb(key, 40))], tell_keywords=False)
    assert accepts(grammar, call_ids({"v": 3})) and not accepts(grammar, call_ids({"v": None}))
    assert time.monotonic() - start < 10


@pytest.mark.anyio
async def test_a_dead_end_does_not_end_the_run(engine: Engine) -> None:
    """Holds in a session and on the model thread, with and without drafts."""
    free = SamplingParams(seed=1, max_tokens=30, stop_token_ids=frozenset([EOS]))
    with engine.session() as session, pytest.warns(GrammarWarning, match="not held to its grammar"):
        session.append(TURN)
        alone = [token.id for token in session.generate(free, grammar=stuck())]
    assert TOKENIZER.decode(alone).startswith("ab") and len(alone) > 5
    with pytest.warns(GrammarWarning, match="not held to its grammar"):
        async with AsyncEngine(engine) as running, running.session() as session:
            await session.append(TURN)
            assert [token.id async for token in session.generate(free, grammar=stuck())] == alone


@pytest.mark.anyio
async def test_ids_that_the_grammar_forces_cost_no_forward(engine: Engine) -> None:
    """From the first one on; and the end of the turn, which is forced too, ends the generation."""
    grammar = Grammar(GRAMMARS, GRAMMARS._matcher('start: "abcdefgh"'), at_once=True)
    free = SamplingParams(stop_token_ids=frozenset([EOS]))
    before = engine.scheduler.steps
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(TURN)
        tokens = [token async for token in session.generate(free, grammar=grammar)]
    assert TOKENIZER.decode([token.id for token in tokens[:-1]]) == "abcdefgh" and tokens[-1].id == EOS
    assert all(token.forced for token in tokens)
    assert engine.scheduler.steps == before


@pytest.mark.anyio
async def test_a_consumer_who_is_many_tokens_behind_causes_no_forward(engine: Engine) -> None:
    grammar = Grammar(GRAMMARS, GRAMMARS._matcher('start: "abcdef" T\nT: /[xyz]{30}/'), at_once=True)
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(TURN)
        tokens = session.generate(SamplingParams(seed=1), grammar=grammar)
        await anext(tokens)
        before = await running.call(lambda: engine.scheduler.steps)
        for _ in range(20):  # the model thread looks for work between any two calls
            after = await running.call(lambda: engine.scheduler.steps)
        await tokens.aclose()
    assert after == before


@pytest.mark.anyio
async def test_a_mask_is_computed_while_the_forward_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    masked, step, mask = threading.Event(), engine.scheduler.runner.step, Matcher.mask
    in_time = []

    def noted_mask(matcher: Matcher) -> torch.Tensor | None:
        mask_V = mask(matcher)
        masked.set()
        return mask_V

    def waiting_step(scheduled: Sequence[ScheduledTokens], *, all_rows: bool = False) -> Computed:
        in_time.append(masked.wait(10))
        return step(scheduled, all_rows=all_rows)

    monkeypatch.setattr(Matcher, "mask", noted_mask)
    monkeypatch.setattr(engine.scheduler.runner, "step", waiting_step)
    engine.scheduler.cache.clear()
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(TURN)
        async for _ in session.generate(replace(params(engine, 0), max_tokens=1), grammar=required(engine)):
            pass
    assert in_time[0]


def test_a_thought_precedes_the_form(engine: Engine) -> None:
    end = TOKENIZER.control_id(THINK_END)
    bias = CLOSING | {end: 12.0}
    with engine.session() as session:
        session.append(THINKING_TURN)
        ids = [
            token.id
            for token in session.generate(replace(params(engine, 3), logit_bias=bias), grammar=required(engine))
        ]
    assert end in ids[:-1]
    check(ids[ids.index(end) + 1 :], TOOLS)


def test_ids_between_two_tokens_are_checked(engine: Engine) -> None:
    with engine.session() as session:
        session.append(TURN)
        tokens = session.generate(params(engine, 0), grammar=required(engine))
        next(tokens)
        session.append(TOKENIZER.encode_text("Hello"))
        with pytest.raises(GrammarError, match="the grammar forbids id"):
            next(tokens)


def test_a_bias_against_all_allowed_ids_is_an_error(engine: Engine) -> None:
    with engine.session() as session:
        session.append(TURN)
        forbidding = dict.fromkeys(range(TOKENIZER.vocab_size), -math.inf)
        with pytest.raises(ValueError, match="logit_bias forbids every id that the grammar allows"):
            list(session.generate(replace(params(engine, 0), logit_bias=forbidding), grammar=required(engine)))


def test_a_grammar_does_not_change_valid_output_of_the_packaged_model() -> None:
    engine = Engine.load("tiny")
    find = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [tool(find, "get_weather")]
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    prompt = encode_ids(asked, tokenizer=engine.tokenizer, tools=tools, effort="high", think=True)
    said = []
    greedy = SamplingParams(temperature=0, max_tokens=80, stop_token_ids=frozenset([engine.tokenizer.eos_id]))
    for grammar in (None, engine.grammars.calls(tools)):
        with engine.session() as session:
            session.append(prompt)
            said.append([token.id for token in session.generate(greedy, grammar=grammar)])
    assert said[1] == said[0]
    assert engine.tokenizer.control_id(DSML) in said[0]
