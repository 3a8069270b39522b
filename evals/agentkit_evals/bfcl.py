"""Tasks from rows of the Berkeley Function Calling Leaderboard (BFCL), versions 3 and 4, single-turn categories.

    {"id": "simple_python_0", "question": [[{"role": "user", "content": "..."}]], "function": [{"name": ..., ...}]}

The ground truth is in the row (`ground_truth`) or, as in BFCL's repository, in the file of the same name in the folder
`possible_answer` beside the file. The model gets one turn. Its calls do not run; they are compared with the ground
truth (`calls.py` has the rules).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agentkit.task import Task
from agentkit_evals.dataset import Row, read_rows

NO_CALL = ("irrelevance", "live_irrelevance")
ANY_CALL = ("live_relevance",)
BY_TRUTH = (
    *("simple", "simple_python", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
CATEGORIES = (*BY_TRUTH, *NO_CALL, *ANY_CALL)
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
"""JSON Schema's names for BFCL's types, where they differ. None stands for values of any type."""


def is_bfcl(data: dict[str, Any]) -> bool:
    """Return whether a row is a BFCL row."""
    return {"id", "question"} <= {*data}


def read_bfcl(path: Path) -> Iterator[tuple[Task, str]]:
    """Yield a task and its category for each row.

    Raises:
        TaskFileError: a row is malformed, of another category, or has no ground truth. The message has file and line.
    """
    answers = _answers(path.parent / "possible_answer" / path.name)
    for row in read_rows(path):
        category = _category(row)
        expected: Any = [] if category in NO_CALL else "any"
        if category in BY_TRUTH:
            truth = answers.get(row.data["id"], row)
            if "ground_truth" not in truth.data:
                raise row.error(
                    f"no ground truth: expected the key ground_truth, or a row with the id {row.data['id']} in "
                    f"{path.parent / 'possible_answer' / path.name}"
                )
            expected = _expected(truth)
        system, instruction = _prompt(row)
        yield (
            row.task(
                id=row.data["id"],
                instruction=instruction,
                system=system,
                tools=[_tool(row, function) for function in row.get("function", list, "a list of functions")],
                verifier={"calls": expected},
                metadata={"family": category},
            ),
            category,
        )


def _answers(path: Path) -> dict[str, Row]:
    return {row.get("id", str, "a text"): row for row in read_rows(path)} if path.is_file() else {}


def _category(row: Row) -> str:
    name = row.get("id", str, "a text such as simple_python_0")
    found = re.fullmatch(r"(.+?)_\d+(-\d+-\d+)?", name)
    category = found[1] if found else name
    if category not in CATEGORIES:
        raise row.error(
            f"BFCL category {category} is not supported: only single-turn categories that compare calls in Python are "
            f"({', '.join(CATEGORIES)}); leave the other rows out"
        )
    return category


def _prompt(row: Row) -> tuple[str, str]:
    """Return the system prompt, which may be empty, and the user's message.

    A few questions have several messages. They become one message, in which the assistant's messages are marked.
    """
    turns = row.get("question", list, "a list with one turn, which is a list of messages")
    messages = turns[0] if turns and isinstance(turns[0], list) else turns
    if (turns and isinstance(turns[0], list) and len(turns) != 1) or not messages:
        raise row.error(f"question: {len(turns)} turns, expected one list of messages")
    system: list[str] = []
    said: list[str] = []
    for message in messages:
        match message:
            case {"role": "system", "content": str() as text}:
                system.append(text)
            case {"role": "user", "content": str() as text}:
                said.append(text)
            case {"role": "assistant", "content": str() as text}:
                said.append(f"[You answered: {text}]")
            case _:
                raise row.error(f"question: expected messages with role (system, user, assistant) and content, "
                                f"got {str(message)[:100]!r}")  # fmt: skip
    return "\n\n".join(system), "\n\n".join(said)


def _tool(row: Row, function: Any) -> dict[str, Any]:
    match function:
        case {"name": str() as name, "parameters": dict() as parameters}:
            description = function.get("description", "")
            return {"name": plain_name(name), "description": description, "parameters": _schema(parameters)}
    raise row.error(f"function: expected name, description and parameters, got {str(function)[:100]!r}")


def plain_name(name: str) -> str:
    """Return a function's name without dots, which no API accepts in a name."""
    return name.replace(".", "_")


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return BFCL's description of a value as a JSON schema."""
    plain = dict(schema)
    if isinstance(kind := plain.get("type"), str):
        plain["type"] = TYPES.get(kind, kind)
        if plain["type"] is None:
            del plain["type"]
    for key in ("items", "additionalProperties"):
        if isinstance(plain.get(key), dict):
            plain[key] = _schema(plain[key])
    if isinstance(properties := plain.get("properties"), dict):
        plain["properties"] = {
            name: _schema(each) if isinstance(each, dict) else each for name, each in properties.items()
        }
    if isinstance(plain.get("optional"), bool):  # not a keyword of JSON Schema
        del plain["optional"]
    return plain


def _expected(row: Row) -> Sequence[dict[str, Any]]:
    truth = row.get("ground_truth", list, "a list of {function: {argument: [allowed values]}}")
    calls = []
    for call in truth:
        if not isinstance(call, dict):
            raise row.error(f"ground_truth: {str(call)[:100]!r}, expected {{function: {{argument: [allowed values]}}}}")
        calls.append({plain_name(str(name)): arguments for name, arguments in call.items()})
    return calls
