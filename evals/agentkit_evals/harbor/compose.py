"""Services of a task: `environment/docker-compose.yaml`, read strictly.

The service `main` is the agent's sandbox; the file may leave it out. Keys of Compose that are not here are refused by
name: build arguments and others. All services are in one network and reach each other by their names, so ports are not
published. A named volume belongs to one service, and lives as long as it.
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from agentkit.environment_config import BuildConfig
from agentkit.errors import TaskFileError
from agentkit.harbor import Condition, ServiceConfig, ServiceHealthcheck
from agentkit.strict import Shell, Strict
from agentkit.task import load_yaml
from agentkit_engine.untrusted import describe
from agentkit_environments.folder import folder_hash
from agentkit_evals.harbor.sandbox import TEMPLATE

MAIN = "main"
WAITING = (["sleep", "infinity"], ["sh", "-c", "sleep infinity"], ["tail", "-f", "/dev/null"])
"""Commands of `main` that only keep its container, which the sandbox does by itself."""
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _literal(text: str) -> str:
    if "$" in text.replace("$$", ""):
        raise ValueError(f"{text!r:.80}: a variable is supported only as a whole value of `environment`")
    return text.replace("$$", "$")


def _value(value: str | int | float) -> str:
    text = str(value)
    return text if TEMPLATE.fullmatch(text) else _literal(text)


def _seconds(given: Any) -> Any:
    if not isinstance(given, str) or not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(us|ms|s|m|h)){1,5}", given):
        raise ValueError(f'{given!r:.40} is not a duration; write numbers with units, such as "10s" or "1m30s"')
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)(us|ms|s|m|h)", given))


def _pairs(entries: Any) -> Any:
    """Return a list of `NAME=VALUE` as a mapping."""
    if not isinstance(entries, list):
        return entries
    if bare := [entry for entry in entries if not isinstance(entry, str) or "=" not in entry]:
        raise ValueError(f"{bare[0]!r:.80}: expected NAME=VALUE")
    return dict(entry.split("=", 1) for entry in entries)


def _dependencies(names: Any) -> Any:
    return {str(name): {"condition": "service_started"} for name in names} if isinstance(names, list) else names


def _words(command: Any) -> Any:
    return shlex.split(command) if isinstance(command, str) else command


def _names(networks: Any) -> Any:
    """Return a mapping of names to nothing as a list."""
    if not isinstance(networks, dict):
        return networks
    if given := [name for name, options in networks.items() if options]:
        raise ValueError(f"{given[0]!r:.80}: options of a network are not supported")
    return [*networks]


def _folder(build: Any) -> Any:
    return {"context": build} if isinstance(build, str) else build


Text = Annotated[Shell, AfterValidator(_literal)]
Command = Annotated[list[Text], BeforeValidator(_words)]
Duration = Annotated[float, BeforeValidator(_seconds)]
Value = Annotated[str | int | float, AfterValidator(_value)]


class Build(Strict):
    """A folder with a Dockerfile."""

    context: Text = "."
    dockerfile: str = Field(default="Dockerfile", pattern=r"^(\./)?Dockerfile$")


class Healthcheck(Strict):
    """A command that runs in the service's container."""

    test: Text | list[Text]
    interval: Duration | None = None
    timeout: Duration | None = None
    start_period: Duration | None = None
    retries: int | None = None


class Dependency(Strict):
    """State that a service must have before another one starts."""

    condition: Condition = "service_started"


class Service(Strict):
    """One service."""

    image: Text | None = None
    build: Annotated[Build | None, BeforeValidator(_folder)] = None
    command: Command | None = None
    entrypoint: Command | None = None
    environment: Annotated[dict[str, Value], BeforeValidator(_pairs)] = Field(default_factory=dict)
    healthcheck: Healthcheck | None = None
    depends_on: Annotated[dict[str, Dependency], BeforeValidator(_dependencies)] = Field(default_factory=dict)
    volumes: list[Text] = Field(default_factory=list)
    networks: Annotated[list[str], BeforeValidator(_names)] = Field(default_factory=lambda: ["default"])
    expose: list[str | int] = Field(default_factory=list)
    ports: list[str | int] = Field(default_factory=list)


class Volume(Strict):
    """A named volume."""

    driver: Literal["local"] = "local"


class Network(Strict):
    """A named network."""

    driver: Literal["bridge"] = "bridge"


class ComposeFile(Strict):
    """The whole file."""

    version: str | float | None = None
    volumes: dict[str, Volume | None] = Field(default_factory=dict)
    networks: dict[str, Network | None] = Field(default_factory=dict)
    services: dict[str, Service] = Field(min_length=1)


