"""Sandboxes of Harbor tasks: their image is built, and `${NAME}` in their variables is filled in from this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import anyio.to_thread

from agentkit.environment_config import BuildConfig, EnvironmentConfig
from agentkit.errors import TaskSetupError
from agentkit_environments import EnvironmentSpec

TEMPLATE = re.compile(r"\$\{([^}:]+)(?::-(.*))?\}", re.DOTALL)


def filled_in(variables: Mapping[str, str]) -> dict[str, str]:
    """Return variables with values `${NAME}` and `${NAME:-default}` replaced by variables of this process.

    Raises:
        TaskSetupError: a variable without a default is not set. The message names it.
    """

    def value(name: str, text: str) -> str:
        match = TEMPLATE.fullmatch(text)
        if match is None:
            return text
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise TaskSetupError(f"the task's variable {name} is {text}, but {match[1]} is not set; set it")
        return found

    return {name: value(name, text) for name, text in variables.items()}


def specification(config: EnvironmentConfig) -> EnvironmentSpec:
    """Return the specification to open, once the image is built.

    Raises:
        TaskSetupError: a variable is not set.
    """
    spec = config.spec()
    return replace(spec, env=filled_in(spec.env)) if config.as_image else spec


async def settled(config: EnvironmentConfig) -> EnvironmentSpec:
    """Build the image of a sandbox that has one to build, and return the specification to open.

    Raises:
        TaskSetupError: a variable is not set.
        ImageBuildError: the image cannot be built.
        SandboxUnavailableError: no Docker engine answers.
    """
    if config.as_image and config.build is not None:
        await built(config.build)
    return specification(config)


async def built(build: BuildConfig) -> str:
    """Build an image, unless the engine has it, and return its name.

    Raises:
        ImageBuildError: the image cannot be built.
        SandboxUnavailableError: no Docker engine answers.
    """
    from agentkit_environments.docker import build_image  # the docker library takes long to import

    return await anyio.to_thread.run_sync(partial(build_image, **build.model_dump()))
