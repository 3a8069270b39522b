"""JSON Schema for grammars: what of a schema can be enforced while a value is written, and what is left for later.

A keyword is enforced when it is on the list here and llguidance takes it. Any other is left out, which allows more and
never less, and its name is collected in `missed`. A parameter's value has two forms: a string is written raw,
everything else as JSON; so its schema is split in two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema

Schema = Any
"""A JSON schema: an object, or a bool."""

ANNOTATIONS = frozenset(
    "$comment $schema default deprecated description discriminator examples readOnly title writeOnly".split()
)
"""Keywords that constrain nothing."""
DEFINITIONS = frozenset(("$defs", "definitions"))
ENFORCED = frozenset(
    "$ref additionalProperties allOf anyOf const enum exclusiveMaximum exclusiveMinimum format items maxItems "
    "maxLength maxProperties maximum minItems minLength minimum multipleOf oneOf pattern patternProperties "
    "prefixItems properties required type".split()
)
"""Keywords that hold in JSON. `minProperties` is not among them: no grammar sees that a free key is written twice."""
FORMATS = frozenset("date date-time duration email hostname ipv4 ipv6 time uri uuid".split())
"""Values of `format` that hold in JSON."""
NOT_OF_STRINGS = frozenset(
    "additionalProperties contains dependentRequired dependentSchemas exclusiveMaximum exclusiveMinimum items "
    "maxContains maxItems maxProperties maximum minContains minItems minProperties minimum multipleOf "
    "patternProperties prefixItems properties propertyNames required unevaluatedItems unevaluatedProperties "
    "uniqueItems".split()
)
"""Keywords that say nothing about a string."""
TYPES = ("string", "null", "boolean", "integer", "number", "array", "object")

JSON_FORM = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON as `json.dumps` writes it and as the chat encoding shows it to the model; no white space without end."""


