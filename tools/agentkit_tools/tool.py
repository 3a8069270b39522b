"""A tool: a typed function with a JSON schema that a model may call, and what a call and its result are.

`await some_tool(call, context)` checks the arguments, runs the function and returns a `ToolResult`. Whatever the model
did wrong, and whatever the tool raised, is told in the result; only a dead sandbox (`SandboxError`) and cancellation
leave the call as exceptions.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import anyio
import anyio.to_thread
from pydantic_core import to_jsonable_python

from agentkit_environments import Environment, SandboxError
from agentkit_tools.errors import ToolDefinitionError, ToolError
from agentkit_tools.schema import read_arguments, read_signature

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CUT_NOTICE = re.compile(rb"\n\[\.\.\. (\d{1,18}) bytes cut \.\.\.\]\n")
CUT_NOTICE_BYTES = 48  # at most, with any number in it
MIN_OUTPUT_BYTES = 128  # the notice and something around it
GRACE_S = 5.0  # what a tool with its own deadline in the environment gets on top, to return what was said so far


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the model wrote it; `arguments` is the JSON text of an object, unchecked."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model is told about one call.

    `is_error` is set when the call failed: bad arguments, an error, a deadline, or a command's non-zero exit.
    `final` is set by `submit`: `content` is then the answer and the run is over.
    """

    call_id: str
    name: str
    content: str
    is_error: bool = False
    duration_s: float = 0.0
    final: bool = False


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """What a tool function may return when plain text is not enough to say how the call went."""

    content: str
    is_error: bool = False
    final: bool = False


@dataclass(slots=True)
class ToolContext:
    """Where the calls of one run happen, and their bounds. Share one context among the calls of a run.

    `max_output_bytes` bounds the UTF-8 of each result (at least 128), `timeout_s` the time of each call. Tools that
    read, change and write back hold `lock`, so that parallel edits of one file are not lost.
    """

    environment: Environment
    max_output_bytes: int = 16_384
    timeout_s: float = 60.0
    lock: anyio.Lock = field(default_factory=anyio.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.max_output_bytes < MIN_OUTPUT_BYTES:
            raise ValueError(f"max_output_bytes={self.max_output_bytes}, expected at least {MIN_OUTPUT_BYTES}")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s}, expected a positive number of seconds")


