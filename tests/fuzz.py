"""Fuzz tests: inputs near valid documents, and how many of them a test draws.

A fuzz test runs with few examples among the other tests, and with many behind the marker `hostile`:

    @amounts(100, 5_000)
    def test_any_text_is_a_task_or_an_error(examples: int) -> None:
        fuzz(check, near_text(GOOD, PIECES), examples)

`AGENTKIT_FUZZ_EXAMPLES` replaces both numbers.
"""

from __future__ import annotations

import copy
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T = TypeVar("T")
SOON = timedelta(seconds=20)
"""Far above the time of any example on a loaded machine, and far below that of a successful attack."""
MAX_GROWTH_KIB = 1 << 20
"""Bound on the growth of the process over all examples of a test, most of which hypothesis keeps itself."""


def amounts(quick: int, long: int) -> pytest.MarkDecorator:
    """Pass a number of examples to a test as `examples`: the first one always, the second one if `hostile`."""
    given_number = os.environ.get("AGENTKIT_FUZZ_EXAMPLES")
    few, many = (int(given_number or number) for number in (quick, long))
    marks = [pytest.mark.hostile, pytest.mark.timeout(1800)]
    cases = [pytest.param(few, id="quick"), pytest.param(many, id="long", marks=marks)]
    return pytest.mark.parametrize("examples", cases)


def fuzz(check: Callable[[T], object], inputs: st.SearchStrategy[T], examples: int) -> None:
    """Call `check` with many inputs. It fails if it raises, or if one of them takes too long or too much memory."""

    @settings(max_examples=examples, deadline=SOON, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def run(value: T) -> None:
        check(value)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


odd: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [None, True, False, "", "\0", "\ud800", "a\nb", "..", "/", "\u2028", "x" * 300, [], {}, [[]], {"": {}}, [None]]
    ),
    st.sampled_from([0, -1, 1, 1 << 31, 1 << 63, -(1 << 63), 10**30, 0.5, -0.0, 1e308]),
    st.text(max_size=12),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
"""Values of JSON that readers may not expect."""


@st.composite
def near(draw: st.DrawFn, document: Any, most: int = 4) -> Any:
    """Draw a copy of a JSON value with up to `most` changes: values replaced, left out, repeated, moved or renamed."""
    root = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, most))):
        holder, key = _place(draw, root)
        value = holder[key]
        change = draw(st.sampled_from(["alike", "alike", "alike", "leave out", "repeat", "move", "replace", "rename"]))
        if change == "alike":
            holder[key] = copy.deepcopy(draw(_alike(value, [each for name, each in _items(root) if name == key])))
        elif change == "replace" or holder is root:
            holder[key] = copy.deepcopy(draw(odd))
        elif isinstance(holder, dict):
            del holder[key]
            if change != "leave out":
                holder[draw(st.sampled_from([*holder, "x"]) | st.text(max_size=8))] = value
        else:
            del holder[key]
            if change != "leave out":
                for _ in range(2 if change == "repeat" else 1):
                    holder.insert(draw(st.integers(0, len(holder))), copy.deepcopy(value))
    return root[0]


def _place(draw: st.DrawFn, root: list[Any]) -> tuple[Any, Any]:
    """Draw a place of a value inside `root`, each branch as likely as its siblings, however large they are."""
    holder: Any = root
    key: Any = 0
    while (inner := holder[key]) and isinstance(inner, dict | list) and draw(st.integers(0, 4)):
        holder, key = inner, draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
    return holder, key


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every key or index inside a value, with what is there."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield key, inner
        if isinstance(inner, dict | list):
            yield from _items(inner)


def _alike(value: Any, others: list[Any]) -> st.SearchStrategy[Any]:
    """Draw a value of the same type, or one that the same key has elsewhere."""
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-2, 5) | st.integers(),
        float: st.floats(-2, 2) | st.floats(allow_nan=False),
        str: near_text(value if isinstance(value, str) else "", ["\0", "\ud800", "é"]) | st.text(max_size=8),
        list: st.just(value).map(lambda items: items[::-1]) | st.just([]),
        dict: st.just({}),
    }
    return st.sampled_from(others) | kinds.get(type(value), odd)


@st.composite
def near_text(draw: st.DrawFn, text: str, pieces: Sequence[str], most: int = 4) -> str:
    """Draw a text with up to `most` spans left out, repeated or replaced by some of `pieces`."""
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        new = draw(st.sampled_from(["", 2 * text[start:end], *pieces]) | st.text(max_size=4))
        text = text[:start] + new + text[end:]
    return text
