"""A task: instruction, environment, tools, limits and verifier, read from strict YAML.

    id: count-errors
    instruction: How many lines of app.log contain ERROR? Submit the number.
    environment:
      files: {app.log: !file app.log}        # inline text, or a text file beside the task
    verifier:
      command: test "$AGENTKIT_ANSWER" = 3   # exit status 0 is reward 1
    solution:
      command: grep -c ERROR app.log         # its output is the answer

Unknown keys, wrong types, duplicate keys and broken YAML raise a `TaskFileError` with file and line. Values are those
of JSON, so a date is text. File sizes, the expansion of aliases and the nesting depth are limited.
"""

from __future__ import annotations

import difflib
import errno
import math
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from agentkit.environment_config import BuildConfig as BuildConfig
from agentkit.environment_config import EnvironmentConfig as EnvironmentConfig
from agentkit.environment_config import LimitsConfig as LimitsConfig
from agentkit.errors import TaskFileError, TaskSetupError
from agentkit.harbor import HarborConfig as HarborConfig
from agentkit.strict import MAX_TIMEOUT_S as MAX_TIMEOUT_S
from agentkit.strict import Identifier as Identifier
from agentkit.strict import RelativePath as RelativePath
from agentkit.strict import Shell as Shell
from agentkit.strict import Strict as Strict
from agentkit_engine.untrusted import read_regular, shorten
from agentkit_environments import Environment
from agentkit_tools import BUILTINS, NAMED_TOOLS, CommandTool, DeclaredTool, Tool, ToolDefinitionError
from agentkit_tools.validation import SchemaProblemError, Validator

MAX_YAML_BYTES = 1 << 19
MAX_YAML_NODES = 10_000
MAX_YAML_DEPTH = 50
MAX_PROBLEMS = 50
"""Maximum number of problems that one error lists."""
MAX_FILE_BYTES = 16 << 20
"""Maximum total size of the files that one YAML file includes with `!file`."""


def _built_in(name: str) -> str:
    if name not in NAMED_TOOLS:
        raise ValueError(f'unknown tool "{name}"; built in: {", ".join(NAMED_TOOLS)}')
    return name


class ToolConfig(Strict):
    """A tool defined by a shell command, which reads the arguments as one JSON object from standard input."""

    name: str
    description: str
    parameters: dict[str, Any]  # JSON schema of an object
    command: Shell | None = None  # None: the tool is not run, in a task whose verifier scores the calls

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        try:
            self.build()
        except ToolDefinitionError as exc:
            raise ValueError(str(exc)) from exc
        return self

    def build(self) -> Tool:
        """Return the tool."""
        if self.command is None:
            return DeclaredTool(self.name, self.description, self.parameters)
        return CommandTool(self.name, self.description, self.parameters, self.command)


class AgentConfig(Strict):
    """Agent settings for this task."""

    thinking: Literal["always", "never", "auto"] = "auto"
    effort: Literal["none", "low", "high", "max"] = "high"
    max_turns: int = Field(default=32, ge=1, le=1 << 31)
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 31)  # sampled tokens over the whole run
    timeout_s: float = Field(default=600.0, gt=0, le=MAX_TIMEOUT_S)
    compact_at_tokens: int | None = Field(default=None, ge=1, le=1 << 31)  # `Compaction.at_tokens`; None: no compaction


class VerifierConfig(Strict):
    """The scoring command, which runs in the workdir of a fresh environment that holds the agent's files.

    The command's environment has AGENTKIT_ANSWER, AGENTKIT_ANSWER_FILE, AGENTKIT_VERIFIER_DIR (a folder with `files`)
    and AGENTKIT_REWARD_DIR. Exit status 0 is reward 1, or the reward that the command wrote to AGENTKIT_REWARD_DIR as
    `reward.txt` (a number) or `reward.json` (`{"reward": number}`). Any other exit status is reward 0.
    """

    command: Shell
    files: dict[RelativePath, str] = Field(default_factory=dict)
    timeout_s: float = Field(default=60.0, gt=0, le=MAX_TIMEOUT_S)


def _one_call(call: dict[str, Any]) -> dict[str, Any]:
    if len(call) != 1:
        raise ValueError(f"expected one `tool: {{argument: [allowed values]}}` per call, got {len(call)} tools")
    return call


ExpectedCall = Annotated[dict[str, dict[str, list[Any]]], AfterValidator(_one_call)]
"""A tool's name and, for each argument, the allowed values. The value "" means that the argument may be left out."""


class CallsConfig(Strict):
    """Scoring of the calls of the model's first turn, as in BFCL: no tool is run, and the run ends with that turn.

    `calls` lists the expected calls in any order. An empty list means that the model should call no tool; "any" expects
    at least one call.
    """

    calls: Annotated[
        Annotated[list[ExpectedCall], Tag("<calls>")] | Annotated[Literal["any"], Tag("<any>")],
        Discriminator(lambda calls: "<any>" if isinstance(calls, str) else "<calls>"),
    ]


