"""Checks of files against harbor's models, with harbor and without it."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

FOLDER = Path(__file__).parent
PYTHON = os.environ.get("AGENTKIT_HARBOR_PYTHON", "")
"""A Python 3.12 with the package `harbor`."""
needs_harbor = pytest.mark.skipif(not PYTHON, reason="AGENTKIT_HARBOR_PYTHON names no Python with the package harbor")

TASK_CONFIG: dict[str, Any] = json.loads((FOLDER / "task_config.json").read_text())
TRAJECTORY: dict[str, Any] = json.loads((FOLDER / "trajectory.json").read_text())
ACCEPTED = frozenset(json.loads((FOLDER / "accepted.json").read_text()))
"""Files of the grid that harbor accepts."""
AGENT_ONLY = ("model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics")


def run_harbor(code: str, stdin: bytes) -> bytes:
    """Run code in the Python that has harbor, and return its output. Raises ValueError if it fails."""
    done = subprocess.run([PYTHON, "-c", code], input=stdin, capture_output=True, check=False)
    if done.returncode != 0:
        raise ValueError(done.stderr.decode()[-2000:])
    return done.stdout


def check_task_config(text: str) -> None:
    """Raise ValueError if a file `task.toml` does not fit harbor's schema, which has none of its validators."""
    _check(TASK_CONFIG, _normalized(tomllib.loads(text)))


def check_trajectory(data: bytes) -> None:
    """Raise ValueError for an ATIF document that harbor refuses."""
    document = json.loads(data)
    _check(TRAJECTORY, document)
    for problem in _problems(document):
        raise ValueError(problem)


def check_trajectory_with_harbor(data: bytes) -> None:
    """Do the same with harbor itself."""
    run_harbor(
        "import sys; from harbor.models.trajectories import Trajectory; "
        "Trajectory.model_validate_json(sys.stdin.buffer.read())",
        data,
    )


def _check(schema: dict[str, Any], document: Any) -> None:
    error = best_match(Draft202012Validator(schema).iter_errors(document))
    if error is not None:
        raise ValueError(f"{error.json_path}: {error.message}")


def _normalized(value: Any, key: str = "") -> Any:
    """Return a file `task.toml` as harbor's `normalize_os` and `normalize_transport` leave it."""
    if isinstance(value, dict):
        return {name: _normalized(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_normalized(each) for each in value]
    if key == "os" and isinstance(value, str):
        return value.lower()
    return "streamable-http" if (key, value) == ("transport", "http") else value


def _problems(document: dict[str, Any]) -> Iterator[str]:
    """Yield what the validators of harbor's models, each named here, refuse in a document that fits the schema."""
    embedded = document.get("subagent_trajectories") or []
    for child in embedded:
        yield from _problems(child)
    names = [child.get("trajectory_id") for child in embedded]
    if None in names or len(names) != len(set(names)):
        yield f"Trajectory.validate_embedded_subagent_trajectory_ids: {names}"
    for number, step in enumerate(document["steps"], start=1):
        if step["step_id"] != number:
            yield f"Trajectory.validate_step_ids: {step['step_id']} is not {number}"
        yield from _problems_of_step(step)


def _problems_of_step(step: dict[str, Any]) -> Iterator[str]:
    if (timestamp := step.get("timestamp")) is not None:
        try:
            datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
        except ValueError as error:
            yield f"Step.validate_timestamp: {error}"
    given = {name for name, value in step.items() if value is not None}
    if step["source"] != "agent" and given.intersection(AGENT_ONLY):
        yield f"Step.validate_agent_only_fields: {given.intersection(AGENT_ONLY)}"
    if step["source"] == "agent" and step.get("llm_call_count") == 0 and given & {"metrics", "reasoning_content"}:
        yield "Step.validate_llm_call_count_zero_fields"
    calls = {call["tool_call_id"] for call in step.get("tool_calls") or []}
    results = (step.get("observation") or {}).get("results", [])
    contents = [step["message"]]
    for result in results:
        if (source := result.get("source_call_id")) is not None and source not in calls:
            yield f"Trajectory.validate_tool_call_references: {source}"
        for reference in result.get("subagent_trajectory_ref") or []:
            if reference.get("trajectory_id") is None and reference.get("trajectory_path") is None:
                yield f"SubagentTrajectoryRef.validate_is_resolvable: {reference}"
        contents.append(result.get("content"))
    for part in (part for content in contents if isinstance(content, list) for part in content):
        has_text, source = part.get("text") is not None, part.get("source")
        fits = has_text and source is None
        if part["type"] != "text":
            fits = not has_text and source is not None and source["media_type"].startswith(f"{part['type']}/")
        if not fits:
            yield f"ContentPart.validate_content_type: {part}"
