"""Validation of answer schemas, and of answers against them.

A grammar does not enforce every keyword of a schema, does not cover the arguments of tools such as `submit`, and is not
available for every model. So every answer is validated once more.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import anyio
import anyio.to_thread
from pydantic_core import from_json

from agentkit_tools.schema import problems
from agentkit_tools.validation import NeedsTimeError, SchemaProblemError, Validator, briefly


def check_output_schema(schema: Mapping[str, Any]) -> None:
    """Refuse an invalid JSON schema (2020-12), or one with references outside itself: nothing is ever fetched.

    Raises:
        ValueError: the schema is invalid; the text names the place in it.
    """
    try:
        if not isinstance(schema, Mapping):
            raise SchemaProblemError(f"given {schema!r:.200}")
        Validator(schema)
    except SchemaProblemError as problem:
        raise ValueError(
            f"output_schema: {problem}; expected a JSON schema, such as `Model.model_json_schema()` of a pydantic model"
        ) from problem


async def misfit(answer: str, schema: Mapping[str, Any]) -> str | None:
    """Return a sentence on why an answer is not JSON that fits `schema`, or None if it fits.

    A check that takes long runs in its own thread, so that other agents are not blocked.
    """
    check = functools.partial(_problems, answer, _validator(json.dumps(schema)))
    try:
        with briefly():
            found = check()
    except NeedsTimeError:
        found = await anyio.to_thread.run_sync(check, limiter=anyio.CapacityLimiter(1))
    return f"the answer {answer!r:.200} does not fit output_schema: {'; '.join(found)}" if found else None


def _problems(answer: str, validator: Validator) -> list[str]:
    try:
        value = from_json(answer, allow_inf_nan=False)
    except ValueError as error:
        return [f"$: not valid JSON: {error}"]
    return problems(validator, value)


@functools.lru_cache(maxsize=64)
def _validator(schema: str) -> Validator:
    return Validator(json.loads(schema))
