"""JSON Schema (2020-12) validation in bounded time, with exact decimals.

Values come from the model and schemas may be untrusted, so every check is bounded: a value is checked against a schema
once, however often the two meet (recursive `anyOf`); `uniqueItems` compares canonical texts in one pass; patterns use
`patterns`; and each check has a time limit. References are resolved when the validator is built, and never fetched.

`$dynamicRef` is read as `$ref`: they differ only if several schema resources are composed.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jsonschema
import referencing
import referencing.jsonschema

from agentkit_tools.formats import FORMATS
from agentkit_tools.patterns import PatternTooSlowError, is_pattern, needs_worker, search

MAX_DEPTH = 100
"""Maximum nesting depth of a schema."""
MAX_VALUES = 100_000
"""Maximum number of objects, arrays and scalars in a schema."""
MAX_PROBLEMS = 1000
"""Maximum number of problems collected for one value."""
CHECK_S = 2.0
"""Time limit of one check, in seconds."""
BRIEF_STEPS = 2000
"""Maximum steps of a check in the event loop, about 20 ms."""

_ONE = (
    "additionalProperties contains else if items not propertyNames then unevaluatedItems unevaluatedProperties".split()
)
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_REFERENCES = ("$ref", "$dynamicRef")

_brief: contextvars.ContextVar[bool] = contextvars.ContextVar("brief", default=False)


class SchemaProblemError(Exception):
    """The schema is invalid or unsupported; the message gives the place."""


class CannotCheckError(Exception):
    """The check was abandoned: out of time, nested too deep, or a number out of range."""


class NeedsTimeError(Exception):
    """The check takes longer than `briefly` allows; run it in a thread."""


@contextlib.contextmanager
def briefly() -> Iterator[None]:
    """Make checks in this context raise `NeedsTimeError` rather than block the caller for long."""
    token = _brief.set(True)
    try:
        yield
    finally:
        _brief.reset(token)


@dataclass(frozen=True, slots=True)
class Problem:
    """One keyword that a value does not satisfy.

    Attributes:
        path: keys and indexes from the checked value to the invalid part.
        keyword: the keyword; empty if the schema is `false`.
        value: the invalid part.
        schema: the schema object that contains the keyword.
        fits: for `oneOf`, the number of branches that match.
    """

    path: tuple[str | int, ...]
    keyword: str
    value: Any
    schema: Mapping[str, Any]
    fits: int = 0

    def under(self, key: str | int) -> Problem:
        """Return the problem with `key` prepended to its path."""
        return replace(self, path=(key, *self.path))


class Validator:
    """A validator for one schema."""

    def __init__(self, schema: Mapping[str, Any] | bool) -> None:
        """Check and resolve a schema.

        Raises:
            SchemaProblemError: it is not a JSON schema (2020-12), is too deep or too large, contains an invalid
                pattern, refers to something outside itself, or refers to itself so that no finite value is valid.
        """
        _check_size(schema)
        try:
            json.dumps(schema)
            jsonschema.Draft202012Validator.check_schema(schema, format_checker=jsonschema.FormatChecker(()))
        except jsonschema.SchemaError as error:
            raise SchemaProblemError(f"{path_text(error.absolute_path)}: {error.message:.300}") from error
        except RecursionError as error:
            raise SchemaProblemError("nested too deeply to be checked") from error
        except (TypeError, ValueError) as error:  # for example an unquoted date in YAML
            raise SchemaProblemError(f"not JSON: {error}; quote it if it is text") from error
        self.schema = schema
        self.targets: dict[int, Any] = {}
        self._enums: dict[int, frozenset[str]] = {}
        self._take_in()

    def problems(self, value: Any) -> list[Problem]:
        """Return the problems of `value`, sorted by path; empty if it is valid.

        Raises:
            CannotCheckError: the check was abandoned.
            NeedsTimeError: called inside `briefly`, and the check takes longer.
        """
        run = _Run(self, time.monotonic() + CHECK_S, brief=_brief.get())
        found: list[Problem] = []
        try:
            for problem in run.errors(self.schema, value):
                found.append(problem)
                if len(found) == MAX_PROBLEMS:
                    break
        except RecursionError as error:
            raise CannotCheckError("nested too deeply") from error
        except PatternTooSlowError as error:
            raise CannotCheckError(f"takes longer than {CHECK_S:g} s: {error}") from error
        except (ValueError, OverflowError) as error:  # integers with thousands of digits
            raise CannotCheckError(f"{error}") from error
        return sorted(found, key=lambda problem: [str(part) for part in problem.path])

    @functools.cached_property
    def recursive_branches(self) -> int:
        """Most branches of one union that lead back to it; trying each at every level is exponential."""
        most, waiting, seen = 0, [self.schema], set()
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, Mapping) and id(schema) not in seen:
                seen.add(id(schema))
                waiting += self._next(schema)
                if "discriminator" not in schema:
                    for key in ("anyOf", "oneOf"):
                        most = max(most, sum(self._reaches(branch, schema) for branch in schema.get(key, ())))
        return most

    def _reaches(self, start: Any, goal: Mapping[str, Any]) -> bool:
        waiting, seen = [start], set()
        while waiting:
            schema = waiting.pop()
            if schema is goal:
                return True
            if isinstance(schema, Mapping) and id(schema) not in seen:
                seen.add(id(schema))
                waiting += self._next(schema)
        return False

    def _next(self, schema: Mapping[str, Any]) -> list[Any]:
        target = [self.targets[id(schema)]] if id(schema) in self.targets else []
        return target + [part for keys, part in parts(schema) if keys[0] not in ("$defs", "definitions")]

    def enum(self, schema: Mapping[str, Any], values: Sequence[Any]) -> frozenset[str]:
        """Return the canonical texts of an `enum`."""
        found = self._enums.get(id(schema))
        if found is None:
            found = self._enums[id(schema)] = frozenset(map(canonical, values))
        return found

    def _take_in(self) -> None:
        """Resolve every reference, check every pattern, and refuse endless recursion."""
        root = referencing.jsonschema.DRAFT202012.create_resource(self.schema)
        resolver: Any = referencing.Registry().resolver_with_root(root)
        waiting: list[tuple[Any, Any, tuple[str | int, ...]]] = [(self.schema, resolver, ())]
        seen: dict[int, tuple[Mapping[str, Any], tuple[str | int, ...]]] = {}
        while waiting:
            schema, resolver, place = waiting.pop()
            if not isinstance(schema, Mapping) or id(schema) in seen:
                continue
            seen[id(schema)] = (schema, place)
            if place and "$id" in schema:
                resolver = resolver.in_subresource(referencing.jsonschema.DRAFT202012.create_resource(schema))
            for keyword in _REFERENCES:
                if keyword in schema:
                    reference = schema[keyword]
                    try:
                        found = resolver.lookup(reference)
                    except Exception as error:  # `referencing` raises many types for a dangling reference
                        raise SchemaProblemError(
                            f"given {keyword} {reference!r}, expected a place in this schema, such as #/$defs/x"
                        ) from error
                    if not isinstance(found.contents, Mapping | bool):
                        raise SchemaProblemError(
                            f"given {keyword} {reference!r}, which is {found.contents!r:.60}, expected a schema there"
                        )
                    self.targets[id(schema)] = found.contents
                    waiting.append((found.contents, found.resolver, (*place, keyword)))
            self._check_patterns(schema, place)
            waiting += [(part, resolver, (*place, *keys)) for keys, part in parts(schema)]
        if (endless := self._endless(seen)) is not None:
            raise SchemaProblemError(
                f"{path_text(endless)}: no finite value is valid, because the schema refers to itself without end; "
                'end the recursion, as in {"anyOf": [..., {"type": "null"}]}'
            )

    def _check_patterns(self, schema: Mapping[str, Any], place: tuple[str | int, ...]) -> None:
        patterns = [schema["pattern"]] if "pattern" in schema else []
        for keyword, pattern in [("pattern", each) for each in patterns] + [
            ("patternProperties", each) for each in schema.get("patternProperties", ())
        ]:
            if not is_pattern(pattern):
                raise SchemaProblemError(f"{path_text((*place, keyword))}: {pattern!r} is not a regular expression")

    def _endless(
        self, schemas: Mapping[int, tuple[Mapping[str, Any], tuple[str | int, ...]]]
    ) -> tuple[str | int, ...] | None:
        """Return the path of a schema that only an infinite value would match, or None."""
        ends: set[int] = set()
        order = list(schemas.values())
        before = -1
        while len(ends) != before:
            before = len(ends)
            order.reverse()  # alternating directions resolves a chain in one pass
            for schema, _ in order:
                if id(schema) not in ends and self._has_end(schema, ends):
                    ends.add(id(schema))
        return next((place for key, (_, place) in schemas.items() if key not in ends), None)

    def _has_end(self, schema: Mapping[str, Any], ends: set[int]) -> bool:
        def fine(part: Any) -> bool:
            return not isinstance(part, Mapping) or id(part) in ends

        if id(schema) in self.targets and not fine(self.targets[id(schema)]):
            return False
        if not all(fine(part) for part in schema.get("allOf", ())):
            return False
        if any(key in schema and not any(map(fine, schema[key])) for key in ("anyOf", "oneOf")):
            return False
        if "enum" in schema or "const" in schema:
            return True
        known = schema.get("properties", {})
        if schema.get("type") in ("object", ["object"]):
            return all(fine(known.get(key, schema.get("additionalProperties"))) for key in schema.get("required", ()))
        if schema.get("type") in ("array", ["array"]):
            first = schema.get("prefixItems", [])[: schema.get("minItems", 0)]
            return all(map(fine, first)) and (len(first) >= schema.get("minItems", 0) or fine(schema.get("items")))
        return True


class _Run:
    """The state of one check of one value."""

    def __init__(self, validator: Validator, deadline: float, *, brief: bool) -> None:
        self._validator = validator
        self._deadline = deadline
        self._brief = brief
        self._steps = 0
        self._known: dict[tuple[int, int], bool] = {}
        self._active: set[tuple[int, int]] = set()
        self._looked_at: dict[tuple[int, int], set[Any]] = {}
        self._meant: dict[tuple[int, int], list[Problem]] = {}
        self._kept: list[Any] = []  # keeps temporary objects alive, so that no id is reused

    def valid(self, schema: Any, value: Any) -> bool:
        """Return whether `value` matches `schema`; the answer is cached."""
        if isinstance(schema, bool):
            return schema
        key = (id(schema), id(value))
        if key not in self._known:
            self._kept.append(value)
            self._known[key] = next(self.errors(schema, value), None) is None
        return self._known[key]

    def errors(self, schema: Any, value: Any) -> Iterator[Problem]:
        """Yield the problems of `value`."""
        self._step()
        if schema is True:
            return
        if schema is False:
            yield Problem((), "", value, {})
            return
        key = (id(schema), id(value))
        if key in self._active:  # recursion on the same value: nothing matches
            yield Problem((), "$ref", value, schema)
            return
        self._active.add(key)
        try:
            for keyword, asked in schema.items():
                if keyword in _REFERENCES:
                    yield from self._part(self._validator.targets[id(schema)], value)
                elif (check := _CHECKS.get(keyword)) is not None:
                    yield from check(self, asked, value, schema)
        finally:
            self._active.discard(key)

    def _part(self, schema: Any, value: Any, key: str | int | None = None) -> Iterator[Problem]:
        if not self.valid(schema, value):
            for problem in self.errors(schema, value):
                yield problem if key is None else problem.under(key)

    def _step(self, count: int = 1) -> None:
        self._steps += count
        if self._brief and self._steps > BRIEF_STEPS:
            raise NeedsTimeError
        if self._steps & 63 < count and time.monotonic() > self._deadline:
            raise CannotCheckError(f"takes longer than {CHECK_S:g} s")

    def _search(self, pattern: str, text: str) -> bool:
        if self._brief and needs_worker(pattern, text):
            raise NeedsTimeError
        self._step(1 + len(text) // 10_000)
        return search(pattern, text, deadline=self._deadline)

    # Keyword checks. Each yields the problems of `value`; `schema` is the object that contains the keyword.

    def _type(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if not any(is_type(value, name) for name in ([asked] if isinstance(asked, str) else asked)):
            yield Problem((), "type", value, schema)

    def _enum(self, asked: Sequence[Any], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if canonical(value) not in self._validator.enum(schema, asked):
            yield Problem((), "enum", value, schema)

    def _const(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if canonical(value) != canonical(asked):
            yield Problem((), "const", value, schema)

    def _bound(self, keyword: str, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if is_type(value, "number") and not _BOUNDS[keyword](value, asked):
            yield Problem((), keyword, value, schema)

    def _multiple(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if is_type(value, "number") and _exact(value) % _exact(asked):
            yield Problem((), "multipleOf", value, schema)

    def _length(self, keyword: str, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        kind = str if keyword.endswith("Length") else list if keyword.endswith("Items") else dict
        if isinstance(value, kind) and (len(value) < asked if keyword.startswith("min") else len(value) > asked):
            yield Problem((), keyword, value, schema)

    def _pattern(self, asked: str, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, str) and not self._search(asked, value):
            yield Problem((), "pattern", value, schema)

    def _format(self, asked: str, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, str) and asked in FORMATS and not self._search(f"^(?:{FORMATS[asked]})$", value):
            yield Problem((), "format", value, schema)

    def _prefix_items(self, asked: Sequence[Any], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, list):
            for index, (part, item) in enumerate(zip(asked, value, strict=False)):
                yield from self._part(part, item, index)

    def _items(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, list):
            first = len(schema.get("prefixItems", ()))
            for index, item in enumerate(value[first:], first):
                yield from self._part(asked, item, index)

    def _contains(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, list):
            count = sum(self.valid(asked, item) for item in value)
            if count < schema.get("minContains", 1):
                yield Problem((), "minContains" if "minContains" in schema else "contains", value, schema)
            if count > schema.get("maxContains", math.inf):
                yield Problem((), "maxContains", value, schema)

    def _unique(self, asked: bool, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if asked and isinstance(value, list):
            seen: set[str] = set()
            for item in value:
                self._step()
                seen.add(canonical(item))
            if len(seen) < len(value):
                yield Problem((), "uniqueItems", value, schema)

    def _properties(self, asked: Mapping[str, Any], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, dict):
            for key, part in asked.items():
                if key in value:
                    yield from self._part(part, value[key], key)

    def _pattern_properties(self, asked: Mapping[str, Any], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, dict):
            for pattern, part in asked.items():
                for key, item in value.items():
                    if self._search(pattern, key):
                        yield from self._part(part, item, key)

    def _additional(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, dict):
            extra = self._extra(value, schema)
            if asked is False and extra:
                yield Problem((), "additionalProperties", {key: value[key] for key in extra}, schema)
            else:
                for key in extra:
                    yield from self._part(asked, value[key], key)

    def _extra(self, value: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
        known, patterns = schema.get("properties", {}), schema.get("patternProperties", ())
        return [key for key in value if key not in known and not any(self._search(p, key) for p in patterns)]

    def _property_names(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, dict):
            for key in value:
                yield from self._part(asked, key, key)

    def _required(self, asked: Sequence[str], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, dict) and any(key not in value for key in asked):
            yield Problem((), "required", value, schema)

    def _dependent_required(self, asked: Mapping[str, Any], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, dict):
            for key, others in asked.items():
                if key in value and any(other not in value for other in others):
                    yield Problem((), "dependentRequired", value, schema)

    def _dependent_schemas(self, asked: Mapping[str, Any], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if isinstance(value, dict):
            for key, part in asked.items():
                if key in value:
                    yield from self._part(part, value)

    def _all_of(self, asked: Sequence[Any], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        for part in asked:
            yield from self._part(part, value)

    def _any_of(self, keyword: str, asked: Sequence[Any], value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        fits = sum(self.valid(part, value) for part in asked)
        if fits == 0:
            key = (id(asked), id(value))
            if key not in self._meant:
                self._meant[key] = self._nearest(asked, value) or [Problem((), keyword, value, schema)]
            yield from self._meant[key]
        elif fits > 1 and keyword == "oneOf":
            yield Problem((), keyword, value, schema, fits)

    def _nearest(self, branches: Sequence[Any], value: Any) -> list[Problem]:
        """Return the problems of the branch most likely meant; empty if no branch has the value's type.

        Branches are ranked by matching constants (the `kind` of a tagged union), then by fewest unknown keys, then by
        fewest problems.
        """
        ranked = []
        for branch in branches:
            found = []
            for problem in self.errors(branch, value):
                found.append(problem)
                if len(found) == 20:
                    break
            whole = ("", "$ref", "type", "enum", "const", "anyOf", "oneOf", "not")
            if found and not any(not problem.path and problem.keyword in whole for problem in found):
                strange = sum(len(problem.path) == 1 and problem.keyword in ("const", "enum") for problem in found)
                ranked.append(((strange, self._unknown(branch, value), len(found)), found))
        return min(ranked, key=lambda entry: entry[0])[1] if ranked else []

    def _unknown(self, branch: Any, value: Any) -> int:
        for _ in range(MAX_DEPTH):
            branch = self._validator.targets.get(id(branch), branch)
        return len(value.keys() - branch.get("properties", {}).keys()) if isinstance(value, dict) else 0

    def _not(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        if self.valid(asked, value):
            yield Problem((), "not", value, schema)

    def _if(self, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        yield from self._part(schema.get("then" if self.valid(asked, value) else "else", True), value)

    def _unevaluated(self, keyword: str, asked: Any, value: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
        entries: list[tuple[Any, Any]] = []
        if isinstance(value, dict) and keyword == "unevaluatedProperties":
            entries = list(value.items())
        elif isinstance(value, list) and keyword == "unevaluatedItems":
            entries = list(enumerate(value))
        if entries:
            without = {key: part for key, part in schema.items() if key != keyword}
            if id(schema) in self._validator.targets:
                without["allOf"] = [*without.get("allOf", ()), self._validator.targets[id(schema)]]
                without = {key: part for key, part in without.items() if key not in _REFERENCES}
            known = self._evaluated(without, value)
            extra = [(key, item) for key, item in entries if key not in known]
            if asked is False and extra:
                yield Problem((), keyword, {str(key): item for key, item in extra}, schema)
            else:
                for key, item in extra:
                    yield from self._part(asked, item, key)

    def _evaluated(self, schema: Any, value: Any) -> set[Any]:
        """Return the keys or indexes of `value` that `schema` evaluates."""
        key = (id(schema), id(value))
        if key not in self._looked_at:
            self._looked_at[key] = set()  # the contribution of a recursive reference
            self._kept.append(schema)
            self._looked_at[key] = self._evaluated_by(schema, value)
        return self._looked_at[key]

    def _evaluated_by(self, schema: Any, value: Any) -> set[Any]:
        self._step()
        found: set[Any] = set()
        if not isinstance(schema, Mapping):
            return found
        if isinstance(value, dict):
            found |= schema.get("properties", {}).keys() & value.keys()
            found |= {key for key in value for p in schema.get("patternProperties", ()) if self._search(p, key)}
            if "additionalProperties" in schema:
                found |= set(self._extra(value, schema))
            if "unevaluatedProperties" in schema:
                found |= value.keys()
        else:
            found |= set(range(min(len(schema.get("prefixItems", ())), len(value))))
            if "items" in schema or "unevaluatedItems" in schema:
                found |= set(range(len(value)))
            if "contains" in schema:
                found |= {index for index, item in enumerate(value) if self.valid(schema["contains"], item)}
        for part in self._in_place(schema, value):
            found |= self._evaluated(part, value)
        return found

    def _in_place(self, schema: Mapping[str, Any], value: Any) -> Iterator[Any]:
        """Yield the subschemas that apply to `value` itself and match it."""
        if id(schema) in self._validator.targets:
            yield self._validator.targets[id(schema)]
        for key in ("allOf", "anyOf", "oneOf"):
            yield from (part for part in schema.get(key, ()) if self.valid(part, value))
        if "if" in schema:
            if self.valid(schema["if"], value):
                yield schema["if"]
                yield schema.get("then", True)
            else:
                yield schema.get("else", True)
        yield from (part for key, part in schema.get("dependentSchemas", {}).items() if key in value)


_BOUNDS: dict[str, Any] = {
    "minimum": lambda value, asked: value >= asked,
    "maximum": lambda value, asked: value <= asked,
    "exclusiveMinimum": lambda value, asked: value > asked,
    "exclusiveMaximum": lambda value, asked: value < asked,
}
_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def _named(method: Any, keyword: str) -> Any:
    return lambda run, asked, value, schema: method(run, keyword, asked, value, schema)


_CHECKS: dict[str, Any] = {
    "type": _Run._type,
    "enum": _Run._enum,
    "const": _Run._const,
    "multipleOf": _Run._multiple,
    "pattern": _Run._pattern,
    "format": _Run._format,
    "prefixItems": _Run._prefix_items,
    "items": _Run._items,
    "contains": _Run._contains,
    "uniqueItems": _Run._unique,
    "properties": _Run._properties,
    "patternProperties": _Run._pattern_properties,
    "additionalProperties": _Run._additional,
    "propertyNames": _Run._property_names,
    "required": _Run._required,
    "dependentRequired": _Run._dependent_required,
    "dependentSchemas": _Run._dependent_schemas,
    "allOf": _Run._all_of,
    "not": _Run._not,
    "if": _Run._if,
    **{keyword: _named(_Run._bound, keyword) for keyword in _BOUNDS},
    **{keyword: _named(_Run._length, keyword) for keyword in _LENGTHS},
    **{keyword: _named(_Run._any_of, keyword) for keyword in ("anyOf", "oneOf")},
    **{keyword: _named(_Run._unevaluated, keyword) for keyword in ("unevaluatedProperties", "unevaluatedItems")},
}


def parts(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the direct subschemas of `schema`, each with its keys."""
    for key in _ONE:
        if key in schema:
            yield (key,), schema[key]
    for key in _LISTED:
        yield from (((key, index), part) for index, part in enumerate(schema.get(key, ())))
    for key in _NAMED:
        yield from (((key, name), part) for name, part in schema.get(key, {}).items())


