"""Search for JSON Schema patterns in bounded time.

The model chooses the text and the pattern may be untrusted, so backtracking is a risk: `^(\\w+\\s?)+$` takes Python's
`re` half a minute on 28 letters, while holding the GIL. Most patterns run in Rust's linear-time engine, which ships
with pydantic. Look-around, back-references and syntax that Rust reads differently from ECMAScript run in Python's `re`,
in a worker process that is killed at the deadline.

Both engines read `\\w`, `\\d` and `\\s` as Unicode classes and `$` as the very end of the text.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import re
import selectors
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from pydantic_core import SchemaError, SchemaValidator, core_schema

MAX_STEPS = 5_000_000
"""Limit on states times characters in the linear engine, at most about 0.1 s; larger searches use the worker."""

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|\(\?<(?![=!])|.", re.DOTALL)
_OTHER_IN_RUST = re.compile(r"\\[<>]|\(\?[a-zA-Z-]*x")
_SET_OPERATIONS = re.compile(r"\[|&&|--|~~")
_CODE = """
import functools, json, re, sys
compiled = functools.lru_cache(64)(re.compile)
for line in sys.stdin:
    pattern, text = json.loads(line)
    print(int(compiled(pattern).search(text) is not None), flush=True)
"""


class PatternTooSlowError(Exception):
    """The search did not finish before the deadline."""


def is_pattern(pattern: str) -> bool:
    """Return whether either engine accepts `pattern`."""
    return _linear(pattern) is not None or _python(pattern) is not None


def search(pattern: str, text: str, *, deadline: float) -> bool:
    """Return whether `pattern` matches anywhere in `text`.

    Args:
        pattern: regular expression accepted by `is_pattern`.
        text: text to search.
        deadline: latest end, on the clock of `time.monotonic()`.

    Raises:
        PatternTooSlowError: the deadline passed.
    """
    linear = _linear(pattern)
    if linear is not None and _size(pattern) * len(text) <= MAX_STEPS:
        return linear(text)
    translated = _python(pattern)
    found = None if translated is None else _Worker.search(translated, text, deadline)
    if found is None:
        raise PatternTooSlowError(f"pattern {pattern!r:.60} on a text of {len(text)} characters")
    return found


def needs_worker(pattern: str, text: str) -> bool:
    """Return whether `search` would use the worker process."""
    return _linear(pattern) is None or _size(pattern) * len(text) > MAX_STEPS


@functools.lru_cache(maxsize=512)
def _linear(pattern: str) -> Callable[[str], bool] | None:
    """Return Rust's search function, or None if Rust rejects the pattern or reads it differently from ECMAScript."""
    classes = [token[0][1:-1] for token in _TOKEN.finditer(pattern) if token[0].startswith("[") and len(token[0]) > 1]
    if _OTHER_IN_RUST.search(pattern) or any(_SET_OPERATIONS.search(re.sub(r"\\.", "", each)) for each in classes):
        return None
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex")).isinstance_python
    except SchemaError:
        return None


@functools.lru_cache(maxsize=512)
def _python(pattern: str) -> str | None:
    """Translate the pattern for Python's `re`; None if `re` rejects it."""
    parts = []
    for token in _TOKEN.finditer(pattern):
        match token[0]:
            case "$":
                parts.append(r"\Z")
            case "(?<":
                parts.append("(?P<")
            case other:
                parts.append(other)
    translated = re.sub(r"\\k<(\w+)>", r"(?P=\1)", "".join(parts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `re` warns about syntax reserved for future set operations
        try:
            re.compile(translated)
        except (re.error, RecursionError, OverflowError):
            return None
    return translated


@functools.lru_cache(maxsize=512)
def _size(pattern: str) -> int:
    """Estimate the number of automaton states for `pattern`; counted repetitions multiply."""
    total, last, outer = 0, 0, [0]
    for token in _TOKEN.finditer(pattern):
        if token[1] is not None:
            count = max(int(token[1]), int(token[2] or 0), 1)
            total += last * (count - 1)
            last *= count
        elif token[0].startswith("("):
            outer.append(total)
            total = last = 0
        elif token[0] == ")" and len(outer) > 1:
            last = total
            total += outer.pop()
        else:
            last = 1
            total += 1
    return total + sum(outer)


class _Worker:
    """A Python process that runs one search at a time."""

    idle: ClassVar[deque[_Worker]] = deque()

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @classmethod
    def search(cls, pattern: str, text: str, deadline: float) -> bool | None:
        """Return whether the pattern matches; None if the deadline passed."""
        try:
            worker = cls.idle.popleft()
        except IndexError:
            worker = cls()
        try:
            found = worker._ask(pattern, text, deadline)
        except BaseException:
            worker._kill()
            raise
        if found is None:
            worker._kill()
        else:
            cls.idle.append(worker)
        return found

    def _ask(self, pattern: str, text: str, deadline: float) -> bool | None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            try:
                stdin.write(json.dumps([pattern, text]).encode() + b"\n")
                stdin.flush()
                answered = selector.select(max(0.0, deadline - time.monotonic()))
                answer = stdout.readline() if answered else b""
            except OSError:
                answer = b""
        return {b"0\n": False, b"1\n": True}.get(answer)

    def _kill(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # the process is dead, so flushing buffered input fails
                pipe.close()
        self._process.wait()


@atexit.register
def _end_workers() -> None:
    while _Worker.idle:
        _Worker.idle.popleft()._kill()
