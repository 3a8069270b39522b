"""Services of a task: `environment/docker-compose.yaml`, or that of a directory of Terminal-Bench 1, read strictly.

The service `main` is the agent's sandbox; a file for Harbor may leave it out. Keys of Compose that are not here are
refused by name. All services are in one network and reach each other by their names, so ports are not
published. Volumes live as long as the services. One that `main` shares with a service is a volume of its sandbox.

Harbor and Terminal-Bench 1 set variables for such a file (`${MAIN_IMAGE_NAME}`, `${CPUS}`, ...), and tasks use all of
them. They are filled in here; other variables are read when the sandbox opens, and only in `environment`.
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from agentkit.environment_config import BuildConfig
from agentkit.errors import TaskFileError
from agentkit.harbor import HOST_NAME, Condition, Restart, ServiceConfig, ServiceHealthcheck, VolumeConfig
from agentkit.harbor import Healthcheck as MainHealthcheck
from agentkit.strict import Shell, Strict
from agentkit.task import load_yaml
from agentkit_engine.untrusted import describe, shorten
from agentkit_environments.folder import folder_hash
from agentkit_evals.harbor.config import Environment, mebibytes

N = TypeVar("N", int, float)

MAIN = "main"
MAIN_IMAGE = "the image of the Dockerfile"
LOGS = {"VERIFIER_LOGS": "/logs/verifier", "AGENT_LOGS": "/logs/agent", "ARTIFACTS": "/logs/artifacts"}
HARBOR = {
    "MAIN_IMAGE_NAME": MAIN_IMAGE,
    "CONTEXT_DIR": ".",
    "TEST_DIR": "/tests",
    "COMPOSE_PROJECT_NAME": "agentkit",
    "HARBOR_CONTAINER_NAME": MAIN,
    "NETWORK_MODE": "bridge",  # by the adapters of early versions; task.toml has the network
    **{f"ENV_{name}_PATH": path for name, path in LOGS.items()},
    **{f"HOST_{name}_PATH": f"/HOST_{name}_PATH" for name in LOGS},
}
"""Variables that Harbor sets for the file, besides `CPUS` and `MEMORY` of task.toml."""
TERMINAL_BENCH = {
    "T_BENCH_TASK_DOCKER_CLIENT_IMAGE_NAME": MAIN_IMAGE,
    "T_BENCH_TASK_DOCKER_CLIENT_CONTAINER_NAME": MAIN,
    "T_BENCH_TASK_DOCKER_NAME_PREFIX": "agentkit",
    "T_BENCH_TEST_DIR": "/tests",
    "T_BENCH_TASK_LOGS_PATH": "/T_BENCH_TASK_LOGS_PATH",
    "T_BENCH_CONTAINER_LOGS_PATH": "/logs",
    "T_BENCH_TASK_AGENT_LOGS_PATH": "/T_BENCH_TASK_AGENT_LOGS_PATH",
    "T_BENCH_CONTAINER_AGENT_LOGS_PATH": "/agent-logs",
}
"""Variables that Terminal-Bench 1 sets for the file."""
SET = HARBOR | TERMINAL_BENCH
LOG_MOUNTS = {
    *(f"/HOST_{name}_PATH:{path}" for name, path in LOGS.items()),
    "/T_BENCH_TASK_LOGS_PATH:/logs",
    "/T_BENCH_TASK_AGENT_LOGS_PATH:/agent-logs",
}
"""Folders of `main` that are there without being mounted."""
SCORING = ("/logs/verifier", "/solution", "/tests")
"""Folders of `main` that no service may write to."""
OF_THE_ENGINE = {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}
PLATFORMS = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NAME = "[A-Za-z_][A-Za-z0-9_]*"
_VARIABLE = re.compile(
    rf"\$(?:(?P<dollar>\$)|(?P<plain>{_NAME})|\{{(?:(?P<name>{_NAME})(?::?-(?P<default>[^{{}}]*)|:?\?[^{{}}]*)?\}})?)"
)


def _literal(text: str) -> str:
    """Return text with the variables in `SET` filled in. Raises ValueError if it has others."""

    def value(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name = match["plain"] or match["name"]
        if name is None:
            raise ValueError(f"{text!r:.80}: '${{' begins no variable; write $${{ for the characters themselves")
        found = SET.get(name)
        if found is None:
            raise ValueError(
                f"{text!r:.80}: a variable that Harbor does not set is supported only as a whole value of `environment`"
            )
        return found

    return _VARIABLE.sub(value, text)


def _value(value: str | int | float | None, name: str) -> str:
    """Return the value of a variable: a text, or a template `${NAME}` or `${NAME:-default}` that is filled in later."""
    text = f"${{{name}}}" if value is None else str(value)
    match = _VARIABLE.fullmatch(text)
    if match is None or match["dollar"] or (match["plain"] or match["name"] or "") in {"", *SET}:
        return _literal(text)
    default = "" if match["default"] is None else f":-{match['default']}"
    return f"${{{match['plain'] or match['name']}{default}}}"


def _seconds(given: Any) -> Any:
    if not isinstance(given, str) or not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(us|ms|s|m|h)){1,5}", given):
        raise ValueError(f'{given!r:.40} is not a duration; write numbers with units, such as "10s" or "1m30s"')
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)(us|ms|s|m|h)", given))


def _pairs(entries: Any) -> Any:
    """Return a list of `NAME=VALUE`, or `NAME` for a variable of this machine, as a mapping."""
    if not isinstance(entries, list):
        return entries
    if wrong := [entry for entry in entries if not isinstance(entry, str) or not entry.partition("=")[0]]:
        raise ValueError(f"{wrong[0]!r:.80}: expected NAME=VALUE or NAME")
    return {name: value if equals else None for name, equals, value in (each.partition("=") for each in entries)}


def _dependencies(names: Any) -> Any:
    return {str(name): {"condition": "service_started"} for name in names} if isinstance(names, list) else names


def _words(command: Any) -> Any:
    return shlex.split(command) if isinstance(command, str) else command


def _networks(names: Any) -> Any:
    return {str(name): None for name in names} if isinstance(names, list) else names


def _platform(name: str) -> str:
    own = PLATFORMS.get(os.uname().machine, "")
    if name not in (own, "linux"):
        raise ValueError(f"{name!r:.40} is not the platform of this machine, {own or os.uname().machine}")
    return name


def _mount(volume: Any) -> Any:
    """Return a volume in the long form as `SOURCE:TARGET[:ro]`."""
    match volume:
        case {"type": "bind" | "volume", "source": str(source), "target": str(target), **others} if (
            not others.keys() - {"type", "read_only"}
        ):
            return f"{source}:{target}" + (":ro" if others.get("read_only") else "")
        case dict():
            raise ValueError(f"{volume!r:.80}: expected SOURCE:TARGET, or type (bind, volume), source and target")
    return volume


def _unchanged(given: Any) -> Any:
    if given:
        raise ValueError("the rights of sandboxes and services cannot be changed, as that could let them out")
    return given


def _mode(name: Any) -> Any:
    return _literal(name) if isinstance(name, str) else name


def _host_name(text: str) -> str:
    if not re.fullmatch(HOST_NAME, text):
        raise ValueError(f"{text!r:.80} cannot be the name of a host")
    return text


def _folder(build: Any) -> Any:
    return {"context": build} if isinstance(build, str) else build


Text = Annotated[Shell, AfterValidator(_literal)]
Name = Annotated[Text, AfterValidator(_host_name)]
Command = Annotated[list[Text], BeforeValidator(_words)]
Duration = Annotated[float, BeforeValidator(_seconds)]
Value = str | int | float | None
Ignored = Any
"""The value of a key without an effect on what a sandbox is or does."""
Rights = Annotated[Any, BeforeValidator(_unchanged)]
"""The value of a key that changes the rights of a container, which may only be false or empty."""


class Build(Strict):
    """An image that is built from a folder of the task."""

    context: Text = "."
    dockerfile: Text = "Dockerfile"
    target: Text | None = None
    args: Annotated[dict[str, Value], BeforeValidator(_pairs)] = Field(default_factory=dict)

    @field_validator("args")
    @classmethod
    def _filled_in(cls, given: dict[str, Value]) -> dict[str, Value]:
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"{missing[0]!r:.80} has no value, and gets none from this machine; write NAME: value")
        return {name: _literal(str(value)) for name, value in given.items()}


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
    required: Literal[True] = True
    restart: Ignored = None


class Limits(Strict):
    """The most that a service may use."""

    cpus: str | float | None = None
    memory: str | int | None = None


class Resources(Strict):
    """Resources of a service."""

    limits: Limits = Limits()
    reservations: Ignored = None


class Deploy(Strict):
    """Resources of a service, and one copy of it."""

    resources: Resources = Resources()
    replicas: Literal[1] = 1


class Membership(Strict):
    """Other names of a service in a network."""

    aliases: list[Name] = Field(default_factory=list)


class Service(Strict):
    """One service."""

    image: Text | None = None
    build: Annotated[Build | None, BeforeValidator(_folder)] = None
    command: Command | None = None
    entrypoint: Command | None = None
    working_dir: Text | None = None
    user: Annotated[Text, BeforeValidator(str)] | None = None
    environment: Annotated[dict[str, Value], BeforeValidator(_pairs)] = Field(default_factory=dict)
    healthcheck: Healthcheck | None = None
    depends_on: Annotated[dict[str, Dependency], BeforeValidator(_dependencies)] = Field(default_factory=dict)
    volumes: list[Annotated[Text, BeforeValidator(_mount)]] = Field(default_factory=list)
    networks: Annotated[dict[str, Membership | None], BeforeValidator(_networks)] = {"default": None}  # noqa: RUF012
    deploy: Deploy = Deploy()
    cpus: str | float | None = None
    mem_limit: str | int | None = None
    restart: Restart = "no"
    platform: Annotated[str, AfterValidator(_platform)] | None = None
    container_name: Name | None = None
    network_mode: Annotated[Literal["bridge", "none"] | None, BeforeValidator(_mode)] = None
    security_opt: list[Literal["label=disable", "label:disable", "no-new-privileges:true"]] = Field(
        default_factory=list
    )  # which are no change
    privileged: Rights = None
    cap_add: Rights = None
    cap_drop: Rights = None
    devices: Rights = None
    expose: Ignored = None
    ports: Ignored = None
    hostname: Ignored = None
    init: Ignored = None
    labels: Ignored = None
    logging: Ignored = None
    pull_policy: Ignored = None
    stdin_open: Ignored = None
    stop_grace_period: Ignored = None
    stop_signal: Ignored = None
    tty: Ignored = None

    @field_validator("environment")
    @classmethod
    def _filled_in(cls, given: dict[str, Value]) -> dict[str, Value]:
        return {name: _value(value, name) for name, value in given.items()}


class Volume(Strict):
    """A named volume."""

    driver: Literal["local"] = "local"
    name: Ignored = None


class Network(Strict):
    """A named network."""

    driver: Literal["bridge"] = "bridge"
    labels: Ignored = None
    name: Ignored = None


class ComposeFile(Strict):
    """The whole file."""

    version: Ignored = None
    name: Ignored = None
    volumes: dict[str, Volume | None] = Field(default_factory=dict)
    networks: dict[str, Network | None] = Field(default_factory=dict)
    services: dict[str, Service] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _without_extensions(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if not str(key).startswith("x-")}


class Compose:
    """The services of a task as they are run.

    Attributes:
        services: the services except `main`, each after those that it depends on.
        wait_for: what `main` waits for.
        aliases: names under which services reach `main`, besides `main`.
        main: the settings of `main`; its `image` is None if it is built, and else an image to pull.
        build: how `main` is built; None if task.toml has an image, or there is nothing to build.
        files: path in `main` -> path below the task's folder, of files that are copied there before it starts.
        volumes: path in `main` -> volume, of those that it shares with a service.
        healthcheck: the health check of `main`.
        cpus, memory_mib: the limits of `main`; None if neither this file nor task.toml has any.
        has_network: False if `main` has no network, whatever task.toml says.
    """

    def __init__(
        self, path: Path, environment: Environment | None = None, *, root: Path | None = None, main_name: str = MAIN
    ) -> None:
        """Read a file.

        Args:
            path: The file.
            environment: The `environment` of task.toml.
            root: The task's folder; None for the one above that of the file.
            main_name: The name in the file of the agent's sandbox, which is `main` in the attributes.

        Raises:
            TaskFileError: the message has the file, and the service or the line.
        """
        self._path, self._folder, self._toml = path, path.parent, environment or Environment()
        self._root, self._main_name = root or path.parent.parent, main_name
        file = load_yaml(path, ComposeFile)
        found, self._names = file.services, file.volumes.keys()
        main = found.get(main_name, Service())
        if main.build is None and (self._folder / "Dockerfile").is_file():
            main = main.model_copy(update={"build": Build()})
        self._builds = {MAIN_IMAGE: main.build or Build()}  # by the name of the image
        for service in (*found.values(), main):
            if service.image and service.build:
                self._builds[service.image] = service.build
        self._check_networks(file)
        for name, service in found.items():
            for other in service.depends_on:
                if other not in found or other == main_name:
                    raise self._error(name, f"depends_on: {other!r} is not one of the other services")
        try:
            self.main, self.files, volumes = self._main(main)
            is_built = self._toml.docker_image is None
            self.build = self._build(main_name, main.build) if main.build is not None and is_built else None
            order = TopologicalSorter({name: [*found[name].depends_on] for name in found}).static_order()
            self.services = [self._service(name, found[name]) for name in order if name != main_name]
            of_services = {volume.name for service in self.services for volume in service.volumes.values()}
            self.volumes = {path: volume for path, volume in volumes.items() if volume.name in of_services}
            self.healthcheck = _before_start(main.healthcheck)
        except CycleError as exc:
            raise TaskFileError(f"{path}:1: services depend on each other: {' > '.join(exc.args[1])}") from exc
        except ValidationError as exc:
            raise self._error(main_name, describe(exc)) from exc
        except OSError as exc:
            raise TaskFileError(f"{exc.filename or path}: cannot be read: {exc.strerror}") from exc
        self.wait_for = _conditions(main)
        self.aliases = sorted({main_name, *_aliases(main)} - {MAIN})
        self.cpus, self.memory_mib = self._limits(main_name, main)
        self.has_network = main.network_mode != "none"

    @property
    def env(self) -> dict[str, str]:
        """The environment variables of `main`."""
        return _variables(self.main)

    @property
    def harbor_fields(self) -> dict[str, Any]:
        """The fields of `HarborConfig` that this file gives, except the health check, which task.toml may have."""
        return {
            "entrypoint": self.main.entrypoint,
            "command": self.main.command,
            "files": self.files,
            "volumes": self.volumes,
            "services": self.services,
            "wait_for": self.wait_for,
            "aliases": self.aliases,
        }

    def _check_networks(self, file: ComposeFile) -> None:
        """Check that the services that name networks share one with each other and with those that name none."""
        is_alone = file.services.keys() == {self._main_name}
        for name, service in file.services.items():
            if service.network_mode and not is_alone:
                raise self._error(
                    name, "network_mode: services share a private network; leave it out, or name networks"
                )
        for name, service in file.services.items():
            if unknown := [each for each in service.networks if each not in (*file.networks, "default")]:
                raise self._error(name, f"networks: {unknown[0]!r:.80} is not in `networks` of the file")
        every = [
            set(service.networks)
            for service in (file.services | {self._main_name: file.services.get(self._main_name, Service())}).values()
        ]
        if not set.intersection(*every):
            raise TaskFileError(
                f"{self._path}:1: networks: services that share no network are not supported; give all one"
            )

    def _main(self, main: Service) -> tuple[Service, dict[str, str], dict[str, VolumeConfig]]:
        """Return `main`, whose image is None if it is built, the files that are copied into it, and its volumes.

        As with Harbor, a name beside a build, or beside the Dockerfile, is that of the image that is built.
        """
        if main.working_dir is not None and not main.working_dir.startswith("/"):
            raise self._error(self._main_name, f"working_dir: {main.working_dir!r:.80} is not an absolute path")
        mounts = [each for each in main.volumes if each.removesuffix(":rw") not in LOG_MOUNTS]
        files, volumes = self._mounts(self._main_name, mounts)
        if taken := OF_THE_ENGINE & files.keys():
            raise self._error(self._main_name, f"volumes: {min(taken)} is written by the engine; it cannot be replaced")
        for path in volumes:
            if any(f"{each}/".startswith(f"{path}/") or f"{path}/".startswith(f"{each}/") for each in SCORING):
                raise self._error(
                    self._main_name, f"volumes: {path!r:.80}: a service could change how the agent is scored"
                )
        return main.model_copy(update={"image": None if main.image in self._builds else main.image}), files, volumes

    def _limits(self, name: str, service: Service) -> tuple[float | None, int | None]:
        """Return the CPUs and MiB of memory that a service may use; None if neither it nor task.toml gives any."""
        limits, toml = service.deploy.resources.limits, self._toml
        memory = toml.memory_mb or (mebibytes(toml.memory) if toml.memory else None)
        cpus = limits.cpus if service.cpus is None else service.cpus
        size = limits.memory if service.mem_limit is None else service.mem_limit
        try:
            return _limit(cpus, "CPUS", toml.cpus, _cpus), _limit(size, "MEMORY", memory, _mebibytes)
        except ValueError as exc:
            raise self._error(name, f"limits: {exc}") from exc

    def _service(self, name: str, service: Service) -> ServiceConfig:
        if service.image is None and service.build is None:
            raise self._error(name, "give either image or build")
        cpus, memory_mib = self._limits(name, service)
        files, volumes = self._mounts(name, service.volumes)
        build = service.build or self._builds.get(service.image or "")
        try:
            return ServiceConfig(
                name=name,
                image=service.image if build is None else None,
                build=None if build is None else self._build(name, build),
                command=service.command,
                entrypoint=service.entrypoint,
                user=service.user,
                workdir=service.working_dir,
                env=_variables(service),
                healthcheck=_healthcheck(service.healthcheck),
                depends_on=_conditions(service),
                aliases=_aliases(service),
                restart=service.restart,
                cpus=cpus,
                memory_mib=memory_mib,
                files=files,
                volumes=volumes,
            )
        except ValidationError as exc:
            raise self._error(name, describe(exc)) from exc

    def _build(self, name: str, build: Build) -> BuildConfig:
        folder = self._inside(name, "build", build.context, within=self._root)
        dockerfile = self._inside(name, "build", os.path.join(build.context, build.dockerfile), within=folder)
        return BuildConfig(
            folder=str(folder),
            sha256=folder_hash(folder),
            dockerfile=dockerfile.relative_to(folder).as_posix(),
            target=build.target,
            args={name: str(value) for name, value in build.args.items()},
            timeout_s=self._toml.build_timeout_sec,
        )

    def _mounts(self, name: str, volumes: list[str]) -> tuple[dict[str, str], dict[str, VolumeConfig]]:
        """Return the files of the task, by path in the container, and the volumes.

        Accepted are `./PATH:/TARGET`, `NAME:/TARGET` of a named volume, both with `:ro` or `:rw`, and `/TARGET`.
        """
        files, found = {}, {}
        for volume in volumes:
            source, *rest = volume.split(":") if ":" in volume else ("", volume)
            target = posixpath.normpath(rest[0])
            if not re.fullmatch(r"/[^/].*", target):
                raise self._error(name, f"volumes: {volume!r}: {target!r} is not the absolute path of a file or folder")
            is_known_mode = rest[1:] in ([], ["ro"], ["rw"])
            if is_known_mode and source.startswith("."):
                path = self._inside(name, "volumes", source, within=self._folder)
                files[target] = path.relative_to(self._root).as_posix()
            elif is_known_mode and source in ("", *self._names):
                found[target] = VolumeConfig(name=source or f"{name}:{target}", read_only=rest[1:] == ["ro"])
            else:
                raise self._error(
                    name,
                    f"volumes: {volume!r}: expected ./PATH:/TARGET, a file or folder beside this file, or NAME:/TARGET "
                    "of a named volume; other paths of this machine are not mounted",
                )
        return files, found

    def _inside(self, name: str, key: str, place: str, *, within: Path) -> Path:
        path = Path(os.path.realpath(self._folder / place))  # Path.resolve raises RuntimeError for a loop of links
        if not path.is_relative_to(within):
            raise self._error(name, f"{key}: {place!r} lies outside {within}")
        if not path.exists():
            raise self._error(name, f"{key}: {shorten(str(path), 400, quote=False)} is missing")
        return path

    def _error(self, service: str, problem: str) -> TaskFileError:
        return TaskFileError(f"{self._path}:1: services.{service}: {problem}")


def _conditions(service: Service) -> dict[str, Condition]:
    return {name: dependency.condition for name, dependency in service.depends_on.items()}


def _aliases(service: Service) -> list[str]:
    own = [service.container_name] if service.container_name else []
    return own + [each for use in service.networks.values() if use for each in use.aliases]


def _variables(service: Service) -> dict[str, str]:
    return {name: str(value) for name, value in service.environment.items()}


def _healthcheck(check: Healthcheck | None) -> ServiceHealthcheck | None:
    if check is None:
        return None
    return ServiceHealthcheck(
        test=["CMD-SHELL", check.test] if isinstance(check.test, str) else check.test,
        interval_s=check.interval,
        timeout_s=check.timeout,
        start_period_s=check.start_period,
        retries=check.retries,
    )


def _before_start(check: Healthcheck | None) -> MainHealthcheck | None:
    """Return a health check of `main` as one that must succeed before the agent starts, with the engine's defaults."""
    given = _healthcheck(check)
    if given is None or given.test[0] == "NONE":
        return None
    return MainHealthcheck(
        command=shlex.join(given.test[1:]) if given.test[0] == "CMD" else " ".join(given.test[1:]),
        interval_sec=given.interval_s or 30.0,
        timeout_sec=given.timeout_s or 30.0,
        start_period_sec=given.start_period_s or 0.0,
        retries=given.retries or 3,
    )


def _limit(given: str | float | None, variable: str, toml: N | None, read: Callable[[str], N]) -> N | None:
    """Return a limit that may be given as a variable of Harbor, which has the value of task.toml."""
    if given is None:
        return toml
    text = str(given)
    if (match := _VARIABLE.fullmatch(text)) and variable in (match["plain"], match["name"]):
        return toml if toml is not None or not match["default"] else read(match["default"])
    return read(text)


def _cpus(text: str) -> float:
    if not re.fullmatch(r"\d{1,5}(\.\d{1,9})?", text) or not float(text):
        raise ValueError(f"{text!r:.40} is not a number of CPUs")
    return float(text)


def _mebibytes(text: str) -> int:
    size = text.strip().lower().removesuffix("b")
    return max(16, int(size) >> 20 if size.isdecimal() else mebibytes(size))
