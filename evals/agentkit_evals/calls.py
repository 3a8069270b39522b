"""Scoring of calls against the expected ones, with the rules of BFCL's AST checker for Python.

- There are as many calls as expected calls. Each expected call takes the first remaining call that matches.
- A call matches if it has the tool's name, all required arguments, no other arguments than the expected ones, and an
  allowed value for each. An argument may be missing if "" is among its allowed values.
- A value has the type of the tool's schema; an integer is accepted for a number. A value of another type is accepted
  if the allowed values have that type: datasets write variables as text.
- Texts, also inside lists and objects, are compared without case, spaces and the characters `,./-_*^`, and with all
  quotes alike. Objects are compared key by key, each with its own allowed values; lists of objects in order.

A turn with a malformed call counts as a turn without calls. Source: `bfcl_eval` 2026.3.23,
`eval_checker/ast_eval/ast_checker.py` (Apache-2.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agentkit.messages import AssistantMessage
from agentkit.model import CallMalformed, CallsWithdrawn
from agentkit.task import CallsConfig, Task, ToolConfig
from agentkit.trajectory import Trajectory
from agentkit_tools import NAMED_TOOLS, ArgumentsError
from agentkit_tools.schema import parse_object

TYPES: Mapping[object, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
"""The Python type for each type of JSON Schema. A schema without a type means text, as in BFCL."""

Call = tuple[str, dict[str, Any]]


def calls_made(trajectory: Trajectory) -> str | None:
    """Return the calls of the first turn of a run that has ended as a JSON list of `{"name": ..., "arguments": {...}}`.

    The arguments of a malformed call are its text, or the reason why it cannot be parsed. Return None if a limit
    cut off the turn, because its calls are then not known.
    """
    assert trajectory.outcome is not None
    if trajectory.outcome.limit not in (None, "max_turns"):
        return None
    made: list[dict[str, Any]] = []
    malformed: dict[int, dict[str, Any]] = {}
    for record in trajectory.records:
        if isinstance(record, CallMalformed):
            malformed[record.index] = {"name": record.name, "arguments": record.error}
        elif isinstance(record, CallsWithdrawn):
            malformed = {index: call for index, call in malformed.items() if index < record.first}
    first = next((each for each in trajectory.messages if isinstance(each, AssistantMessage)), None)
    for call in first.calls if first is not None else ():
        try:
            made.append({"name": call.name, "arguments": parse_object(call.arguments, name=call.name)})
        except ArgumentsError:
            made.append({"name": call.name, "arguments": call.arguments})
    return json.dumps([*made, *malformed.values()], ensure_ascii=False)


def mismatch(task: Task, answer: str | None) -> str | None:
    """Return why the calls of `calls_made` are not the expected ones of `task`; None if they are."""
    assert isinstance(task.verifier, CallsConfig)
    if answer is None:
        return "a limit cut the turn, so its calls are not known"
    made, malformed = _parse(answer)
    schemas = _schemas(task)
    expected = task.verifier.calls
    if expected == "any":
        return None if made else malformed or "no call, expected at least one"
    if not expected and made:
        return f"{len(made)} calls, expected none"
    if len(made) != len(expected):
        return malformed or f"{len(made)} calls, expected {len(expected)}"
    left = list(made)
    for call in expected:
        ((name, allowed),) = call.items()
        reasons: list[str] = []
        for place, (called, arguments) in enumerate(left):
            reason = f"{called} was called" if called != name else _call_mismatch(schemas[name], allowed, arguments)
            if reason is None:
                del left[place]
                break
            reasons.append(reason)
        else:
            return f"no call matches {name}: {'; '.join(reasons)}"
    return None


def gold_calls(task: Task) -> str:
    """Return calls that solve `task`, in the format of `calls_made`, with the first allowed value of each argument."""
    assert isinstance(task.verifier, CallsConfig)
    if task.verifier.calls == "any":
        return json.dumps([{"name": next(iter(_schemas(task))), "arguments": {}}])
    schemas = _schemas(task)
    gold = []
    for call in task.verifier.calls:
        ((name, allowed),) = call.items()
        required = schemas[name].get("required", [])
        arguments = {key: _first(values) for key, values in allowed.items() if key in required or "" not in values}
        gold.append({"name": name, "arguments": arguments})
    return json.dumps(gold, ensure_ascii=False)


def shown_calls(expected: Any) -> str:
    """Return expected calls as text for a report."""
    if expected == "any":
        return "at least one call"
    return json.dumps(expected, ensure_ascii=False) if expected else "no call"


def _first(allowed: Sequence[Any]) -> Any:
    return _plain(next((value for value in allowed if value != ""), ""))


def _plain(value: Any) -> Any:
    """Return a value in which each list of allowed values of an object's key is replaced by its first one."""
    if isinstance(value, dict):
        return {key: _first(each) if isinstance(each, list) else each for key, each in value.items()
                if not isinstance(each, list) or "" not in each}  # fmt: skip
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _parse(answer: str) -> tuple[list[Call], str | None]:
    made: list[Call] = []
    for call in json.loads(answer):
        if not isinstance(call["arguments"], dict):
            return [], f"malformed call of {call['name']}: {call['arguments'][:200]}"
        made.append((call["name"], call["arguments"]))
    return made, None


