"""Answers as JSON: is a schema one, and does an answer fit it?

A grammar enforces most of a schema while the answer is written, but not every keyword, not in what a tool such as
`submit` was given, and not for every model. So an answer is checked once more, whoever wrote it.
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
    """Refuse what is no JSON schema (2020-12), or refers to what lies outside it: nothing is ever fetched.

    Raises:
        ValueError: naming the place in the schema.
    """
    try:
        if not isinstance(schema, Mapping):
            raise SchemaProblemError(f"given {schema!r:.200}")
        Validator(schema)
    except SchemaProblemError as problem:
        raise ValueError(
            f"output_schema: {problem}; expected a JSON schema, of a pydantic model for one `Model.model_json_schema()`"
        ) from problem


async def misfit(answer: str, schema: Mapping[str, Any]) -> str | None:
    """Why an answer is not JSON that fits `schema`, in a sentence; None when it is.

    A check that takes long runs in a thread of its own, so that other agents go on.
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
