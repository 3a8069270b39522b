"""A task: what to do, where, with which tools and limits, and how it is verified; read from strict YAML.

    id: count-errors
    instruction: How many lines of app.log contain ERROR? Submit the number.
    environment:
      files: {app.log: !file app.log}        # inline text, or a text file that lies beside the task
    verifier:
      command: test "$AGENTKIT_ANSWER" = 3   # exit status 0 is reward 1
    solution:
      command: grep -c ERROR app.log         # what it prints is the answer

An unknown key, a wrong type, a duplicate key or broken YAML is a `TaskFileError` that names file and line.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from agentkit.errors import TaskFileError, TaskSetupError
from agentkit_environments import Environment, EnvironmentSpec, Limits
from agentkit_tools import BUILTINS, CommandTool, Tool, ToolDefinitionError


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
        raise ValueError(f"{path!r} must be a relative path without '..'")
    return path


def _built_in(name: str) -> str:
    if name not in BUILTINS:
        raise ValueError(f'unknown tool "{name}"; built in: {", ".join(BUILTINS)}')
    return name


RelativePath = Annotated[str, AfterValidator(_inside)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]


class Strict(BaseModel):
    """The base of everything read from a file: no unknown keys, no coercion, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LimitsConfig(Strict):
    """What one sandbox may use; the same fields and defaults as `agentkit_environments.Limits`."""

    memory_mib: int = Field(default=1024, ge=16)
    processes: int = Field(default=256, ge=1)
    cpus: float = Field(default=1.0, gt=0)
    file_size_mib: int = Field(default=256, ge=1)
    open_files: int = Field(default=1024, ge=16)
    disk_mib: int = Field(default=512, ge=1)


class EnvironmentConfig(Strict):
    """Where the agent works. `files` and `setup` are put in place, in this order, before the agent starts."""

    image: str | None = None
    backend: Literal["auto", "docker", "process"] = "auto"
    files: dict[RelativePath, str] = Field(default_factory=dict)  # path in the workdir -> text
    setup: list[str] = Field(default_factory=list)  # shell commands; a non-zero exit is a defect of the task
    workdir: str = "/workspace"
    network: Literal["none", "public"] = "none"
    env: dict[str, str] = Field(default_factory=dict)
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        self.spec()  # the environments room has its own rules, such as which workdirs are taken
        return self

    def spec(self) -> EnvironmentSpec:
        """This configuration as the environments room wants it."""
        return EnvironmentSpec(
            image=self.image,
            workdir=self.workdir,
            network=self.network,
            env=dict(self.env),
            limits=Limits(**self.limits.model_dump()),
        )


class ToolConfig(Strict):
    """A tool defined by a shell command, which gets the arguments as one JSON object on standard input."""

    name: str
    description: str
    parameters: dict[str, Any]  # a JSON schema of an object
    command: str

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        try:
            self.build()
        except ToolDefinitionError as exc:
            raise ValueError(str(exc)) from exc
        return self

    def build(self) -> CommandTool:
        """The tool itself."""
        return CommandTool(self.name, self.description, self.parameters, self.command)


class AgentConfig(Strict):
    """How the agent runs on this task."""

    thinking: Literal["always", "never", "auto"] = "auto"
    effort: Literal["none", "low", "high", "max"] = "high"
    max_turns: int = Field(default=32, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)  # sampled tokens over the whole run
    timeout_s: float = Field(default=600.0, gt=0)


class VerifierConfig(Strict):
    """How the outcome is scored: `command` runs in the workdir of a fresh environment that holds the agent's files.

    It sees AGENTKIT_ANSWER (and AGENTKIT_ANSWER_FILE), AGENTKIT_VERIFIER_DIR with `files`, and AGENTKIT_REWARD_DIR.
    Exit status 0 is reward 1, or what it left there in `reward.txt` (a number) or `reward.json` (`{"reward": number}`);
    any other is 0.
    """

    command: str
    files: dict[RelativePath, str] = Field(default_factory=dict)
    timeout_s: float = Field(default=60.0, gt=0)


class SolutionConfig(Strict):
    """The oracle solution: a shell command in the workdir; its standard output, stripped, is the answer."""

    command: str
    timeout_s: float = Field(default=60.0, gt=0)


ToolEntry = Annotated[
    Annotated[str, AfterValidator(_built_in), Tag("<name>")] | Annotated[ToolConfig, Tag("<definition>")],
    Discriminator(lambda entry: "<definition>" if isinstance(entry, Mapping | ToolConfig) else "<name>"),
]


def _every_built_in() -> list[str | ToolConfig]:
    return [*BUILTINS]


