"""Schema × value × grammar × validator: each accepts the other's output, and nothing leads to a dead end."""

from __future__ import annotations

import itertools
import json
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from agentkit_engine.chat import CallMalformed, CallReady, StreamParser
from agentkit_engine.grammar import Grammar, GrammarWarning
from agentkit_engine.schema_forms import FORMATS, whole_text
from agentkit_engine.schema_types import accepted_types, could_accept, json_types
from agentkit_tools import formats
from agentkit_tools.patterns import search
from agentkit_tools.validation import SchemaProblemError, Validator

from .test_grammar import GRAMMARS, TOKENIZER, accepts, call_ids, tool, walk

NAMES = st.sampled_from(["a", "b", "x1"])
SCALARS: st.SearchStrategy[Any] = st.sampled_from(
    [
        {"type": "string"}, {"type": "string", "minLength": 1, "maxLength": 3}, {"pattern": "^[a-c]+$"},
        {"type": "string", "format": "date"}, {"type": "string", "pattern": r"\d$", "maxLength": 4},
        {"type": "integer"}, {"type": "integer", "minimum": 0, "maximum": 20}, {"type": "number", "multipleOf": 0.25},
        {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 9}, {"type": "boolean"}, {"type": "null"},
        {"type": ["string", "null"]}, {"type": ["integer", "string"], "minimum": 3}, {"enum": ["a", "b", 3, None]},
        {"enum": [1, "1", [1], {"a": 1}]}, {"const": "a"}, {"const": 3.0}, {"type": "string", "enum": ["ab", "c", 4]},
        {"$ref": "#/$defs/scalar"}, {"$ref": "#/$defs/tree"}, {"$ref": "#/$defs/maybe"}, {}, True, False,
        {"not": {"type": "string"}}, {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
    ]
)  # fmt: skip
DEFINITIONS = {
    "scalar": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    "tree": {"type": "object", "properties": {"a": {"$ref": "#/$defs/maybe"}}, "additionalProperties": False},
    "maybe": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
}


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"properties": st.dictionaries(NAMES, inner, max_size=3)},
        optional={
            "type": st.just("object"),
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": st.one_of(st.booleans(), inner),
            "patternProperties": st.dictionaries(st.sampled_from(["^x", "1$", "^[ab]"]), inner, max_size=2),
            "maxProperties": st.integers(1, 2),
        },
    )


def unions(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["anyOf", "oneOf", "allOf"])
    return st.builds(lambda key, parts: {key: parts}, keys, st.lists(inner, min_size=1, max_size=3))


