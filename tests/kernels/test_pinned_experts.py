"""Experts in host memory with slots on a device, which is the CPU here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentkit_kernels.packed import Packed
from agentkit_kernels.pinned_experts import PinnedStack, row_groups

EXPERTS = 6


def stacks() -> list[Packed]:
    """Return two stacks in which every byte of an expert is its number."""
    numbers = torch.arange(EXPERTS, dtype=torch.int8)[:, None, None]
    return [
        Packed("int8", (numbers + 10 * part).expand(-1, 4, 8).contiguous(), torch.ones(EXPERTS, 4), (EXPERTS, 4, 8))
        for part in range(2)
    ]


@given(st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True), max_size=12))
def test_slots_hold_the_experts_that_were_used_last(calls: list[list[int]]) -> None:
    stack = PinnedStack(stacks(), torch.device("cpu"))
    stack.allocate(3)
    recent: list[int] = []
    copied = 0
    for experts in calls:
        copied += len(set(experts) - set(recent[-3:]))
        parts, slot_of = stack.load(experts)
        for expert in experts:
            assert [int(part.data[slot_of[expert], 0, 0]) for part in parts] == [expert, expert + 10]
        missing = [expert for expert in experts if expert not in recent[-3:]]
        kept = [expert for expert in recent[-3:] if expert not in experts]
        recent = [*kept, *(expert for expert in experts if expert not in missing), *missing]
        assert stack.copied == copied


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True), max_size=20), st.integers(2, 6))
def test_groups_cover_all_rows_and_fit(chosen: list[list[int]], slots: int) -> None:
    groups = list(row_groups(chosen, slots))
    assert [row for first, last, _ in groups for row in range(first, last)] == list(range(len(chosen)))
    for first, last, experts in groups:
        assert set(experts) == {expert for row in chosen[first:last] for expert in row}
        assert len(experts) == len(set(experts)) <= slots


def test_a_row_of_more_experts_than_slots_is_an_error() -> None:
    with pytest.raises(ValueError, match="a token chooses 3 experts, and 2 fit on the device"):
        list(row_groups([[1, 2, 3]], 2))