class Tool(ABC):
    """Something a model may call. Subclasses say how arguments are read (`parse`) and what happens (`run`).

    `parameters` is a JSON schema (2020-12) of an object. A `read_only` tool changes nothing; a `barrier` runs alone:
    earlier calls of the turn finish first, later ones do not start before it ends.
    """

    def __init__(
        self,
        name: str,
        description: str,
        parameters: Mapping[str, Any],
        *,
        read_only: bool = False,
        barrier: bool = False,
    ) -> None:
        if not NAME.fullmatch(name):
            raise ToolDefinitionError(f"tool name {name!r}: expected 1 to 64 letters, digits, '_' or '-'")
        self.name = name
        self.description = description
        self.parameters = dict(parameters)
        self.read_only = read_only
        self.barrier = barrier

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def spec(self) -> dict[str, Any]:
        """The tool as chat encoders and OpenAI-style servers want it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @abstractmethod
    def parse(self, arguments: str) -> dict[str, Any]:
        """Check the JSON text of a call; `ArgumentsError` says what is wrong with it."""

    @abstractmethod
    async def run(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        """Do it, with arguments from `parse`; `ToolError` is told to the model."""

    def deadline_s(self, context: ToolContext) -> float:
        """Seconds after which a call is cancelled."""
        return context.timeout_s + GRACE_S

    async def __call__(self, call: ToolCall, context: ToolContext) -> ToolResult:
        """Run one call; its failures are results.

        Raises:
            SandboxError: the sandbox is gone; nothing that the model did, so nothing to tell it.
        """
        start = time.perf_counter()
        try:
            arguments = self.parse(call.arguments)
            with anyio.move_on_after(self.deadline_s(context)) as scope:
                output = await self.run(arguments, context)
            if scope.cancelled_caught:
                raise ToolError(f"{self.name} timed out after {context.timeout_s:g} s")
        except SandboxError:
            raise
        except ToolError as error:
            output = ToolOutput(f"Error: {error}", is_error=True)
        except Exception as error:
            if isinstance(error, ExceptionGroup) and error.subgroup(SandboxError):
                raise
            output = ToolOutput("Error: " + f"{type(error).__name__}: {error}".removesuffix(": "), is_error=True)
        content = output.content if output.final else cut(output.content, context.max_output_bytes)
        return ToolResult(call.id, self.name, content, output.is_error, time.perf_counter() - start, output.final)


class FunctionTool(Tool):
    """A tool made of a Python function; see `tool`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        read_only: bool = False,
        barrier: bool = False,
        namespace: Mapping[str, Any] | None = None,
    ) -> None:
        if not (inspect.isfunction(fn) or inspect.ismethod(fn)):
            raise ToolDefinitionError(f"given {fn!r}, expected a function")
        name = name or fn.__name__
        signature = read_signature(fn, name=name, injected_type=ToolContext, namespace=namespace)
        description = signature.description if description is None else description
        super().__init__(name, description, signature.parameters, read_only=read_only, barrier=barrier)
        self.fn = fn
        self._signature = signature
        self._is_async = inspect.iscoroutinefunction(fn)

    def parse(self, arguments: str) -> dict[str, Any]:
        return read_arguments(self._signature, arguments, name=self.name)

    def deadline_s(self, context: ToolContext) -> float:
        return context.timeout_s if self._signature.injected is None else super().deadline_s(context)

    async def run(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        if self._signature.injected is not None:
            arguments[self._signature.injected] = context
        if self._is_async:
            value = await self.fn(**arguments)
        else:
            value = await anyio.to_thread.run_sync(functools.partial(self.fn, **arguments), abandon_on_cancel=True)
        if isinstance(value, ToolOutput):
            return value
        if isinstance(value, str):
            return ToolOutput(value)
        return ToolOutput(json.dumps(to_jsonable_python(value), ensure_ascii=False))


@overload
def tool(fn: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, read_only: bool = False, barrier: bool = False
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    read_only: bool = False,
    barrier: bool = False,
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Make a tool of a typed function, as `@tool` or `@tool(read_only=True)`.

    The schema comes from the signature, the descriptions from the docstring (prose, and `Args:` in Google style) or
    from `Annotated[T, "text"]`. A parameter annotated `ToolContext` gets the context and stays out of the schema.
    A synchronous function runs in a worker thread. A returned string is the result; anything else is written as JSON.

    Raises:
        ToolDefinitionError: a parameter without annotation, `*args`, `**kwargs`, a positional-only parameter, a type
            that JSON cannot carry, a default that does not fit, or a bad name.
    """
    namespace = sys._getframe(1).f_locals  # so that types defined beside the function resolve, as in pydantic

    def decorate(fn: Callable[..., Any]) -> FunctionTool:
        return FunctionTool(
            fn, name=name, description=description, read_only=read_only, barrier=barrier, namespace=namespace
        )

    return decorate if fn is None else decorate(fn)


def unknown_tool(call: ToolCall, available: Iterable[str]) -> ToolResult:
    """The result of a call to a tool that does not exist; it names those that do."""
    names = ", ".join(available) or "none"
    content = f"Error: unknown tool {json.dumps(call.name, ensure_ascii=False)}; available: {names}"
    return ToolResult(call.id, call.name, content, is_error=True)


def refuse_nul(**arguments: str) -> None:
    """Refuse arguments that no command line can carry.

    Raises:
        ToolError: one of them holds a NUL byte.
    """
    for name, value in arguments.items():
        if "\0" in value:
            raise ToolError(f'"{name}" holds a NUL byte; leave it out')


def cut(text: str, max_bytes: int) -> str:
    """Bound the UTF-8 of `text` to `max_bytes` (at least 128): head and tail stay, the middle says what was cut.

    Characters stay whole. A cut that an environment made earlier is counted in when its notice goes.
    """
    if len(text) * 4 <= max_bytes:
        return text
    data = text.encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return text
    half = (max_bytes - CUT_NOTICE_BYTES) // 2
    head = data[:half].decode("utf-8", "ignore")
    tail = data[-half:].decode("utf-8", "ignore")
    middle = data[len(head.encode()) : len(data) - len(tail.encode())]
    count = len(middle) + sum(int(notice[1]) - len(notice[0]) for notice in CUT_NOTICE.finditer(middle))
    return f"{head}\n[... {count} bytes cut ...]\n{tail}"