ANY = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        objects(inner),
        unions(inner),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 2)),
        st.builds(lambda items: {"type": "array", "prefixItems": items, "items": False}, st.lists(inner, max_size=2)),
    ),
    max_leaves=5,
)
PARAMETERS = st.one_of(
    objects(ANY),
    st.builds(lambda base, more: {**base, **more}, objects(ANY), unions(objects(ANY))),
    st.just({"$ref": "#/$defs/tree"}),
).map(lambda schema: {"type": "object", **schema, "$defs": DEFINITIONS})
JSON = st.recursive(
    st.sampled_from([None, True, 0, 3, 7, -1, 0.25, 19.99, "", "a", "ab", "abc1", "2024-02-29", "1", 3.0]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES | st.just("z"), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def slowly(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )


def grammar_of(parameters: Any) -> tuple[Grammar, tuple[str, ...]]:
    """Return the grammar that requires a call, and the keywords it does not enforce."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GrammarWarning)
        grammar = GRAMMARS.calls([tool(parameters)], required=True)
    return grammar, (*grammar.unenforced, *grammar.unenforced_tools)


def arguments_of(ids: list[int], parameters: Any) -> list[dict[str, Any]]:
    """Return the arguments of the calls, except those that repeat a free parameter, which no grammar detects."""
    parser = StreamParser(False, tokenizer=TOKENIZER, tools=[tool(parameters)])
    events = [*parser.feed(ids), *parser.finish()]
    assert all("is given twice" in event.error for event in events if isinstance(event, CallMalformed))
    return [json.loads(event.arguments_json) for event in events if isinstance(event, CallReady)]


def spellings(value: Any) -> Iterator[Any]:
    """Yield the value with the keys of its objects in every order."""
    if isinstance(value, dict):
        for order in itertools.permutations(value):
            for items in itertools.product(*(list(spellings(value[key])) for key in order)):
                yield dict(zip(order, items, strict=True))
    elif isinstance(value, list):
        for items in itertools.product(*map(list, map(spellings, value))):
            yield list(items)
    else:
        yield value


def named(parameters: Any, key: str) -> bool:
    """Return whether a call may use this parameter: undeclared names must be allowed explicitly."""

    def declares(part: Any) -> bool:
        if not isinstance(part, dict):
            return False
        branches = [each for union in ("anyOf", "oneOf", "allOf") for each in part.get(union, ())]
        target = DEFINITIONS["tree"] if "$ref" in part else None
        return (
            key in part.get("properties", {})
            or key in part.get("required", ())
            or any(map(declares, [*branches, target]))
        )

    opens = parameters.get("additionalProperties", False) is not False
    return declares(parameters) or opens or any(re.search(p, key) for p in parameters.get("patternProperties", ()))


def stroll(grammar: Grammar, seed: int) -> list[int] | None:
    """Like `walk`, but None if the random walk does not end."""
    try:
        return walk(grammar, seed, longest=400)
    except AssertionError as error:
        if "too long" not in str(error):
            raise
        return None


def check_what_is_written(parameters: Any, seed: int) -> None:
    """Assert that a random call has no dead end, and fits the schema if every keyword is enforced."""
    try:
        validator = Validator(parameters)
    except SchemaProblemError:
        assume(False)
    grammar, unenforced = grammar_of(parameters)
    ids = stroll(grammar, seed)
    assume(ids is not None)
    assert ids is not None
    for arguments in arguments_of(ids, parameters):
        assert unenforced or validator.problems(arguments) == [], (arguments, unenforced)


def check_what_is_accepted(parameters: Any, value: Any) -> None:
    """Assert that the grammar can write a value that the validator accepts, in some order of nested keys."""
    try:
        validator = Validator(parameters)
    except SchemaProblemError:
        assume(False)
    assume(all(named(parameters, key) for key in value))
    assume(validator.problems(value) == [])
    grammar, _ = grammar_of(parameters)
    tries = [call_ids(each) for each in itertools.islice(spellings(value), 60)]
    assert any(accepts(grammar, ids) for ids in tries), value


VALUES = st.dictionaries(NAMES | st.just("z"), JSON, max_size=3)


@slowly(30)
@given(PARAMETERS, st.integers(0, 2**32))
def test_values_written_by_the_grammar_are_valid(parameters: Any, seed: int) -> None:
    check_what_is_written(parameters, seed)


@slowly(25)
@given(PARAMETERS, VALUES)
def test_valid_values_can_be_written_by_the_grammar(parameters: Any, value: Any) -> None:
    check_what_is_accepted(parameters, value)


@pytest.mark.hostile
@slowly(1000)
@given(PARAMETERS, st.integers(0, 2**32))
def test_values_written_by_the_grammar_are_valid_at_length(parameters: Any, seed: int) -> None:
    check_what_is_written(parameters, seed)


@pytest.mark.hostile
@slowly(1500)
@given(PARAMETERS, VALUES)
def test_valid_values_can_be_written_by_the_grammar_at_length(parameters: Any, value: Any) -> None:
    check_what_is_accepted(parameters, value)


@slowly(80)
@given(ANY, JSON)
def test_types_and_listed_values_are_upper_bounds(schema: Any, value: Any) -> None:
    root = {"allOf": [schema], "$defs": DEFINITIONS}
    try:
        fits = Validator(root).problems(value) == []
    except SchemaProblemError:
        assume(False)
    assert not fits or (
        could_accept(schema, root, value) and not json_types(value).isdisjoint(accepted_types(schema, root))
    )


PATTERNS = st.recursive(
    st.sampled_from(["a", "b", ".", r"\d", r"\w", r"\s", "[ab]", "[^a]", r"[\d_]", r"[^\w]", r"\.", "/", r"\/", "é"]),
    lambda inner: st.one_of(
        st.builds(str.__add__, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("({}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}"])),
    ),
    max_leaves=4,
)


@slowly(30)
@given(st.sampled_from(["", "^"]), PATTERNS, st.sampled_from(["", "$"]), st.text("ab1_ ٣é./\n-", max_size=5))
def test_grammar_and_validator_read_patterns_alike(start: str, body: str, end: str, text: str) -> None:
    pattern = start + body + end
    assume(whole_text(pattern) is not None)
    found = search(pattern, text, deadline=time.monotonic() + 30)
    for value, schema in ((text, {"pattern": pattern}), ([text], {"items": {"pattern": pattern}})):
        grammar, _ = grammar_of({"type": "object", "properties": {"a": schema}})
        assert accepts(grammar, call_ids({"a": value})) is found


def test_both_rooms_support_the_same_formats() -> None:
    assert formats.FORMATS == FORMATS


def t(kind: Any, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


def o(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


EDIT = {**o("oldText newText", oldText=t("string", description="Text to search for"), newText=t("string")),
        "additionalProperties": False}  # fmt: skip
ENTITY = o(
    "name entityType observations", name=t("string"), entityType=t("string"), observations=t("array", items=t("string"))
)
FILTER = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "definitions": {
        "Condition": o("field op value", field=t("string"), op={"enum": ["eq", "ne", "lt", "gt", "in"]}, value={
            "anyOf": [t("string"), t("number"), t("boolean"), t("array", items=t(["string", "number"]))]}),
        "Group": o("and", **{"and": t("array", items={"$ref": "#/definitions/Filter"}, minItems=1)}),
        "Filter": {"anyOf": [{"$ref": "#/definitions/Condition"}, {"$ref": "#/definitions/Group"}]},
    },
    **o("collection", collection=t("string", minLength=1), filter={"$ref": "#/definitions/Filter"},
        limit=t("integer", minimum=1, maximum=100, default=10)),
}  # fmt: skip
REAL: list[tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]] = [
    (  # a file server's edit
        {**o("path edits", path=t("string"), edits=t("array", items=EDIT), dryRun=t("boolean", default=False)),
         "additionalProperties": False, "$schema": "http://json-schema.org/draft-07/schema#"},
        [{"path": "a.py", "edits": [{"oldText": "x", "newText": "y"}], "dryRun": True}, {"edits": [], "path": "b"}],
        [{"path": "a.py"}, {"path": "a", "edits": [{"oldText": "x"}]}, {"path": "a", "edits": [], "force": True}],
    ),
    (  # a knowledge graph's entities
        o("entities", entities=t("array", items=ENTITY)),
        [{"entities": [{"name": "n", "entityType": "t", "observations": ["a", "b"]}]}, {"entities": []}],
        [{"entities": [{"name": "n"}]}, {"entities": {}}],
    ),
    (  # fetching, from a pydantic model
        o("url", url=t("string", format="uri", minLength=1, title="Url"), raw=t("boolean", default=False), max_length=t(
            "integer", default=5000, exclusiveMinimum=0, exclusiveMaximum=1000000, title="Max Length"),
            start_index=t("integer", default=0, minimum=0)),
        [{"url": "https://example.org", "max_length": 10}, {"raw": True, "url": "http://a/b?c"}],
        [{"url": "example.org"}, {"url": "https://a", "max_length": 0}],
    ),
    (  # an issue tracker, from zod: nullable unions, arrays of enums, a date-time
        o("owner repo", owner=t("string"), repo=t("string"), state={"anyOf": [t("string", enum=["open", "closed"]),
          t("null")]}, labels=t("array", items=t("string")), since=t("string", format="date-time"),
          per_page=t("number", minimum=1, maximum=100), assignee={"type": ["string", "null"]}),
        [{"owner": "o", "repo": "r", "state": None, "labels": ["bug"], "since": "2024-01-01T00:00:00Z", "per_page": 30},
         {"repo": "r", "owner": "o", "assignee": None, "state": "open"}],
        [{"owner": "o", "repo": "r", "state": "all"}, {"owner": "o", "repo": "r", "since": "yesterday"}],
    ),
    (  # a weather function as in function-calling guides
        o("location", location=t("string", description="City"), unit=t("string", enum=["celsius", "fahrenheit"])),
        [{"location": "Boston, MA", "unit": "celsius"}, {"location": "Paris"}],
        [{"unit": "celsius"}, {"location": "Paris", "unit": "kelvin"}],
    ),
    (  # prices and a tagged union of payments
        {**o("amount method", amount=t("number", multipleOf=0.01, minimum=0), currency=t("string", pattern="^[A-Z]+$"),
             method={"oneOf": [
                 {**o("kind number", kind={"const": "card"}, number=t("string", pattern=r"^\d{4}$")),
                  "additionalProperties": False},
                 {**o("kind iban", kind={"const": "bank"}, iban=t("string")), "additionalProperties": False}]})},
        [{"amount": 19.99, "currency": "EUR", "method": {"kind": "card", "number": "1234"}},
         {"method": {"kind": "bank", "iban": "DE00"}, "amount": 0}],
        [{"amount": 19.999, "method": {"kind": "bank", "iban": "x"}}, {"amount": 1, "method": {"kind": "card"}},
         {"amount": 1, "currency": "euro", "method": {"kind": "bank", "iban": "x"}}],
    ),
    (FILTER,
     [{"collection": "c", "filter": {"and": [{"field": "a", "op": "in", "value": [1, "x"]}, {"and": [
         {"field": "b", "op": "eq", "value": True}]}]}, "limit": 5}],
     [{"collection": ""}, {"collection": "c", "filter": {"and": []}}, {"collection": "c", "limit": 101}]),
    (  # one of several ways to name a thing
        {**t("object", properties={"id": t("integer"), "name": t("string")}), "anyOf": [
            {"required": ["id"]}, {"required": ["name"]}]},
        [{"id": 1}, {"name": "n"}, {"name": "n", "id": 1}],
        [{}, {"id": "x"}],
    ),
    (  # headers and environment: arbitrary names
        o("url", url=t("string"), headers=t("object", additionalProperties=t("string")),
          body={"type": ["object", "array", "string", "null"]}, matrix=t("array", items=t("array", items=t("number")))),
        [{"url": "u", "headers": {"X-A": "1", "b": ""}, "body": {"a": [1]}, "matrix": [[1, 2.5], []]},
         {"url": "u", "body": "text"}, {"url": "u", "body": None}],
        [{"url": "u", "headers": {"a": 1}}, {"url": "u", "body": 3}],
    ),
    (t("object"), [{}], [{"a": 1}]),
    (  # a scorer from a leaderboard: tuples; its `dict` for object is already rewritten
        o("point", point=t("array", prefixItems=[t("number"), t("number")], items=False, minItems=2),
          mode=t("string", enum=["fast", "exact"], default="fast"), seeds=t("array", items=t("integer"), maxItems=3)),
        [{"point": [1, -2.5], "seeds": [1, 2]}, {"mode": "exact", "point": [0, 0]}],
        [{"point": [1]}, {"point": [1, 2, 3]}, {"point": [1, 2], "seeds": [1, 2, 3, 4]}],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "good", "bad"), REAL, ids=range(len(REAL)))
def test_schemas_from_real_tools(parameters: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    validator, (grammar, unenforced) = Validator(parameters), grammar_of(parameters)
    assert unenforced == ()
    for value in good:
        assert validator.problems(value) == []
        assert accepts(grammar, call_ids(value)), value
    for value in bad:
        assert not accepts(grammar, call_ids(value)), value
    for seed in range(4):
        for arguments in arguments_of(stroll(grammar, seed) or [], parameters):
            assert validator.problems(arguments) == []