def _schemas(task: Task) -> dict[str, Mapping[str, Any]]:
    """Return the schema of each tool's arguments by the tool's name."""
    return {
        **{name: NAMED_TOOLS[name].parameters for name in task.tools if isinstance(name, str)},
        **{tool.name: tool.parameters for tool in task.tools if isinstance(tool, ToolConfig)},
    }


def _call_mismatch(
    schema: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]], arguments: Mapping[str, Any]
) -> str | None:
    properties = schema.get("properties", {})
    for key in schema.get("required", []):
        if key not in arguments:
            return f"missing argument {key}"
    for key, value in arguments.items():
        if key not in properties or key not in allowed:
            return f"unexpected argument {key}"
        if not _allowed(value, allowed[key], properties[key]):
            return f"{key} is {_shown(value)}, expected one of {_shown(allowed[key])}"
    for key, values in allowed.items():
        if key not in arguments and "" not in values:
            return f"missing argument {key}, expected one of {_shown(values)}"
    return None


def _allowed(value: Any, allowed: Sequence[Any], schema: Any) -> bool:
    schema = schema if isinstance(schema, dict) else {}
    kind = _type_of(schema)
    items = schema.get("items")
    item_kind = _type_of(items) if kind is list and isinstance(items, dict) else None
    if kind is float and type(value) is int:
        value = float(value)
    given_kind = next((type(each) for each in allowed if each != ""), None)  # the type of the allowed values
    if type(value) is kind:
        if (
            isinstance(value, list)
            and item_kind
            and not any(not isinstance(each, list) or _items_fit(value, each, item_kind) for each in allowed)
        ):
            return False
        by_type = given_kind in (None, kind)
    elif type(value) is given_kind:
        by_type = False
    else:
        return False
    if by_type and isinstance(value, dict):
        return any(_object_allowed(value, each) for each in allowed if isinstance(each, dict))
    if by_type and item_kind is dict:
        return any(_objects_allowed(value, [] if each == "" else each) for each in allowed)
    if by_type and isinstance(value, str):
        return _normal(value) in [_normal(each) for each in allowed if isinstance(each, str)]
    if by_type and isinstance(value, list):
        found = [_normal(each) for each in value]
        return any(found == [_normal(item) for item in each] for each in allowed if isinstance(each, list | str))
    return value in allowed


def _type_of(schema: Mapping[str, Any]) -> type:
    kind = schema.get("type")
    return TYPES.get(kind, str) if isinstance(kind, str) else str


def _items_fit(value: Sequence[Any], allowed: Sequence[Any], kind: type) -> bool:
    """Return whether each item has the type `kind`, or the type of the allowed items."""
    given_kind = next((type(each) for each in allowed if each != ""), None)
    return all(type(item) in (kind, given_kind) for item in value)


def _object_allowed(value: Mapping[str, Any], allowed: Mapping[str, Any]) -> bool:
    choices = {key: values if isinstance(values, list) else [values] for key, values in allowed.items()}
    for key, item in value.items():
        if key not in choices or _normal(item) not in [_normal(each) for each in choices[key]]:
            return False
    return all(key in value or "" in values for key, values in choices.items())


def _objects_allowed(value: Sequence[Any], allowed: Any) -> bool:
    if not isinstance(allowed, list) or len(value) != len(allowed):
        return False
    pairs = list(zip(value, allowed, strict=True))
    return all(isinstance(v, dict) and isinstance(a, dict) and _object_allowed(v, a) for v, a in pairs)


def _normal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."
