"""`Tool`, tool calls and results, and the context of a run.

`await some_tool.call(call, context)` checks the arguments, runs the tool and returns a `ToolResult`. Invalid calls and
exceptions raised by the tool become error results. Only a lost sandbox (`SandboxError`), cancellation and Ctrl-C
propagate as exceptions.
"""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, cast

import anyio
import anyio.to_thread
from typing_extensions import TypeVar

from agentkit_environments import Environment, OnOutput, OutputStream
from agentkit_tools.errors import ToolDefinitionError, ToolError
from agentkit_tools.model_texts import ERROR
from agentkit_tools.output import MIN_OUTPUT_BYTES, bounded, cut_parts
from agentkit_tools.parts import ImagePart, Part, TextPart, parts_text
from agentkit_tools.results import belongs_to_the_loop, error_text, value_text
from agentkit_tools.validation import NeedsTimeError, briefly

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Deps = TypeVar("Deps", default=Any)
GRACE_S = 5.0  # extra time for a tool with its own deadline in the environment, to return its output so far


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the model wrote it; `arguments` is the unchecked JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of one call, as shown to the model.

    `is_error` is set if the call failed: bad arguments, an error, a deadline, or a non-zero exit code.
    `final` is set by `submit`: `content` is the answer and the run ends. `duration_s` is in seconds. A result with
    images has `parts`; `content` then has one line in place of each image.
    """

    call_id: str
    name: str
    content: str
    is_error: bool = False
    duration_s: float = 0.0
    final: bool = False
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """Return value of a tool function that also sets `is_error` or `final`, or has images among its `parts`.

    If `parts` is given, `content` is not used; the parts have the text of the result. `path` is a file of the
    environment that has `content` already; a result that is too long names it.
    """

    content: str = ""
    is_error: bool = False
    final: bool = False
    parts: tuple[TextPart | ImagePart, ...] = ()
    path: str | None = None


@dataclass(slots=True)
class ToolContext(Generic[Deps]):
    """The environment and limits of a call. The calls of a run share all but `on_output`.

    `max_output_bytes` limits the UTF-8 size of each result (at least 128), `timeout_s` the time of each call in
    seconds. A longer result is written to a file in the environment's directory `spill_dir`, if that is set, and names
    the file. Tools that read, modify and write a file hold `lock`, so that parallel edits are not lost. `deps` is the
    object that the caller of the run gave for its tools, such as a database connection. A tool that declares
    `context: ToolContext[Database]` runs only with a `Database`. `on_output` shows the output of a command to the
    caller of the run: `context.environment.exec(command, on_output=context.on_output)`. It is None outside of a run.
    """

    environment: Environment
    max_output_bytes: int = 16_384
    timeout_s: float = 60.0
    lock: anyio.Lock = field(default_factory=anyio.Lock, repr=False)
    deps: Deps = field(default=cast(Any, None), repr=False)
    spill_dir: str | None = None
    on_output: OnOutput | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.max_output_bytes < MIN_OUTPUT_BYTES:
            raise ValueError(f"max_output_bytes={self.max_output_bytes}, expected at least {MIN_OUTPUT_BYTES}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s}, expected a positive number of seconds")

    def emit_output(self, text: str, *, stream: OutputStream = "stdout") -> None:
        """Show text to the caller of the run, as output of this call while it runs. The model does not see it.

        A function that is not async may call this from its thread. After the end of the call, nothing is shown.
        """
        if self.on_output is not None:
            self.on_output(stream, text)


class Tool(ABC):
    """Base class of tools. Subclasses parse the arguments in `parse` and do the work in `run`.

    `parameters` is a JSON schema (2020-12) of an object. A `read_only` tool changes nothing. A `barrier` runs alone:
    earlier calls of the turn finish first, and later ones start after it ends. A tool that `delegates` makes calls of
    its own, as a sub-agent does. While it waits for them, it does not count under limits that they may share.
    `ToolContext.deps` must be an instance of each class in `deps_types`.
    """

    needs_environment: bool = True
    """True if calls use `ToolContext.environment`. A run opens no sandbox if this is False for all of its tools."""
    delegates: ClassVar[bool] = False
    deps_types: tuple[type, ...] = ()

    def __init__(
        self,
        name: str,
        description: str,
        parameters: Mapping[str, Any],
        *,
        read_only: bool = False,
        barrier: bool = False,
    ) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ToolDefinitionError(f"tool name {name!r}: expected 1 to 64 letters, digits, '_' or '-'")
        if not isinstance(description, str) or not isinstance(parameters, Mapping):
            raise ToolDefinitionError(
                f"tool {name!r}: given description {description!r} and parameters {parameters!r}, "
                "expected a string and a JSON schema"
            )
        self.name = name
        self.description = description
        self.parameters = dict(parameters)
        self.read_only = read_only
        self.barrier = barrier

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def spec(self) -> dict[str, Any]:
        """Tool definition in the OpenAI format, also used by chat encoders."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @abstractmethod
    def parse(self, arguments: str) -> dict[str, Any]:
        """Parse and check the JSON text of a call's arguments; raise ArgumentsError if they are invalid."""

    @abstractmethod
    async def run(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        """Run the tool with arguments from `parse`; a ToolError is reported to the model."""

    async def refusal(self, call: ToolCall) -> ToolResult | None:
        """Return the error result of a call whose arguments are invalid; None if they are valid."""
        try:
            await self._parse(call.arguments)
        except BaseException as error:  # as in `call`
            if belongs_to_the_loop(error):
                raise
            return ToolResult(call.id, self.name, _failed(error)[1], is_error=True)
        return None

    async def _parse(self, arguments: str) -> dict[str, Any]:
        """Run `parse`, in a thread if it takes long, so that the event loop stays free."""
        try:
            with briefly():
                return self.parse(arguments)
        except NeedsTimeError:
            return await anyio.to_thread.run_sync(
                self.parse, arguments, limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True
            )

    def deadline_s(self, context: ToolContext) -> float:
        """Return the number of seconds after which a call is cancelled."""
        return context.timeout_s + GRACE_S

    async def call(self, call: ToolCall, context: ToolContext) -> ToolResult:
        """Run one call; failures become results. The deadline starts here, so do not call it before the call may run.

        Raises:
            SandboxError: the sandbox is lost, which is not the model's fault.
        """
        start = time.perf_counter()
        with anyio.move_on_after(self.deadline_s(context)) as scope:
            try:
                output = await self.run(await self._parse(call.arguments), context)
                content = parts_text(output.parts) if output.parts else value_text(output.content)
            except BaseException as error:  # a SystemExit or CancelledError raised by the tool must not end the run
                if belongs_to_the_loop(error):
                    raise
                output, content = _failed(error)
        if scope.cancelled_caught:
            output, content = _failed(ToolError(f"{self.name} timed out after {context.timeout_s:g} s"))
        if not output.final:
            content = await bounded(content, context, path=output.path)
        duration_s = time.perf_counter() - start
        parts = cut_parts(output.parts, context.max_output_bytes)
        return ToolResult(call.id, self.name, content, output.is_error, duration_s, output.final, parts)


def _failed(error: BaseException) -> tuple[ToolOutput, str]:
    return ToolOutput("", is_error=True), ERROR.format(message=error_text(error))


def unknown_tool(call: ToolCall, available: Iterable[str]) -> ToolResult:
    """Return the result of a call to an unknown tool; it lists the available ones."""
    names = ", ".join(available) or "none"
    content = ERROR.format(message=f"unknown tool {json.dumps(call.name, ensure_ascii=False)}; available: {names}")
    return ToolResult(call.id, call.name, content, is_error=True)


def refuse_nul(**arguments: str) -> None:
    """Refuse arguments that cannot be passed on a command line.

    Raises:
        ToolError: an argument contains a NUL byte.
    """
    for name, value in arguments.items():
        if "\0" in value:
            raise ToolError(f'"{name}" contains a NUL byte; remove it')
