"""Convert return values and exceptions of tools to text; works for any object."""

from __future__ import annotations

import asyncio
import collections
import collections.abc
import dataclasses
import functools
import inspect
import json
import math
import opcode
import signal
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import anyio
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from agentkit_environments import SandboxError
from agentkit_tools.errors import ToolError
from agentkit_tools.parts import ImagePart

MAX_DEPTH = 64
RAISE = opcode.opmap["RAISE_VARARGS"]
SEQUENCES = (
    *(list, tuple, set, frozenset, collections.deque, range),
    *(collections.abc.KeysView, collections.abc.ValuesView, collections.abc.ItemsView),
)


def value_text(value: Any) -> str:
    """Convert a return value to text: strings unchanged, JSON values as JSON, other objects described.

    Bytes that are valid UTF-8 become text. Sets are sorted, so that equal sets give equal text.

    Raises:
        ToolError: the value is a generator or a coroutine, which has no result yet.
    """
    if isinstance(value, str):
        return _well_formed(str.__str__(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes_text(value)
    if unfinished := _unfinished(value):
        kind, remedy = unfinished
        raise ToolError(f"the tool returned {kind} ({type(value).__name__}); {remedy}")
    try:
        return _well_formed(json.dumps(value, ensure_ascii=False))
    except Exception:  # not plain JSON: too deep, circular, or with other types inside
        plain = _plain(value, ())
    return plain if isinstance(plain, str) and _is_described(value) else json.dumps(plain, ensure_ascii=False)


def error_text(error: BaseException) -> str:
    """Return the message of a `ToolError`, otherwise type and message; an exception group also lists its members."""
    try:
        message = str(error)
    except BaseException as failure:  # report the original error even if its `__str__` raises
        message = f"<its message cannot be shown: {type(failure).__name__}>"
    if isinstance(error, ToolError):
        return _well_formed(message)
    text = f"{type(error).__name__}: {message}".removesuffix(": ")
    if isinstance(error, BaseExceptionGroup):
        text += ": " + "; ".join(error_text(member) for member in _leaves(error))
    return _well_formed(text)


def belongs_to_the_loop(error: BaseException) -> bool:
    """Return whether an exception raised through a tool must propagate to the agent loop.

    These are: a lost sandbox, a cancellation from outside the tool, Ctrl-C and exceptions raised by other signal
    handlers, and the closing of the coroutine. `raise KeyboardInterrupt` or `sys.exit()` in the tool's own code is an
    ordinary tool failure.
    """
    if isinstance(error, BaseExceptionGroup):
        return any(map(belongs_to_the_loop, error.exceptions))
    if isinstance(error, Exception):
        return isinstance(error, SandboxError)
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return _is_cancelled()
    if isinstance(error, KeyboardInterrupt | GeneratorExit) and not _was_raised_by_a_statement(error):
        return True
    return any(code in _signal_handlers() for code in _codes(error))


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for member in group.exceptions:
        if isinstance(member, BaseExceptionGroup):
            yield from _leaves(member)
        else:
            yield member


def _is_cancelled() -> bool:
    """Return whether the current cancel scope or task has been cancelled."""
    if anyio.current_effective_deadline() == -math.inf:
        return True
    try:
        task = asyncio.current_task()
    except RuntimeError:  # not running on asyncio
        return True
    return task is not None and task.cancelling() > 0


def _was_raised_by_a_statement(error: BaseException) -> bool:
    """Return whether the error comes from a `raise` statement; a signal can interrupt any instruction."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == RAISE


def _codes(error: BaseException) -> Iterator[CodeType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next


def _signal_handlers() -> set[CodeType]:
    """Return the code objects of signal handlers written in Python, such as asyncio's handler for Ctrl-C."""
    codes = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        code = getattr(handler, "__code__", None)
        if isinstance(code, CodeType):
            codes.add(code)
    return codes


def _plain(value: Any, above: tuple[int, ...]) -> Any:
    """Convert `value` to JSON types; `above` holds the ids of the enclosing containers."""
    if isinstance(value, float | bool | None):
        return value
    if isinstance(value, str):
        return _well_formed(str.__str__(value))
    if isinstance(value, int):
        return _safely(lambda: int(str(value)), f"<integer of {value.bit_length()} bits>")  # str() limits the digits
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes_text(value)
    if unfinished := _unfinished(value):
        return f"<{unfinished[0]}>"
    if isinstance(value, ImagePart):
        return str(value)
    if id(value) in above:
        return "<circular reference>"
    if len(above) == MAX_DEPTH:
        return f"<{type(value).__name__}, nested too deeply to show>"
    return _safely(lambda: _unpack(value, (*above, id(value))), f"<{type(value).__name__} that cannot be shown>")


def _unpack(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, collections.abc.Mapping):
        return {_key(key): _plain(item, above) for key, item in value.items()}
    if isinstance(value, SEQUENCES):
        items = [_plain(item, above) for item in value]
        return sorted(items, key=_sort_key) if isinstance(value, set | frozenset) else items
    if isinstance(value, BaseModel) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        try:
            return _checked(to_jsonable_python(value))
        except Exception:  # a field is not JSON
            fields = vars(value) if isinstance(value, BaseModel) else _fields(value)
            return {name: _plain(item, above) for name, item in fields.items()}
    try:
        return _checked(to_jsonable_python(value))
    except Exception:
        return _description(value)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _checked(plain: Any) -> Any:
    """Return `plain` unchanged; raise ValueError if it cannot be written as valid UTF-8 JSON."""
    json.dumps(plain, ensure_ascii=False).encode()
    return plain


def _key(key: Any) -> str:
    if isinstance(key, str):
        return _well_formed(str.__str__(key))
    try:
        return str(next(iter(_checked(to_jsonable_python({key: None})))))
    except Exception:
        return str(_safely(lambda: _well_formed(str(key)), f"<{type(key).__name__} that cannot be shown>"))


def _sort_key(item: Any) -> str:
    return json.dumps(item, sort_keys=True)


def _is_described(value: Any) -> bool:
    """Return whether the text of `value` is a description rather than a JSON string."""
    try:
        return not isinstance(to_jsonable_python(value), str)
    except Exception:
        return True


def _description(value: Any) -> str:
    """Return `str(value)`, or `<Database object>` if the type has only the default text with an address."""
    if isinstance(value, BaseException):
        return error_text(value)
    kind: Any = type(value)
    if kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__:
        return f"<{type(value).__name__} object>"
    return _well_formed(str(value))


def _unfinished(value: Any) -> tuple[str, str] | None:
    """Return the kind and a remedy for an iterator or awaitable, whose values do not exist yet; otherwise None."""
    if inspect.iscoroutine(value):
        value.close()  # avoids the "never awaited" warning
    kinds = (
        (inspect.isasyncgen, "an async generator", "collect its items and return a list"),
        (inspect.isgenerator, "a generator", "return a list of its items"),
        (inspect.isawaitable, "an awaitable that was not awaited", "await it and return its result"),
        (_is_async_iterator, "an async iterator", "collect its items and return a list"),
        (_is_iterator, "an iterator", "return a list of its items"),
    )
    return next(((kind, remedy) for is_kind, kind, remedy in kinds if is_kind(value)), None)


def _is_async_iterator(value: Any) -> bool:
    return isinstance(value, collections.abc.AsyncIterator)


def _is_iterator(value: Any) -> bool:
    return isinstance(value, collections.abc.Iterator)


def _bytes_text(value: bytes | bytearray | memoryview) -> str:
    data = bytes(value)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    return f"<{len(data)} bytes of binary data>" if "\0" in text else text


def _well_formed(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _safely(make: Callable[[], Any], otherwise: str) -> Any:
    try:
        return make()
    except Exception:
        return otherwise