class Compose:
    """The services of a task as they are run.

    Attributes:
        services: the services except `main`, each after those that it depends on.
        wait_for: what `main` waits for.
        env: the environment variables of `main`.
        image: the image of `main`; None if the file does not name one.
    """

    def __init__(self, path: Path) -> None:
        """Read a file. Raises TaskFileError; the message has the file, and the service or the line."""
        self._path, self._folder = path, path.parent
        file = load_yaml(path, ComposeFile)
        found, self._volumes = file.services, dict.fromkeys(file.volumes, "")
        main = found.get(MAIN, Service())
        self._check_networks(file)
        self._check_main(main)
        for name, service in found.items():
            for other in service.depends_on:
                if other not in found or other == MAIN:
                    raise self._error(name, f"depends_on: {other!r} is not one of the other services")
        try:
            order = TopologicalSorter({name: [*found[name].depends_on] for name in found}).static_order()
            self.services = [self._service(name, found[name]) for name in order if name != MAIN]
        except CycleError as exc:
            raise TaskFileError(f"{path}:1: services depend on each other: {' > '.join(exc.args[1])}") from exc
        except OSError as exc:
            raise TaskFileError(f"{exc.filename or path}: cannot be read: {exc.strerror}") from exc
        self.wait_for = _conditions(main)
        self.env = {name: str(value) for name, value in main.environment.items()}
        self.image = main.image

    def _check_networks(self, file: ComposeFile) -> None:
        """Check that the services that name networks share one with each other and with those that name none."""
        for name, service in file.services.items():
            if unknown := [each for each in service.networks if each not in (*file.networks, "default")]:
                raise self._error(name, f"networks: {unknown[0]!r:.80} is not in `networks` of the file")
        every = [
            set(service.networks) for service in (file.services | {MAIN: file.services.get(MAIN, Service())}).values()
        ]
        if not set.intersection(*every):
            raise TaskFileError(
                f"{self._path}:1: networks: services that share no network are not supported; give all one"
            )

    def _check_main(self, main: Service) -> None:
        if main.build is not None and main.build.context not in (".", "./"):
            raise self._error(MAIN, f"build: only the folder of this file is supported, got {main.build.context!r}")
        if main.command is not None and main.command not in WAITING:
            raise self._error(MAIN, f"command: only one that waits is supported, such as {' '.join(WAITING[0])}")
        for key in ("entrypoint", "healthcheck", "volumes"):
            if getattr(main, key):
                raise self._error(MAIN, f"{key}: not supported; use the Dockerfile, or task.toml")

    def _service(self, name: str, service: Service) -> ServiceConfig:
        if (service.image is None) == (service.build is None):
            raise self._error(name, "give either image or build")
        check = service.healthcheck
        test = check.test if check else None
        try:
            return ServiceConfig(
                name=name,
                image=service.image,
                build=None if service.build is None else self._build(name, service.build),
                command=service.command,
                entrypoint=service.entrypoint,
                env={key: str(value) for key, value in service.environment.items()},
                healthcheck=None
                if check is None
                else ServiceHealthcheck(
                    test=["CMD-SHELL", test] if isinstance(test, str) else test or [],
                    interval_s=check.interval,
                    timeout_s=check.timeout,
                    start_period_s=check.start_period,
                    retries=check.retries,
                ),
                depends_on=_conditions(service),
                files=dict(self._file(name, volume) for volume in service.volumes if volume[:1] in "./~$"),
                volumes=[self._volume(name, volume) for volume in service.volumes if volume[:1] not in "./~$"],
            )
        except ValidationError as exc:
            raise self._error(name, describe(exc)) from exc

    def _build(self, name: str, build: Build) -> BuildConfig:
        folder = self._inside(name, "build", build.context)
        if not (folder / "Dockerfile").is_file():
            raise self._error(name, f"build: {folder / 'Dockerfile'} is missing")
        return BuildConfig(folder=str(folder), sha256=folder_hash(folder))

    def _file(self, name: str, volume: str) -> tuple[str, str]:
        """Return the path in the container, and the one below the task's folder, of `./PATH:/TARGET[:ro]`."""
        source, *rest = volume.split(":")
        if not source.startswith("./") or not 1 <= len(rest) <= 2 or rest[1:] not in ([], ["ro"], ["rw"]):
            raise self._error(name, f"volumes: {volume!r}: expected ./PATH:/TARGET, a file or folder beside this file")
        target = posixpath.normpath(rest[0])
        self._check_target(name, volume, target)
        return target, self._inside(name, "volumes", source).relative_to(self._folder.parent).as_posix()

    def _volume(self, name: str, volume: str) -> str:
        """Return the path in the container of `NAME:/TARGET[:rw]`."""
        source, *rest = volume.split(":")
        if source not in self._volumes or not 1 <= len(rest) <= 2 or rest[1:] not in ([], ["rw"]):
            raise self._error(name, f"volumes: {volume!r}: expected ./PATH:/TARGET, or NAME:/TARGET of a named volume")
        if self._volumes[source] not in ("", name):
            raise self._error(name, f"volumes: {source!r} is one of {self._volumes[source]}; sharing is not supported")
        self._volumes[source], target = name, posixpath.normpath(rest[0])
        self._check_target(name, volume, target)
        return target

    def _check_target(self, name: str, volume: str, target: str) -> None:
        if not re.fullmatch(r"/[^/].*", target):
            raise self._error(name, f"volumes: {volume!r}: {target!r} is not the absolute path of a file or folder")

    def _inside(self, name: str, key: str, place: str) -> Path:
        path = Path(os.path.realpath(self._folder / place))  # Path.resolve raises RuntimeError for a loop of links
        if not path.is_relative_to(self._folder):
            raise self._error(name, f"{key}: {place!r} lies outside {self._folder}")
        if not path.exists():
            raise self._error(name, f"{key}: {path} is missing")
        return path

    def _error(self, service: str, problem: str) -> TaskFileError:
        return TaskFileError(f"{self._path}:1: services.{service}: {problem}")


def _conditions(service: Service) -> dict[str, Condition]:
    return {name: dependency.condition for name, dependency in service.depends_on.items()}
