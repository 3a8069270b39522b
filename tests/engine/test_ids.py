"""`Ids` behaves like a list, after any operation on it and its forks."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit_engine.ids import BLOCK, Ids

sizes = st.sampled_from([0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5])
places = st.one_of(st.none(), sizes, sizes.map(lambda size: -size))
actions = st.lists(
    st.tuples(st.sampled_from(["append", "extend", "cut", "fork"]), st.integers(0, 3), sizes), max_size=8
)


@given(first=sizes, todo=actions, start=places, stop=places, step=st.sampled_from([None, 1, 3, -1]))
def test_as_lists(first: int, todo: list[tuple[str, int, int]], start: int, stop: int, step: int | None) -> None:
    pairs = [(Ids(range(first)), list(range(first)))]
    for number, (action, index, size) in enumerate(todo):
        ids, expected = pairs[index % len(pairs)]
        match action:
            case "append":
                ids.append(number)
                expected.append(number)
            case "extend":
                ids.extend(range(number, number + size))
                expected += range(number, number + size)
            case "cut" if size <= len(expected):
                ids.cut(size)
                del expected[size:]
            case "fork":
                pairs.append((ids.fork(), expected.copy()))
    for ids, expected in pairs:
        assert len(ids) == len(expected) and list(ids) == expected
        assert ids[start:stop:step] == expected[start:stop:step]
        assert bool(ids.last) == bool(expected) and ids.last == expected[len(expected) - len(ids.last) :]
        for place in {0, BLOCK - 1, BLOCK, len(expected) - 1, -1, -len(expected)}:
            if -len(expected) <= place < len(expected):
                assert ids[place] == expected[place]
            else:
                with pytest.raises(IndexError, match=f"expected one of {len(expected)} ids"):
                    ids[place]


def test_a_fork_uses_little_memory() -> None:
    ids = Ids(range(1_000_000))
    fork = ids.fork()
    own = [fork._full, fork.last]
    assert sum(map(sys.getsizeof, own)) < 40_000
    assert all(a is b for a, b in zip(ids._full, fork._full, strict=True))