class TestsConfig(Strict):
    """Scoring of a change to a git repository by named tests, as in SWE-bench.

    The workdir is the repository. The agent's changes, except for files that git ignores, are applied to a fresh
    workdir. Then `patch` is applied, which replaces the agent's versions of its files, and `command` runs. The reward
    is 1 if every test of both lists passes. A skipped test passes only in `pass_to_pass`.
    """

    __test__ = False  # not a test class of pytest

    fail_to_pass: list[str] = Field(min_length=1)  # names as in the command's output
    pass_to_pass: list[str] = Field(default_factory=list)
    command: Shell  # a bash script that runs `pytest -rA` or `python -m unittest -v`
    patch: str = ""  # changes to the tests
    timeout_s: float = Field(default=1800.0, gt=0, le=MAX_TIMEOUT_S)


class SolutionConfig(Strict):
    """The oracle solution: a shell command in the workdir. Its standard output, stripped, is the answer."""

    command: Shell
    timeout_s: float = Field(default=60.0, gt=0, le=MAX_TIMEOUT_S)


ToolEntry = Annotated[
    Annotated[str, AfterValidator(_built_in), Tag("<name>")] | Annotated[ToolConfig, Tag("<definition>")],
    Discriminator(lambda entry: "<definition>" if isinstance(entry, Mapping | ToolConfig) else "<name>"),
]


def _verifier_kind(entry: Any) -> str:
    if isinstance(entry, CallsConfig) or (isinstance(entry, Mapping) and "calls" in entry):
        return "<by calls>"
    if isinstance(entry, TestsConfig) or (isinstance(entry, Mapping) and "fail_to_pass" in entry):
        return "<by tests>"
    if isinstance(entry, HarborConfig) or (isinstance(entry, Mapping) and "folder" in entry):
        return "<harbor>"
    return "<command>"


Verifier = Annotated[
    Annotated[VerifierConfig, Tag("<command>")]
    | Annotated[CallsConfig, Tag("<by calls>")]
    | Annotated[TestsConfig, Tag("<by tests>")]
    | Annotated[HarborConfig, Tag("<harbor>")],
    Discriminator(_verifier_kind),
]
_TAGGED: dict[object, type[BaseModel]] = {
    "<by calls>": CallsConfig,
    "<by tests>": TestsConfig,
    "<harbor>": HarborConfig,
}
_TAGS = {"<name>", "<definition>", "<command>", *_TAGGED, "<calls>", "<any>", "[key]"}
"""Parts of a pydantic error's location that do not appear in the file."""


def _every_built_in() -> list[str | ToolConfig]:
    return [*BUILTINS]


def _json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        Validator(schema)
    except SchemaProblemError as problem:
        raise ValueError(f"{problem}; expected a JSON schema") from problem
    return schema


class Task(Strict):
    """A task for an agent. `tools` lists names of built-in tools and definitions of command tools, in prompt order.

    With an output schema, `submit` is not among the default tools, because no grammar constrains its answer.
    """

    id: Identifier
    instruction: str = Field(min_length=1)
    system: str | None = None
    environment: EnvironmentConfig = EnvironmentConfig()
    tools: list[ToolEntry] = Field(default_factory=_every_built_in)
    output_schema: Annotated[dict[str, Any], AfterValidator(_json_schema)] | None = None  # of the answer
    agent: AgentConfig = AgentConfig()
    verifier: Verifier | None = None  # None: the task can be run but not scored
    solution: SolutionConfig | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _no_submit_with_a_schema(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("output_schema") is not None:
            return {"tools": [name for name in BUILTINS if name != "submit"], **data}
        return data

    @field_validator("tools")
    @classmethod
    def _distinct_tools(cls, entries: list[str | ToolConfig]) -> list[str | ToolConfig]:
        names = [entry if isinstance(entry, str) else entry.name for entry in entries]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"duplicate tools: {', '.join(sorted(twice))}")
        return entries

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (
            self.environment.snapshots
            and isinstance(self.verifier, HarborConfig)
            and (state := self.verifier.beside_the_sandbox) is not None
        ):
            raise ValueError(f"snapshots: the files of the sandbox would be saved without {state}; leave it out")
        if isinstance(self.verifier, CallsConfig):
            if self.environment != EnvironmentConfig() or self.solution is not None:
                raise ValueError("a task with verifier.calls has no environment and no solution, as no tool is run")
            known = [tool if isinstance(tool, str) else tool.name for tool in self.tools]
            expected = [] if self.verifier.calls == "any" else self.verifier.calls
            if unknown := {name for call in expected for name in call} - {*known}:
                raise ValueError(f"verifier.calls: no tool {', '.join(sorted(unknown))}; tools: {', '.join(known)}")
        elif missing := [tool.name for tool in self.tools if isinstance(tool, ToolConfig) and tool.command is None]:
            raise ValueError(f'missing key "command" of tool {missing[0]}; only verifier.calls does without it')
        return self

    def build_tools(self) -> list[Tool]:
        """Return the task's tools, in the order of the file. With `verifier.calls` none of them can be run."""
        tools = [NAMED_TOOLS[entry] if isinstance(entry, str) else entry.build() for entry in self.tools]
        if isinstance(self.verifier, CallsConfig):
            return [DeclaredTool(tool.name, tool.description, tool.parameters) for tool in tools]
        return tools

    async def prepare(self, environment: Environment) -> None:
        """Write the task's files to the workdir of a fresh environment and run its setup commands there, in order.

        Raises:
            TaskSetupError: a setup command exited with a non-zero status; the message has its output.
            SandboxError: the sandbox itself failed.
        """
        for path, text in self.environment.files.items():
            await environment.write_file(path, text)
        for command in self.environment.setup:
            result = await environment.exec(command, timeout_s=self.agent.timeout_s)
            if result.exit_code != 0:
                why = "timed out" if result.timed_out else f"exited {result.exit_code}"
                output = (result.stderr or result.stdout).strip()[-2000:]
                raise TaskSetupError(f"task {self.id}: setup command {command!r} {why}: {output}")


