"""Answers as JSON: is a schema one, and does an answer fit it?

A grammar enforces most of a schema while the answer is written, but not every keyword, not in what a tool such as
`submit` was given, and not for every model. So an answer is checked once more, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from agentkit_tools.schema import problems, schema_problem


def check_answer_schema(schema: Mapping[str, Any]) -> None:
    """Refuse what is no JSON schema (2020-12), or refers to what lies outside it: nothing is ever fetched.

    Raises:
        ValueError: naming the place in the schema.
    """
    problem = schema_problem(schema) if isinstance(schema, Mapping) else f"given {schema!r:.200}"
    if problem is not None:
        raise ValueError(
            f"answer_schema: {problem}; expected a JSON schema, of a pydantic model for one `Model.model_json_schema()`"
        )


def misfit(answer: str, schema: Mapping[str, Any]) -> str | None:
    """Why an answer is not JSON that fits `schema`, in a sentence; None when it is."""
    try:
        found = problems(schema, from_json(answer, allow_inf_nan=False))
    except ValueError as error:
        found = [f"$: not valid JSON: {error}"]
    except (RecursionError, OverflowError) as error:
        found = [f"$: cannot be checked: {error}"]
    return f"the answer {answer!r:.200} does not fit answer_schema: {'; '.join(found)}" if found else None