class Task(Strict):
    """One job for an agent. `tools` holds names of built-in tools and definitions of command tools, in prompt order."""

    id: Identifier
    instruction: str = Field(min_length=1)
    system: str | None = None
    environment: EnvironmentConfig = EnvironmentConfig()
    tools: list[ToolEntry] = Field(default_factory=_every_built_in)
    agent: AgentConfig = AgentConfig()
    verifier: VerifierConfig | None = None  # None: the task can be run but not scored
    solution: SolutionConfig | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("tools")
    @classmethod
    def _distinct_tools(cls, entries: list[str | ToolConfig]) -> list[str | ToolConfig]:
        names = [entry if isinstance(entry, str) else entry.name for entry in entries]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tools named twice: {', '.join(sorted(twice))}")
        return entries

    def build_tools(self) -> list[Tool]:
        """The task's tools as the loop takes them, in the order of the file."""
        return [BUILTINS[entry] if isinstance(entry, str) else entry.build() for entry in self.tools]

    async def prepare(self, environment: Environment) -> None:
        """Put the task's files into a fresh environment's workdir and run its setup commands there, in order.

        Raises:
            TaskSetupError: a setup command exited with another status than 0; the text has its output.
            SandboxError: the sandbox itself failed.
        """
        for path, text in self.environment.files.items():
            await environment.write_file(path, text)
        for command in self.environment.setup:
            result = await environment.exec(command, timeout_s=self.agent.timeout_s)
            if result.exit_code != 0:
                why = "ran out of time" if result.timed_out else f"exited {result.exit_code}"
                output = (result.stderr or result.stdout).strip()[-2000:]
                raise TaskSetupError(f"task {self.id}: setup command {command!r} {why}: {output}")


M = TypeVar("M", bound=BaseModel)


def load_task(path: str | Path) -> Task:
    """Read one task from a YAML file.

    Raises:
        TaskFileError: the file is missing, is not YAML, or is not a task; with file, line and what is expected.
    """
    return load_yaml(path, Task)


def load_yaml(path: str | Path, model: type[M]) -> M:
    """Read a YAML file as `model`. A value `!file NAME` is the text of a file beside (or below) the YAML file.

    Raises:
        TaskFileError: one `FILE:LINE: problem` line for each thing wrong.
    """
    path = Path(path)
    loader: _Loader | None = None
    try:
        loader = _Loader(path)
        root = loader.get_single_node()
        data = loader.construct_document(root) if root is not None else None
    except OSError as exc:
        raise TaskFileError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise TaskFileError(f"{path}: not UTF-8 text: byte {exc.start} is {exc.object[exc.start]:#04x}") from exc
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        problem = " ".join(part for part in (exc.context, exc.problem) if part)
        raise TaskFileError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from exc
    except yaml.YAMLError as exc:
        raise TaskFileError(f"{path}:1: not valid YAML: {exc}") from exc
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(data, dict):
        raise TaskFileError(f"{path}:1: expected keys and values ({', '.join(model.model_fields)}), got {_kind(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        lines = sorted({(_line(root, error["loc"]), _explain(error, model)) for error in exc.errors()})
        raise TaskFileError("\n".join(f"{path}:{line}: {text}" for line, text in lines)) from exc


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads `!file NAME` from beside the YAML file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.read_text(encoding="utf-8"))
        self.folder = path.resolve().parent

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f'key "{key.value}" twice', key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_file(self, node: yaml.Node) -> str:
        problem = "expected !file NAME with a relative path"
        if isinstance(node, yaml.ScalarNode):
            target = (self.folder / str(node.value)).resolve()
            try:
                if target.is_relative_to(self.folder):
                    return target.read_text(encoding="utf-8")
                problem = f"!file {node.value} lies outside {self.folder}"
            except (OSError, UnicodeDecodeError) as exc:
                problem = f"!file {node.value} cannot be read as text: {exc}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor("!file", _Loader.construct_file)


def _line(node: yaml.Node | None, loc: Sequence[int | str]) -> int:
    """The line (from 1) of what `loc` points at: the key of a mapping's entry, the item of a list, or the nearest."""
    mark = node.start_mark if node is not None else None
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value == str(step):
                    mark, node = key.start_mark, value
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            mark = node.start_mark
    return mark.line + 1 if mark is not None else 1


def _explain(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    loc = [step for step in error["loc"] if step not in ("<name>", "<definition>", "[key]")]
    where = ".".join(str(step) for step in loc)
    if error["type"] == "extra_forbidden":
        known = list(_fields_at(model, error["loc"][:-1]))
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"expected one of {', '.join(known)}"
        return f'unknown key "{where}"; {hint}'
    if error["type"] == "missing":
        return f'missing key "{where}"'
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]}, got {_kind(error['input'])}"


def _kind(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"


def _fields_at(model: type[BaseModel], loc: Iterable[int | str]) -> Iterable[str]:
    """The keys that the model at `loc` knows."""
    for step in loc:
        if isinstance(step, str) and step in model.model_fields:
            inner = list(_models_in(model.model_fields[step].annotation))
            model = inner[0] if inner else model
    return model.model_fields


def _models_in(annotation: object) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
    else:
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)