M = TypeVar("M", bound=BaseModel)


def load_task(path: str | Path) -> Task:
    """Read one task from a YAML file.

    Raises:
        TaskFileError: the file is missing, is not YAML, or is not a task. The message has file, line and remedy.
    """
    task = load_yaml(path, Task)
    places = {
        ("environment", "build"): task.environment.build is not None,
        ("verifier",): isinstance(task.verifier, HarborConfig),
    }
    for place, is_given in places.items():
        if is_given:  # a task file may come from anywhere, and must not send folders of this machine to a sandbox
            line = _line(read_yaml(Path(path))[0], place)
            raise TaskFileError(f"{path}:{line}: {'.'.join(place)}: only a task directory (task.toml) can have folders")
    return task


def load_yaml(path: str | Path, model: type[M]) -> M:
    """Read a YAML file as `model`. `!file NAME` stands for the text of a file beside or below the YAML file.

    Raises:
        TaskFileError: the file is invalid; the message has one `FILE:LINE: problem` line per problem.
    """
    path = Path(path)
    root, data = read_yaml(path)
    if not isinstance(data, dict):
        raise TaskFileError(f"{path}:1: expected keys and values ({', '.join(model.model_fields)}), got {_kind(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
        lines = sorted({(_line(root, error["loc"]), explain(error, model)) for error in errors[:MAX_PROBLEMS]})
        shown = [f"{path}:{line}: {text}" for line, text in lines]
        if len(errors) > MAX_PROBLEMS:
            shown.append(f"{path}:{lines[-1][0]}: and {len(errors) - MAX_PROBLEMS} more problems")
        raise TaskFileError("\n".join(shown)) from exc


def read_yaml(path: Path) -> tuple[yaml.Node | None, Any]:
    """Return the root node and the value of a YAML file.

    Raises:
        TaskFileError: the file cannot be read, is not YAML, or exceeds a size limit. The message has file and line.
    """
    try:
        data = read_regular(path, max_bytes=MAX_YAML_BYTES)
        text = data.decode("utf-8-sig")
    except OSError as exc:
        hint = "; move large texts to other files, and include them with `!file`" if exc.errno == errno.EFBIG else ""
        raise TaskFileError(f"{path}: cannot be read: {exc.strerror}{hint}") from exc
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise TaskFileError(f"{path}:{line}: not UTF-8 text: byte {exc.start} is {data[exc.start]:#04x}") from exc
    loader: _Loader | None = None
    try:
        loader = _Loader(text, path.resolve().parent)
        root = loader.get_single_node()
        return root, loader.construct_document(root) if root is not None else None
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise TaskFileError(
            f"{path}:{line}: not valid YAML: character {exc.character:#04x} is not allowed; is this a text file?"
        ) from exc
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        problem = " ".join(shorten(part, 200, quote=False) for part in (exc.context, exc.problem) if part)
        hint = next((hint for words, hint in _HINTS.items() if words in problem), "")
        raise TaskFileError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}{hint}") from exc
    except (yaml.YAMLError, RecursionError) as exc:
        raise TaskFileError(f"{path}:1: not valid YAML: {shorten(str(exc), 200, quote=False)}") from exc
    finally:
        if loader is not None:
            loader.dispose()


