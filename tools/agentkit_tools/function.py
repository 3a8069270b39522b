"""`@tool` and `as_tool`: make tools of Python functions. A decorated function can still be called directly."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from agentkit_tools.errors import ToolDefinitionError
from agentkit_tools.parts import ImagePart, TextPart
from agentkit_tools.results import value_text
from agentkit_tools.schema import read_arguments
from agentkit_tools.signature import read_signature, underlying
from agentkit_tools.tool import Tool, ToolContext, ToolOutput
from agentkit_tools.workers import run_in_thread

P = ParamSpec("P")
R = TypeVar("R")
SMALL = 64  # items


class FunctionTool(Tool, Generic[P, R]):
    """A tool made of a Python function; see `tool`.

    Calling it calls the function: `await add(1, 2)`, or `add(1, 2)` if the function is not async. A direct call does
    not check or convert arguments, and passes a `ToolContext` like any other argument.
    """

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        name: str | None = None,
        description: str | None = None,
        read_only: bool = False,
        barrier: bool = False,
    ) -> None:
        base = _function_below(fn)
        name = name or base.__name__
        if name in ("<lambda>", "__call__"):
            raise ToolDefinitionError(f"given {fn!r}, which has no name; use def or tool(name=...)(...)")
        signature = read_signature(fn, name=name, injected_type=ToolContext)
        functools.update_wrapper(self, base, updated=())
        self.__wrapped__ = fn
        description = signature.description if description is None else description
        super().__init__(name, description, signature.parameters, read_only=read_only, barrier=barrier)
        self.fn = fn
        self._signature = signature
        self.deps_types = signature.deps_types
        self._is_async = _is_coroutine_function(fn)
        self.needs_environment = bool(signature.injected)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the wrapped function."""
        missing = self._signature.defaults
        if missing:  # Python would pass the FieldInfo of a `Field(3)` default to the function
            given = inspect.signature(self.fn).bind_partial(*args, **kwargs).arguments
            for name in missing.keys() - given.keys():
                kwargs[name] = missing[name]()
        return self.fn(*args, **kwargs)

    def parse(self, arguments: str) -> dict[str, Any]:
        return read_arguments(self._signature, arguments, name=self.name)

    def deadline_s(self, context: ToolContext) -> float:
        return super().deadline_s(context) if self._signature.injected else context.timeout_s

    async def run(self, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        fn: Callable[..., Any] = self
        call = functools.partial(fn, **arguments, **dict.fromkeys(self._signature.injected, context))
        value = await (call() if self._is_async else run_in_thread(lambda: _settle(call())))
        if inspect.isawaitable(value):  # a sync function that returns a coroutine
            value = await value
        return _output(value) if _is_small(value) else await run_in_thread(lambda: _output(value))


def _settle(value: Any) -> Any:
    """Convert a return value to a `ToolOutput`; return an awaitable unchanged, for the event loop to await."""
    return value if inspect.isawaitable(value) else _output(value)


def _output(value: Any) -> ToolOutput:
    if isinstance(value, ToolOutput):
        return value
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, TextPart | ImagePart) for item in items):
        parts = (item if isinstance(item, TextPart | ImagePart) else TextPart(value_text(item)) for item in items)
        return ToolOutput(parts=tuple(parts))
    return ToolOutput(value_text(value))


def _is_small(value: Any) -> bool:
    """Return whether `value` serializes fast enough to do it in the event loop."""
    if isinstance(value, dict | list | tuple) and len(value) <= SMALL:
        return all(_is_simple(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, ToolOutput) or _is_simple(value)


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float | TextPart | ImagePart)


def _is_coroutine_function(fn: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)


def _function_below(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the named function that `fn` wraps.

    Raises:
        ToolDefinitionError: `fn` cannot be a tool.
    """
    if isinstance(fn, Tool):
        raise ToolDefinitionError(f"given {fn!r}, which is already a tool; pass it unchanged")
    if inspect.isclass(fn):
        raise ToolDefinitionError(f"given the class {fn.__name__}, expected a function; write a function that calls it")
    if not callable(fn):
        hint = f"; to name a tool, write tool(name={fn!r})" if isinstance(fn, str) else ""
        raise ToolDefinitionError(f"given {fn!r}, expected a function{hint}")
    try:
        base: Callable[..., Any] = underlying(fn)
    except ValueError as error:  # circular `__wrapped__`
        raise ToolDefinitionError(f"given {fn!r}, expected a function: {error}") from error
    if inspect.isclass(base):
        raise ToolDefinitionError(f"given {fn!r}, expected a function; write a function that calls it")
    for is_kind, kind in (
        (inspect.isasyncgenfunction, "an async generator"),
        (inspect.isgeneratorfunction, "a generator"),
    ):
        if is_kind(fn) or is_kind(type(fn).__call__):
            raise ToolDefinitionError(
                f"tool {base.__name__!r}: is {kind}, but a call returns one result; collect the items and return a list"
            )
    return base


class _Decorator(Protocol):
    def __call__(self, fn: Callable[P, R], /) -> FunctionTool[P, R]: ...


@overload
def tool(fn: Callable[P, R], /) -> FunctionTool[P, R]: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, read_only: bool = False, barrier: bool = False
) -> _Decorator: ...
def tool(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    read_only: bool = False,
    barrier: bool = False,
) -> Any:
    """Make a tool of a typed function, with `@tool` or `@tool(read_only=True)`.

    The schema comes from the signature. Descriptions come from the docstring (prose, and `Args:` in Google style) or
    from `Annotated[T, "text"]`. Defaults may be pydantic's `Field(3, ge=1)`. A parameter annotated `ToolContext` or
    `ToolContext[Database]` receives the context and is left out of the schema. A function that is not async runs in its
    own thread. A returned string is the result; other values are written as JSON, or described if JSON cannot represent
    them. An `ImagePart`, or a list that contains a `TextPart` or `ImagePart`, is shown to the model as text and images.

    Bound methods, `functools.partial` (bound arguments are left out of the schema) and objects with `__call__` work
    too. Objects with `__call__` and lambdas need a `name`.

    Raises:
        ToolDefinitionError: a parameter has no annotation, is `*args`, `**kwargs` or positional-only, has a type that
            JSON cannot represent, or has a default that does not fit its type; the name is invalid; or `fn` is a
            generator, a class or not a function.
    """
    if fn is not None:
        return FunctionTool(fn)
    return functools.partial(FunctionTool, name=name, description=description, read_only=read_only, barrier=barrier)


def as_tool(function_or_tool: Tool | Callable[..., Any]) -> Tool:
    """Return a tool unchanged; make a tool of a plain function as `@tool` does.

    Raises:
        ToolDefinitionError: see `tool`; the message says what to pass instead.
    """
    if isinstance(function_or_tool, Tool):
        return function_or_tool
    if inspect.isclass(function_or_tool) and issubclass(function_or_tool, Tool):
        raise ToolDefinitionError(f"given the class {function_or_tool.__name__}, expected a tool; pass an instance")
    if isinstance(function_or_tool, str):
        raise ToolDefinitionError(
            f"given the text {function_or_tool!r}, expected a tool or a function; "
            "look up built-in tools by name in agentkit_tools.BUILTINS"
        )
    return FunctionTool(function_or_tool)