class Forms:
    """How the values of one tool's parameters, or one answer, may be written.

    Attributes:
        missed: the keywords met so far that are not enforced.
    """

    def __init__(self, root: Schema) -> None:
        """`root` is what `$ref` points into."""
        self.root: Mapping[str, Any] = root if isinstance(root, Mapping) else {}
        self.missed: set[str] = set()

    def split(self, schema: Schema) -> tuple[list[str], list[Schema]]:
        """What a parameter may be: raw text, as terminals of Lark, and JSON other than a string, as schemas."""
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        constraints = schema.keys() - ANNOTATIONS - DEFINITIONS
        if constraints == {"$ref"} and (target := self._definition(schema["$ref"])) is not None:
            return self.split(target)
        if constraints & {"enum", "const"}:
            values = [value for value in schema.get("enum", [schema.get("const")]) if self._fits(value, schema)]
            others = [value for value in values if not isinstance(value, str)]
            return [json.dumps(value) for value in values if _is_text(value)], [{"enum": others}] if others else []
        if constraints in ({"anyOf"}, {"oneOf"}):
            key = constraints.pop()
            parts = [self.split(option) for option in schema[key]]
            if key == "oneOf" and sum(bool(raw) for raw, _ in parts) > 1:
                self.missed.add("oneOf")
            options = [option for _, json_options in parts for option in json_options]
            whole = options if key == "anyOf" or len(options) < 2 else [{"oneOf": options}]
            return [raw for raws, _ in parts for raw in raws], whole
        types = _names(schema.get("type", TYPES))
        others = [name for name in types if name != "string"]
        return (
            [self._raw(schema)] if "string" in types else [],
            [{**self.kept(schema), "type": others}] if others else [],
        )

    def kept(self, schema: Schema) -> Schema:
        """The schema with those keywords only that are enforced in JSON."""
        if not isinstance(schema, Mapping):
            return schema
        short: dict[str, Any] = {}
        for key, value in schema.items():
            if key in ANNOTATIONS | DEFINITIONS:
                continue
            if not self._is_enforced(key, value):
                self.missed.add(key)
            elif key in ("properties", "patternProperties"):
                short[key] = {name: self.kept(part) for name, part in value.items()}
            elif key in ("items", "additionalProperties"):
                short[key] = self.kept(value)
            elif key in ("allOf", "anyOf", "oneOf", "prefixItems"):
                short[key] = [self.kept(part) for part in value]
            else:
                short[key] = value
        if "patternProperties" in schema and "patternProperties" not in short:
            short.pop("additionalProperties", None)  # it would forbid what the patterns allow
        return short

    def json(self, options: list[Schema]) -> Schema | None:
        """One schema for llguidance out of alternatives, loosened as far as it must be; None where no value fits."""
        if not options or options == [False]:
            return None
        schema = {"anyOf": options} if len(options) > 1 else {} if options[0] is True else options[0]
        if "$ref" in json.dumps(schema):
            for key in DEFINITIONS & self.root.keys():
                schema = {**schema, key: {name: self.kept(part) for name, part in self.root[key].items()}}
        for one_of in (False, True):
            form = {**schema, "x-guidance": {**JSON_FORM, "coerce_one_of": one_of}}
            problem = _refusal(form)
            if problem is None:
                self.missed.update({"oneOf"} if one_of else ())
                return form
            if "Unsatisfiable" in problem:
                return None
        types = {name for option in options for name in _names(option.get("type", TYPES))}
        self.missed.update(key for option in options for key in option.keys() - {"type"})
        return {"type": sorted(types), "x-guidance": JSON_FORM}

    def _raw(self, schema: Mapping[str, Any]) -> str:
        """A terminal for a string as it is written raw."""
        enforced = {"type", "minLength", "maxLength"}
        terms = []
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if least or most is not None:
            terms.append(f"/(?s:.{{{int(least)},{'' if most is None else int(most)}}})/")
        if "pattern" in schema and (regex := whole_text(schema["pattern"])) is not None:
            enforced.add("pattern")
            terms.append(f"/{regex}/")
        self.missed |= schema.keys() - ANNOTATIONS - DEFINITIONS - NOT_OF_STRINGS - enforced
        return " & ".join(terms) or "/(?s:.*)/"

    def _is_enforced(self, key: str, value: Any) -> bool:
        match key:
            case "$ref":
                return self._definition(value) is not None
            case "pattern":
                return whole_text(value) is not None
            case "patternProperties":
                return all(whole_text(pattern) is not None for pattern in value)
            case "format":
                return value in FORMATS
            case "items":
                return isinstance(value, bool | Mapping)
        return key in ENFORCED

    def _definition(self, reference: str) -> Schema | None:
        for key in DEFINITIONS & self.root.keys():
            if reference.startswith(f"#/{key}/"):
                found: Schema = self.root[key].get(reference.removeprefix(f"#/{key}/"))
                return found
        return None

    def _fits(self, value: Any, schema: Mapping[str, Any]) -> bool:
        definitions = {key: self.root[key] for key in DEFINITIONS & self.root.keys()}
        return jsonschema.Draft202012Validator({**schema, **definitions}).is_valid(value)


def whole_text(pattern: str) -> str | None:
    """A regular expression, for llguidance, of the texts in which `pattern` is found.

    None where Python, ECMAScript and Rust do not agree on what it means, or where it looks around.
    """
    plain = re.sub(r"\\[dws]", "\0", pattern)
    plain = re.sub(r"\\([nrtfv]|[^\w\s])", "e", plain)
    for negated, members in re.findall(r"\[(\^?)([^\]]*)\]", plain):
        if not members or (negated and "\0" in members) or re.search(r"\[|&&|--|~~", members):
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
    import llguidance

    body = pattern[start : len(pattern) - end]
    whole = f"{'' if start else '(?s:.*)'}(?:{body}){'' if end else '(?s:.*)'}"
    regex = llguidance.regex_to_lark(whole, "dws")
    return None if _refusal_of_lark(f"start: V\nV: /{regex}/") else regex


def _names(types: str | Sequence[str]) -> Sequence[str]:
    return (types,) if isinstance(types, str) else types


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can carry: no lone surrogates."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _refusal(schema: Schema) -> str | None:
    """Why llguidance does not take a schema, or None."""
    import llguidance

    return _refusal_of_lark(llguidance.LLMatcher.grammar_from_json_schema(schema))


def _refusal_of_lark(grammar: str) -> str | None:
    import llguidance

    refused, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0] if refused else None