_HINTS = {
    "mapping values are not allowed": '; quote text that contains ": "',
    "could not find expected ':'": '; write each line of a mapping as "key: value"',
    "cannot start any token": "; indent with spaces, and quote text that starts with @, `, % or a tab",
    "undefined alias": "; quote text that starts with *",
    "while scanning an alias": "; quote text that starts with *",
    "while scanning an anchor": "; quote text that starts with &",
    "could not determine a constructor": "; quote text that starts with !",
}
"""Remedies for YAML errors, by a part of the error text."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader for JSON values that refuses duplicate keys and reads `!file NAME` from beside the YAML file.

    Aliases count by their expanded size, which bounds the work of every reader. An alias inside its own anchor is an
    error.
    """

    def __init__(self, text: str, folder: Path) -> None:
        super().__init__(text)
        self.folder = folder
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # number of nodes that a finished node expands to, by its id
        self._file_bytes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark, before = event.start_mark, self._nodes
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        self._check_size(mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _error(f"*{event.anchor} is inside its own anchor", mark)
            self._nodes += self._sizes[id(node)]
            self._check_size(mark)
        elif node is not None:
            self._sizes[id(node)] = self._nodes - before
        return node

    def _check_size(self, mark: yaml.Mark) -> None:
        if self._depth > MAX_YAML_DEPTH:
            raise _error(f"nested more than {MAX_YAML_DEPTH} deep", mark)
        if self._nodes > MAX_YAML_NODES:
            raise _error(f"more than {MAX_YAML_NODES} values, including those repeated by aliases", mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as exc:  # PyYAML passes on errors of `int`, `float` and dict keys
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _error(f"{shorten(node.value)} is not a valid {shorten(tag, quote=False)}", node.start_mark) from exc
        if isinstance(value, str) and not _is_text(value):
            raise _error(f"{shorten(value)} contains a lone surrogate", node.start_mark)
        if isinstance(value, float) and not math.isfinite(value):
            raise _error(
                f"{shorten(node.value, quote=False)} is not a finite number; quote it if it is text", node.start_mark
            )
        if isinstance(value, int) and value.bit_length() > 64:
            raise _error("the integer has more than 64 bits; quote it if it is text", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise _error(f'duplicate key "{shorten(key.value, quote=False)}"', key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_file(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise _error("expected !file NAME with a relative path", node.start_mark)
        name = shorten(node.value, 200, quote=False)
        try:
            target = (self.folder / str(node.value)).resolve()
            if not target.is_relative_to(self.folder):
                raise _error(f"!file {name} lies outside {self.folder}", node.start_mark)
            data = read_regular(target, max_bytes=MAX_FILE_BYTES - self._file_bytes)
            self._file_bytes += len(data)
            return data.decode().replace("\r\n", "\n").replace("\r", "\n")  # universal newlines
        except OSError as exc:
            problem = f"!file {name} cannot be read as text: {exc.strerror}"
        except (ValueError, RuntimeError) as exc:  # not UTF-8, invalid name, circular links
            problem = f"!file {name} cannot be read as text: {shorten(str(exc), 200, quote=False)}"
        raise _error(problem, node.start_mark)

    def construct_none_of_json(self, node: yaml.Node) -> str:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        raise _error(f"!!{tag} is not a JSON value; write text, a number, a list or a mapping", node.start_mark)


def _error(problem: str, mark: yaml.Mark) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_Loader.add_constructor("!file", _Loader.construct_file)
for _tag in ("binary", "timestamp", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_none_of_json)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _line(node: yaml.Node | None, loc: Sequence[int | str]) -> int:
    """Return the line (from 1) of `loc`: of a mapping's key, a list's item, or else the nearest parent."""
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


def explain(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return one problem of a `ValidationError` of `model` in words, with the place and a hint."""
    loc = [step for step in error["loc"] if step not in _TAGS]
    where = shorten(".".join(str(step) for step in loc), 120, quote=False)
    if error["type"] == "extra_forbidden":
        known = list(_fields_at(model, error["loc"][:-1]))
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"expected one of {', '.join(known)}"
        return f'unknown key "{where}"; {hint}'
    if error["type"] == "missing":
        return f'missing key "{where}"'
    message = shorten(str(error["msg"]).removeprefix("Value error, "), 500, quote=False)
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    hint = {
        "string_type": "" if isinstance(error["input"], list | dict) else "; quote it to make it text",
        "dict_type": "; write one `NAME: value` per line",
        "list_type": "; write `- ` before each item",
    }.get(error["type"], "")
    return f"{where}: {message[0].lower()}{message[1:]}, got {_kind(error['input'])}{hint}"


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {shorten(value)}"


def _fields_at(model: type[BaseModel], loc: Iterable[int | str]) -> Iterable[str]:
    """Return the field names of the model at `loc`."""
    for step in loc:
        if step in _TAGGED:
            model = _TAGGED[step]
        elif isinstance(step, str) and step in model.model_fields:
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
