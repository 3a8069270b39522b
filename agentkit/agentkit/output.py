"""The form of an answer: free text, JSON that fits a schema, or a value of a Python type.

A grammar does not enforce every keyword of a schema, does not cover the arguments of tools such as `submit`, and is not
available for every model. So every answer is validated once more.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, cast

import anyio
import anyio.to_thread
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import TypeVar

from agentkit_tools import ToolDefinitionError
from agentkit_tools.schema import problems
from agentkit_tools.signature import portable, strip_noise
from agentkit_tools.validation import NeedsTimeError, SchemaProblemError, Validator, briefly, path_text

T = TypeVar("T", default=Any)

ANSWER_AGAIN: Final = "Answer again, with nothing but JSON that fits the schema."
RETRY: Final = "{problem}\n\n" + ANSWER_AGAIN
"""The user message that gives the model a second try."""
FENCE: Final = "```"
MAX_PROBLEMS: Final = 3
"""Maximum number of problems of an answer that the model is told; the first few are enough to repair it."""


@dataclass(frozen=True, slots=True)
class Output(Generic[T]):
    """The form of an agent's answers.

    Attributes:
        schema: JSON schema of the answer; None if it is free text.
        value: Converts the text of a valid answer to the value.
        check: Returns the problems of an answer's text, or an empty list.
    """

    schema: Mapping[str, Any] | None
    value: Callable[[str], T]
    check: Callable[[str], list[str]]

    def bare(self, answer: str) -> str:
        """Return the answer without a Markdown fence around it, if the answer must be JSON."""
        text = answer.strip()
        if self.schema is None or not (text.startswith(FENCE) and text.endswith(FENCE)):
            return answer
        inner = text[len(FENCE) : -len(FENCE)]
        return inner[4:].strip() if inner[:4].lower() == "json" else inner.strip()

    async def misfit(self, answer: str) -> str | None:
        """Return a sentence on why an answer does not fit, or None if it fits.

        A check that takes long runs in its own thread, so that other agents are not blocked.
        """
        check = functools.partial(self.check, answer)
        try:
            with briefly():
                found = check()
        except NeedsTimeError:
            found = await anyio.to_thread.run_sync(check, limiter=anyio.CapacityLimiter(1))
        return f"the answer {answer!r:.200} does not fit output_schema: {'; '.join(found)}" if found else None


def output_of(output_type: type[T] | None, schema: Mapping[str, Any] | None) -> Output[T]:
    """Return the form that is given by a type or a JSON schema: free text if both are None or the type is `str`.

    Raises:
        ValueError: both are given, the type has no JSON schema, or `schema` is not a JSON schema.
    """
    if output_type is not None and schema is not None:
        raise ValueError("output_type and output_schema are both given; give one of them")
    if output_type is not None and output_type is not str:
        return _typed(output_type)
    if schema is None:
        return Output(None, cast(Callable[[str], T], str), lambda answer: [])
    check_output_schema(schema)
    text = json.dumps(schema)
    return Output(schema, json.loads, lambda answer: _problems(answer, _validator(text)))


def check_output_schema(schema: Mapping[str, Any]) -> None:
    """Refuse an invalid JSON schema (2020-12), or one with references outside itself: nothing is ever fetched.

    Raises:
        ValueError: the schema is invalid; the message names the place in it.
    """
    try:
        if not isinstance(schema, Mapping):
            raise SchemaProblemError(f"given {schema!r:.200}")
        Validator(schema)
    except SchemaProblemError as problem:
        raise ValueError(
            f"output_schema: {problem}; expected a JSON schema, such as `Model.model_json_schema()` of a pydantic "
            "model (or give output_type=Model)"
        ) from problem


def _typed(output_type: type[T]) -> Output[T]:
    try:
        if inspect.isroutine(output_type):
            raise TypeError("it is a function")
        adapter: TypeAdapter[T] = TypeAdapter(portable(output_type, "output_type", {}))
        schema = _closed(strip_noise(adapter.json_schema()))
        check_output_schema(schema)
    except ToolDefinitionError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # custom types can raise anything while building a schema
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"output_type: given {output_type!r:.200}, which has no JSON schema ({reason}); expected a pydantic "
            "model, a dataclass, a TypedDict or a type such as list[int]"
        ) from error

    def check(answer: str) -> list[str]:
        try:
            from_json(answer, allow_inf_nan=False)
            adapter.validate_json(answer)
        except ValidationError as error:
            details = error.errors(include_url=False)[:MAX_PROBLEMS]
            return [f"{path_text(item['loc'])}: given {item['input']!r:.60}: {item['msg']}" for item in details]
        except ValueError as error:
            return [f"$: not valid JSON: {error}"]
        return []

    return Output(schema, adapter.validate_json, check)


def _closed(schema: Any) -> Any:
    """Return the schema with `additionalProperties: false` in each object with `properties` that does not set it.

    Python types ignore unknown properties, and a model that is constrained to the schema should not invent any.
    """
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs"):
            closed[key] = {name: _closed(item) for name, item in value.items()}
        else:
            closed[key] = value if key in ("default", "const", "enum", "examples") else _closed(value)
    if schema.get("type") == "object" and "properties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _problems(answer: str, validator: Validator) -> list[str]:
    try:
        value = from_json(answer, allow_inf_nan=False)
    except ValueError as error:
        return [f"$: not valid JSON: {error}"]
    return problems(validator, value)


@functools.lru_cache(maxsize=64)
def _validator(schema: str) -> Validator:
    return Validator(json.loads(schema))