def is_type(value: Any, name: str) -> bool:
    """Return whether `value` has the JSON Schema type `name`; 1.0 is an integer."""
    match name:
        case "integer":
            return (isinstance(value, int) and not isinstance(value, bool)) or (
                isinstance(value, float) and value.is_integer()
            )
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
    return isinstance(value, {"string": str, "array": list, "object": dict}[name])


def depth(value: Any) -> int:
    """Return the nesting depth of arrays and objects."""
    levels, level = 0, [value]
    while level := [item for item in level if isinstance(item, list | dict)]:
        levels += 1
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
    return levels


def canonical(value: Any) -> str:
    """Return a text that is equal for equal JSON values: 1 equals 1.0, but not true.

    Texts rather than hashes, because numbers can be chosen to make hashes collide.
    """
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def path_text(keys: Any) -> str:
    """Format a path: `$.a[0].b`."""
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)


@functools.lru_cache(maxsize=1024)
def _exact(number: float) -> Fraction:
    """Return the decimal as written, not the nearest binary number."""
    if isinstance(number, float) and not math.isfinite(number):
        raise CannotCheckError("a number is out of range")
    return Fraction(repr(number) if isinstance(number, float) else number)


def _check_size(schema: Any) -> None:
    """Refuse a schema that is too deep or too large; a structure that contains itself counts as too deep."""
    count, level = 0, [schema]
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > MAX_VALUES:
            raise SchemaProblemError(f"more than {MAX_VALUES} values; make the schema smaller")
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            if len(below) > MAX_VALUES:
                break
        level = below
        if not level:
            return
    raise SchemaProblemError(f"nested more than {MAX_DEPTH} levels deep; move parts of it to $defs")
