"""Wrong specifications of a sandbox are refused when they are made, with what was given and what is possible."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agentkit_environments import EnvironmentSpec, ResourceLimits, open_environment


@pytest.mark.parametrize("name", ["memory_mib", "processes", "cpus", "file_size_mib", "open_files", "disk_mib"])
@pytest.mark.parametrize(
    ("value", "error"),
    [("1", TypeError), (True, TypeError), (None, TypeError), (0, ValueError), (-1, ValueError)],
)
def test_a_limit_is_a_positive_number(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"limits\.{name} must be"):
        ResourceLimits(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_cpus_are_finite_and_other_limits_whole(value: float) -> None:
    with pytest.raises(ValueError, match="cpus must be positive and finite"):
        ResourceLimits(cpus=value)
    with pytest.raises(TypeError, match="memory_mib must be a whole number"):
        ResourceLimits(memory_mib=value)  # type: ignore[arg-type]
    assert ResourceLimits(cpus=1).cpus == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"network": "public"}, TypeError, "network must be a Network such as"),
        ({"image": 5}, TypeError, "image must be the name of a Docker image or None, got 5"),
        ({"workdir_from_image": 1, "image": "x"}, TypeError, "workdir_from_image must be True or False, got 1"),
        ({"workdir_from_image": True}, ValueError, "workdir_from_image needs an image"),
        ({"as_image": True}, ValueError, "as_image needs an image"),
        ({"as_image": True, "image": "x", "workdir": "app"}, ValueError, "workdir must be an absolute path, or empty"),
        ({"as_image": True, "image": "x", "user": "a b"}, ValueError, "user must be a user name"),
        ({"user": "root"}, ValueError, "user 'root' needs as_image; other sandboxes have one user"),
        ({"workdir": 5}, TypeError, "workdir must be an absolute path, got 5"),
        ({"workdir": "work"}, ValueError, "workdir must be the absolute path of a dedicated directory, got 'work'"),
        ({"env": ["A=B"]}, TypeError, "env must be a mapping"),
        ({"env": {"A": 1}}, TypeError, "env must map texts to texts, got 'A': 1"),
        ({"env": {"A=B": "1"}}, ValueError, "env must have plain names"),
        ({"limits": {"memory_mib": 1}}, TypeError, "limits must be a ResourceLimits"),
    ],
)
def test_a_wrong_field_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EnvironmentSpec(**arguments)


@pytest.mark.anyio
async def test_opening_takes_a_specification_and_a_backend_that_exists() -> None:
    with pytest.raises(TypeError, match="spec must be an EnvironmentSpec"):
        await open_environment({"image": "x"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of auto, docker, process, unsafe-local, got 'podman'"):
        await open_environment(backend="podman")  # type: ignore[arg-type]
