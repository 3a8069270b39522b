"""JSON Schema for grammars: the part of a schema that can be enforced during generation.

A keyword is enforced if it is listed here and llguidance accepts it. Every other keyword is dropped, which only allows
more values, and its name is added to `missed`.

A parameter's value has two forms: a string is written raw, everything else as JSON. So a schema is first expanded into
alternatives, each a conjunction of plain schemas without references and unions at their top, and each alternative is
then split in two.

One rule allows fewer values: the properties of a nested object must come in the order of its schema, the only order
that llguidance supports.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jsonschema
from pydantic_core import SchemaError, SchemaValidator, core_schema

from agentkit_engine.schema_types import Schema, accepted_types, equal, json_types, resolve

ANNOTATIONS = frozenset(
    "$anchor $comment $defs $dynamicAnchor $id $schema $vocabulary contentEncoding contentMediaType contentSchema "
    "default definitions deprecated description discriminator examples readOnly title writeOnly".split()
)
"""Keywords that constrain nothing."""
ENFORCED = frozenset(
    "additionalProperties const enum exclusiveMaximum exclusiveMinimum items maxItems maxLength maxProperties "
    "maximum minItems minLength minimum multipleOf patternProperties prefixItems properties required type".split()
)
"""Keywords enforced in JSON, besides references, unions and patterns. `minProperties` is not among them, because a
grammar cannot detect that a free key is repeated."""
NOT_OF_STRINGS = frozenset(
    "additionalProperties contains dependentRequired dependentSchemas exclusiveMaximum exclusiveMinimum items "
    "maxContains maxItems maxProperties maximum minContains minItems minProperties minimum multipleOf "
    "patternProperties prefixItems properties propertyNames required unevaluatedItems unevaluatedProperties "
    "uniqueItems".split()
)
"""Keywords that do not apply to strings."""
ANY_TEXT = "/(?s:.*)/"
"""Terminal of an unconstrained string."""
MAX_ALTERNATIVES = 64
"""Maximum number of alternatives of one schema; unions beyond it are dropped."""
LARGEST_BOUND = 2.0**53
"""Largest integer bound to enforce: llguidance computes them as float64, cut to 64 bits."""
LOOSENED: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset(("maxProperties", "minProperties")),
    frozenset(("patternProperties",)),
    frozenset(("multipleOf",)),
    frozenset(("pattern", "format")),
    frozenset(("patternProperties", "maxProperties", "multipleOf", "pattern", "format", "maxLength", "minLength")),
    frozenset(
        "patternProperties maxProperties multipleOf pattern format maxLength minLength allOf oneOf enum const".split()
    ),
)
"""Sets of keywords to drop, tried in this order until llguidance accepts a schema."""

JSON_FORM = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": True,
}
"""JSON as `json.dumps` and the chat encoding write it; without unlimited white space."""

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP}-02-29)"
_HOURS = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOURS}(?::[0-5][0-9](?:\.[0-9]{{1,9}})?)?(?:[zZ]|[+-]{_HOURS})?"
_CLOCK = "T(?:[0-9]+H(?:[0-9]+M)?(?:{s})?|[0-9]+M(?:{s})?|{s})".format(s=r"[0-9]+(?:\.[0-9]+)?S")
_DAYS = "(?:[0-9]+Y(?:[0-9]+M)?(?:[0-9]+D)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_IPV4 = r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?:\.(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])){3})"
_H16 = "[0-9A-Fa-f]{1,4}"


def _ipv6() -> str:
    forms = [f"(?:{_H16}:){{7}}{_H16}", f"(?:{_H16}:){{6}}{_IPV4}"]
    for left in range(8):  # number of groups before `::`, which stands for at least one
        right = 7 - left
        begin = f"{_H16}(?::{_H16}){{{left - 1}}}" if left else ""
        ends = ([f"{_H16}(?::{_H16}){{0,{right - 1}}}"] if right else []) + (
            [f"(?:{_H16}:){{0,{right - 2}}}{_IPV4}"] if right >= 2 else []
        )
        forms.append(f"{begin}::(?:{'|'.join(ends)})?" if ends else f"{begin}::")
    return "|".join(forms)


FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[tT ]{_TIME}",
    "duration": f"[+-]?P(?:[0-9]+W|{_DAYS}(?:{_CLOCK})?|{_CLOCK})",
    "email": r"[^@\s]+@[^@\s]+",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[^\s]*",
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
}
"""Enforced values of `format`; others constrain nothing. A copy of `agentkit_tools.formats`, because packages do not
import each other; a test keeps the two equal."""

Conjunction = tuple[Mapping[str, Any], ...]
"""Plain schemas that must all hold, without references and unions at their top."""


class Forms:
    """The forms in which values of one tool's parameters, or of one answer, can be written.

    Attributes:
        missed: the keywords seen so far that are not enforced.
    """

    def __init__(self, root: Schema) -> None:
        """`$ref` is resolved inside `root`."""
        self.root: Mapping[str, Any] = root if isinstance(root, Mapping) else {}
        self.missed: set[str] = set()
        self._known: dict[int, list[Conjunction]] = {}
        self._names: dict[int, str] = {}  # names of the targets of references
        self._targets: list[Mapping[str, Any]] = []

    def alternatives(self, schema: Schema, inside: tuple[int, ...] = ()) -> list[Conjunction]:
        """Return the alternatives of the schema; none if no value fits."""
        if not isinstance(schema, Mapping):
            return [] if schema is False else [()]
        if id(schema) in inside:  # a cyclic reference adds nothing
            return []
        if id(schema) not in self._known:
            self._known[id(schema)] = self._written_out(schema, (*inside, id(schema)))
        return self._known[id(schema)]

    def _written_out(self, schema: Mapping[str, Any], inside: tuple[int, ...]) -> list[Conjunction]:
        plain = {key: value for key, value in schema.items() if key not in _COMBINING}
        factors: list[list[Conjunction]] = []
        for key in ("$ref", "$dynamicRef"):
            if key in schema:
                if (target := resolve(schema[key], self.root)) is None:
                    self.missed.add(key)
                else:
                    factors.append(self.alternatives(target, inside))
        factors += [self.alternatives(part, inside) for part in schema.get("allOf", ())]
        for key in ("anyOf", "oneOf"):
            if key in schema:
                branches = [self.alternatives(part, inside) for part in schema[key]]
                if key == "oneOf" and not self._are_exclusive(schema[key]):
                    self.missed.add(key)
                if sum(map(len, branches)) > MAX_ALTERNATIVES:
                    self.missed.add(key)
                else:
                    factors.append(list(itertools.chain.from_iterable(branches)))
        while math.prod(map(len, factors)) > MAX_ALTERNATIVES:
            factors.pop()
            self.missed.update(key for key in ("allOf", "anyOf", "oneOf") if key in schema)
        start: Conjunction = (plain,) if plain.keys() - ANNOTATIONS else ()
        every = [start + tuple(itertools.chain.from_iterable(choice)) for choice in itertools.product(*factors)]
        short = [tuple({id(part): part for part in conjunction}.values()) for conjunction in every]
        return list({tuple(map(id, conjunction)): conjunction for conjunction in short}.values())

    def split(self, schema: Schema) -> tuple[list[str], list[Schema]]:
        """Return the forms of a parameter: Lark terminals for raw text, and schemas for JSON other than a string."""
        texts: dict[str, None] = {}
        others: list[Schema] = []
        for conjunction in self.alternatives(schema):
            raw, other = self._split(conjunction)
            texts.update(dict.fromkeys(raw))
            if other is not None and other not in others:
                others.append(other)
        return list(texts), others

    def reduce(self, schema: Schema, without: frozenset[str] = frozenset()) -> Schema:
        """Return the schema reduced to keywords that are enforced in JSON and not in `without`."""
        if not isinstance(schema, Mapping):
            return schema
        short: dict[str, Any] = {}
        every: list[Schema] = []
        for key, value in schema.items():
            if key in ANNOTATIONS:
                continue
            if key in without:
                self.missed.add(key)
            elif key in ("$ref", "$dynamicRef"):
                every.append(self._reference(key, value))
            elif key in ("allOf", "anyOf", "oneOf"):
                parts = [self.reduce(part, without) for part in value]
                if key == "allOf":
                    every += parts
                else:
                    if key == "oneOf" and not self._are_exclusive(value):
                        self.missed.add(key)
                    every.append({"anyOf": parts})
            elif key in ("pattern", "format"):
                every += self._pattern(key, value)
            elif not self._is_enforced(key, value):
                self.missed.add(key)
            elif key == "properties":
                short[key] = {name: self.reduce(part, without) for name, part in value.items()}
            elif key == "patternProperties":
                short[key] = {f"^(?:{whole_text(each)})$": self.reduce(part, without) for each, part in value.items()}
            elif key in ("items", "additionalProperties"):
                short[key] = self.reduce(value, without)
            elif key == "prefixItems":
                short[key] = [self.reduce(part, without) for part in value]
            else:
                short[key] = value
        if "patternProperties" in schema and "patternProperties" not in short:
            short.pop("additionalProperties", None)  # it would forbid names that the patterns allow
        every = [part for part in every if part is not True and part != {}]
        if not short and len(every) == 1:
            return every[0]
        return {**short, "allOf": every} if every else short

    def json(self, options: Sequence[Schema]) -> Schema | None:
        """Return one schema for llguidance from alternatives, loosened only as far as needed; None if no value fits."""
        if not options:
            return None
        before = set(self.missed)
        for without in LOOSENED:
            self.missed = set(before)
            parts = [self.reduce(option, without) for option in options]
            parts = [part for part in parts if part is not False]
            if not parts:
                return None
            schema = {"anyOf": parts} if len(parts) > 1 else {} if parts[0] is True else parts[0]
            form = {**schema, "$defs": self._definitions(without), "x-guidance": JSON_FORM}
            problem = _refusal(form)
            if problem is None:
                return form
            if "Unsatisfiable" in problem:
                return None
        types = {name for option in options for name in accepted_types(option, self.root)}
        self.missed.update(key for option in options if isinstance(option, Mapping) for key in option.keys() - {"type"})
        return {"type": sorted(types), "x-guidance": JSON_FORM}

    def texts(self, conjunction: Conjunction) -> str:
        """Return a terminal for the matching strings in raw form."""
        terms: list[str] = []
        for schema in conjunction:
            enforced = {"type", "minLength", "maxLength", "pattern", "format"}
            least, most = schema.get("minLength", 0), schema.get("maxLength")
            if least or most is not None:
                terms.append(f"/(?s:.{{{int(least)},{'' if most is None else int(most)}}})/")
            for key in schema.keys() & {"pattern", "format"}:
                terms += [f"/{lark(part['pattern'])}/" for part in self._pattern(key, schema[key])]
            self.missed |= schema.keys() - ANNOTATIONS - NOT_OF_STRINGS - enforced
        return " & ".join(dict.fromkeys(terms)) or ANY_TEXT

    def _split(self, conjunction: Conjunction) -> tuple[list[str], Schema | None]:
        types = frozenset.intersection(_ALL, *(accepted_types(schema, self.root) for schema in conjunction))
        lists = [_listed(schema) for schema in conjunction if schema.keys() & {"enum", "const"}]
        if lists:
            fits = self._check(conjunction, lists[1:])
            values = [value for value in lists[0] if fits(value)]
            rest = [value for value in values if not isinstance(value, str)]
            return [json.dumps(value) for value in values if _is_text(value)], {"enum": rest} if rest else None
        others = [name for name in types if name != "string"]
        if "number" in others and "integer" in others:
            others.remove("integer")
        raw = [self.texts(conjunction)] if "string" in types else []
        if not others:
            return raw, None
        if len(conjunction) < 2:
            return raw, {**(conjunction[0] if conjunction else {}), "type": others}
        return raw, {"allOf": list(conjunction), "type": others}

    def _check(self, conjunction: Conjunction, lists: Sequence[Sequence[Any]]) -> Any:
        """Return a cheap check of whether a listed value satisfies the rest of its alternative."""
        names = [_names(schema["type"]) for schema in conjunction if "type" in schema]
        rest = [
            {key: value for key, value in schema.items() if key in _CHEAP and key not in ANNOTATIONS}
            for schema in conjunction
        ]
        validators = [jsonschema.Draft202012Validator(schema) for schema in rest if schema]
        self.missed |= (
            {key for schema in conjunction for key in schema} - _CHEAP - ANNOTATIONS - {"type", "enum", "const"}
        )

        def fits(value: Any) -> bool:
            return (
                all(not json_types(value).isdisjoint(each) for each in names)
                and all(any(equal(value, each) for each in values) for values in lists)
                and all(validator.is_valid(value) for validator in validators)
            )

        return fits

    def _are_exclusive(self, branches: Sequence[Schema]) -> bool:
        """Return whether no value fits two branches, because their types or a required constant differ."""
        types = [accepted_types(branch, self.root) for branch in branches]
        return all(
            one.isdisjoint(other) or self._are_tagged(branches[i], branches[j])
            for (i, one), (j, other) in itertools.combinations(enumerate(types), 2)
        )

    def _are_tagged(self, one: Schema, other: Schema) -> bool:
        tags, others = self._tags(one), self._tags(other)
        return any(
            not any(equal(value, each) for value in tags[key] for each in others[key])
            for key in tags.keys() & others.keys()
        )

    def _tags(self, schema: Schema) -> dict[str, Sequence[Any]]:
        """Return the required properties of an object that have listed values."""
        for _ in range(8):
            if isinstance(schema, Mapping) and "$ref" in schema:
                schema = resolve(schema["$ref"], self.root)
        if not isinstance(schema, Mapping) or schema.get("type") != "object":
            return {}
        properties = schema.get("properties", {})
        return {
            key: _listed(properties[key])
            for key in schema.get("required", ())
            if isinstance(properties.get(key), Mapping) and properties[key].keys() & {"enum", "const"}
        }

    def _reference(self, key: str, reference: Any) -> Schema:
        """Return a reference into the definitions that are passed to llguidance with the schema."""
        target = resolve(reference, self.root)
        if target is None or self._loops(target):
            self.missed.add(key)
            return True
        if isinstance(target, bool):
            return target
        if id(target) not in self._names:
            self._names[id(target)] = f"d{len(self._names)}"
            self._targets.append(target)
        return {"$ref": f"#/$defs/{self._names[id(target)]}"}

    def _definitions(self, without: frozenset[str]) -> dict[str, Schema]:
        """Return the targets of all references, including those inside other targets."""
        found = {}
        for target in _growing(self._targets):
            found[self._names[id(target)]] = self.reduce(target, without)
        return found

    def _loops(self, start: Schema) -> bool:
        """Return whether a schema refers to itself at the same value, which llguidance would expand forever."""
        waiting, seen = list(self._in_place(start)), set()
        while waiting:
            schema = waiting.pop()
            if schema is start:
                return True
            if isinstance(schema, Mapping) and id(schema) not in seen:
                seen.add(id(schema))
                waiting += self._in_place(schema)
        return False

    def _in_place(self, schema: Schema) -> Iterator[Schema]:
        if isinstance(schema, Mapping):
            for key in ("allOf", "anyOf", "oneOf"):
                yield from schema.get(key, ())
            for key in ("$ref", "$dynamicRef"):
                if (target := resolve(schema.get(key), self.root)) is not None:
                    yield target

    def _pattern(self, key: str, value: Any) -> list[Schema]:
        """Return `pattern` or `format` as a pattern for the whole text that llguidance accepts."""
        if key == "format":
            return [{"pattern": f"^(?:{FORMATS[value]})$"}] if value in FORMATS else []
        if (regex := whole_text(value)) is None:
            self.missed.add(key)
            return []
        return [{"pattern": f"^(?:{regex})$"}]

    def _is_enforced(self, key: str, value: Any) -> bool:
        match key:
            case "patternProperties":
                return all(whole_text(pattern) is not None for pattern in value)
            case "items":
                return isinstance(value, bool | Mapping)
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                return bool(abs(value) <= LARGEST_BOUND)
            case "enum":
                return all(map(_is_portable, value))
            case "const":
                return _is_portable(value)
        return key in ENFORCED


def whole_text(pattern: str) -> str | None:
    """Return a regular expression, for llguidance, that matches whole texts in which `pattern` is found.

    Returns None if Python, ECMAScript and Rust disagree on its meaning, or if it looks around. `\\w`, `\\d` and `\\s`
    are the Unicode classes, as in the tools' validator and pydantic.
    """
    plain = re.sub(r"\\[dws]", "\0", pattern)
    plain = re.sub(r"\\([nrtfv]|[^\w\s<>])", "e", plain)
    for _, members in re.findall(r"\[(\^?)([^\]]*)\]", plain):
        if not members or re.search(r"\[|&&|--|~~", members):
            return None
    plain = re.sub(r"\[[^\]]*\]", "c", plain)
    start, end = plain.startswith("^"), plain.endswith("$")
    inner = plain[start : len(plain) - end]
    if re.search(r"[\\^$\[\]]|\(\?(?!:)|[*+?}][+?]|\{(?!\d+(?:,\d*)?\})", inner):
        return None
    top = inner
    while (shorter := re.sub(r"\([^()]*\)", "g", top)) != top:
        top = shorter
    if (start or end) and "|" in top:
        return None
    body = "".join(
        _CLASSES.get(token, token) for token in re.findall(r"\\.|.", pattern[start : len(pattern) - end], re.S)
    )
    whole = f"{'' if start else '(?s:.*)'}(?:{body}){'' if end else '(?s:.*)'}"
    return None if _refusal_of_lark(f"start: V\nV: /{lark(whole)}/") else whole


def finds(pattern: str, text: str) -> bool | None:
    """Return whether `pattern` is found in `text`, by Rust's linear engine; None if that rejects the pattern."""
    try:
        return _searcher(pattern).isinstance_python(text)
    except SchemaError:
        return None


