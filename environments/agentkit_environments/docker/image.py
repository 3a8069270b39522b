"""Images: building one from a folder with a Dockerfile, and running one as it was built.

A build is cached by the content of its folder and its settings: the image's tag is their hash. A Dockerfile with
features of BuildKit (here-documents, `RUN --mount`) is built by the engine's BuildKit, which takes the build context
like the engine's first builder does (`version=2` of POST /build).
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
import tarfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import requests
from docker.errors import DockerException, ImageNotFound, NotFound
from urllib3.exceptions import ReadTimeoutError

from agentkit_environments.docker.engine import OWNER_LABEL, connect, remove_container, require_image
from agentkit_environments.docker.progress import BuildProgress, needs_buildkit
from agentkit_environments.docker.users import home_of, resolve_user
from agentkit_environments.environment import EnvironmentSpec
from agentkit_environments.errors import ImageBuildError, SandboxUnavailableError
from agentkit_environments.folder import folder_hash, image_tag
from agentkit_environments.owner import owner_token

_building: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


def build_image(
    folder: str | Path,
    sha256: str,
    *,
    timeout_s: float,
    dockerfile: str = "Dockerfile",
    target: str | None = None,
    args: Mapping[str, str] | None = None,
) -> str:
    """Build the image of a folder, unless the engine has it, and return its name.

    Args:
        folder: A folder with a Dockerfile, which is the whole build context (less what `.dockerignore` lists).
        sha256: Its `folder_hash` when the task was read.
        timeout_s: Seconds for the build; up to twice as many if a step is silent.
        dockerfile: Path of the Dockerfile in the folder.
        target: The stage to build; None for the last one.
        args: Build arguments.

    Raises:
        ImageBuildError: the Dockerfile cannot be built; the message has the step, and the base image if it is missing.
        SandboxUnavailableError: no engine answers.
    """
    tag = image_tag(sha256, dockerfile=dockerfile, target=target, args=args)
    with _building[tag]:
        client = connect()
        try:
            try:
                client.images.get(tag)
            except ImageNotFound:
                if (found := folder_hash(folder)) != sha256:
                    raise ImageBuildError(
                        f"{folder} has changed since the task was read ({found[:12]} for {sha256[:12]}); run again"
                    ) from None
                with_buildkit = needs_buildkit(Path(folder, dockerfile))
                if with_buildkit:
                    client.api.params = {"version": "2"}  # the docker library has no argument for it
                lines = client.api.build(
                    path=str(folder),
                    tag=tag,
                    dockerfile=dockerfile,
                    target=target,
                    buildargs=dict(args or {}),
                    rm=True,
                    forcerm=True,
                    gzip=with_buildkit,  # it takes an archive with extended headers for a Dockerfile
                    decode=True,
                    timeout=math.ceil(timeout_s),  # without a word from the engine
                )
                _follow(lines, Path(folder, dockerfile), timeout_s)
        except (DockerException, requests.RequestException) as error:
            raise SandboxUnavailableError(f"the Docker engine cannot build {folder}: {error}") from error
        except OSError as error:
            raise ImageBuildError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
        finally:
            client.close()
    return tag


def _follow(lines: Any, dockerfile: Path, timeout_s: float) -> None:
    """Read the engine's lines about a build to their end. Raises ImageBuildError."""
    deadline = time.monotonic() + timeout_s
    progress = BuildProgress()
    try:
        for line in lines:
            progress.read(line)
            if "error" in line:
                raise ImageBuildError(_failure(dockerfile, progress, str(line["error"]).strip()))
            if time.monotonic() > deadline:
                raise TimeoutError
    except (TimeoutError, ReadTimeoutError):
        raise ImageBuildError(f"{dockerfile}, {progress.step}: the build took more than {timeout_s:g} s") from None
    finally:
        lines.close()  # the engine stops a build whose client is gone


def _failure(dockerfile: Path, progress: BuildProgress, error: str) -> str:
    place = f"{dockerfile}, {progress.step}"
    if base := re.search(r"(?:: FROM (?:--\S+ )*|load metadata for )(\S+)", progress.step):
        return (
            f"{place}: the base image {base[1]} is missing and could not be pulled: {error}. "
            f"Load it (`docker load`, `docker import`), or give the engine access to its registry"
        )
    if "unknown instruction" in error and needs_buildkit(dockerfile):
        error += (
            ". This engine knows no here-documents: use Docker 23 or newer, or begin the Dockerfile with "
            "`# syntax=docker/dockerfile:1`"
        )
    return "\n".join(filter(None, (f"{place}: {error}", progress.log.strip())))


def with_image_settings(spec: EnvironmentSpec) -> EnvironmentSpec:
    """Return the specification with the image's own work directory where it leaves that open, its user as `uid:gid`,
    and that user's home.

    Raises:
        SandboxUnavailableError: the image is missing and cannot be pulled, or has no such user.
    """
    client = connect()
    try:
        image = require_image(client, spec.image)
        config = image.attrs.get("Config") or {}
        passwd, group = user_files(str(image.id))
        uid, gid, *_ = resolve_user(spec.user or config.get("User") or "root", passwd, group)
    except ValueError as error:
        raise SandboxUnavailableError(f"image {spec.image}: {error}") from error
    finally:
        client.close()
    workdir = spec.workdir or config.get("WorkingDir") or "/"
    return replace(spec, workdir=workdir, user=f"{uid}:{gid}", env={"HOME": home_of(uid, passwd), **spec.env})


@functools.lru_cache(maxsize=256)
def user_files(image_id: str) -> tuple[str, str]:
    """Return the texts of an image's /etc/passwd and /etc/group; empty for a file that it does not have.

    Raises:
        SandboxUnavailableError: the engine fails.
    """
    client = connect()
    try:
        container = client.api.create_container(image_id, entrypoint=["/"], labels={OWNER_LABEL: owner_token()})["Id"]
        try:
            return _text(client, container, "/etc/passwd"), _text(client, container, "/etc/group")
        finally:
            remove_container(client, container)
    except (DockerException, requests.RequestException, tarfile.TarError) as error:
        raise SandboxUnavailableError(f"image {image_id} cannot be used: {error}") from error
    finally:
        client.close()


def _text(client: docker.DockerClient, container: str, path: str) -> str:
    try:
        chunks, _ = client.api.get_archive(container, path)
    except NotFound:
        return ""
    with tarfile.open(fileobj=io.BytesIO(b"".join(itertools.islice(chunks, 64)))) as archive:
        member = archive.next()
        file = archive.extractfile(member) if member is not None and member.isreg() else None
        return file.read(1 << 20).decode("utf-8", "replace") if file else ""


def image_config(image: str) -> dict[str, Any]:
    """Return the image's configuration, with the engine's names: `WorkingDir`, `User`, `Entrypoint`, `Env`.

    Raises:
        SandboxUnavailableError: the image is missing and cannot be pulled.
    """
    client = connect()
    try:
        require_image(client, image)
        config: dict[str, Any] = client.images.get(image).attrs.get("Config") or {}
        return config
    except (DockerException, requests.RequestException) as error:
        raise SandboxUnavailableError(f"image {image} cannot be used: {error}") from error
    finally:
        client.close()