@functools.lru_cache(maxsize=256)
def _searcher(pattern: str) -> SchemaValidator:
    return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))


_COMBINING = frozenset(("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf"))
_ALL = frozenset(("string", "null", "boolean", "integer", "number", "array", "object"))
_CHEAP = frozenset(
    "exclusiveMaximum exclusiveMinimum maxItems maxLength maxProperties maximum minItems minLength minProperties "
    "minimum required".split()
)
"""Keywords that are checked on listed values while a grammar is built."""
_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
_CLASSES = {r"\d": r"\p{Nd}", r"\w": _WORD}
"""Explicit classes, because llguidance narrows the short names to ASCII in JSON."""


def lark(regex: str) -> str:
    """Return a regular expression escaped for the slashes of a Lark terminal."""
    import llguidance

    return str(llguidance.regex_to_lark(regex, ""))


def _growing(items: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    at = 0
    while at < len(items):
        yield items[at]
        at += 1


def _listed(schema: Mapping[str, Any]) -> Sequence[Any]:
    values: Sequence[Any] = schema["enum"] if "enum" in schema else [schema["const"]]
    if "enum" in schema and "const" in schema:
        return [value for value in values if equal(value, schema["const"])]
    return values


def _names(types: str | Sequence[str]) -> Sequence[str]:
    return (types,) if isinstance(types, str) else types


def _is_text(value: Any) -> bool:
    """Return whether it is a string that UTF-8 can encode: no lone surrogates."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _is_portable(value: Any) -> bool:
    """Return whether llguidance reads the same value: no lone surrogates, no integers beyond 64 bits."""
    match value:
        case str():
            return _is_text(value)
        case list():
            return all(map(_is_portable, value))
        case dict():
            return all(_is_text(key) and _is_portable(item) for key, item in value.items())
        case bool() | None:
            return True
    return bool(abs(value) < 2.0**63)


def _refusal(schema: Schema) -> str | None:
    """Return llguidance's reason for rejecting a schema, or None."""
    import llguidance

    try:
        return _refusal_of_lark(llguidance.LLMatcher.grammar_from_json_schema(schema))
    except ValueError as error:
        return str(error)


def _refusal_of_lark(grammar: str) -> str | None:
    import llguidance

    refused, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0] if refused else None
