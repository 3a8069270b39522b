"""Experts that stay in their files, so that a checkpoint may be larger than memory.

A token uses a few experts of each layer. Their matrices are read and laid out when a product needs them, and those
that were used last stay in memory, up to a number of bytes. The products are those of resident experts, bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from agentkit_kernels.cpu.layout import Matrix, bytes_per_expert, pack_stack
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.packed import PackedRows

Use = Callable[[Sequence[tuple[int, Matrix]]], None]
"""Takes experts with their matrices, and keeps neither."""


class ExpertStore:
    """The matrices of one model's experts that are in memory. Not thread-safe.

    Attributes:
        capacity: Bytes of matrices that are kept; more are never in memory.
        held: Bytes of matrices that are in memory.
        read_bytes: Bytes of matrices that were read.
        read_experts: The experts that were read at least once, each as (layer's stack, expert).
    """

    def __init__(self, capacity: int, workers: Workers) -> None:
        self.capacity, self.workers = capacity, workers
        self.held = self.read_bytes = 0
        self.read_experts: set[tuple[StoredStack, int]] = set()
        self._kept: OrderedDict[tuple[StoredStack, int], Matrix] = OrderedDict()

    def each(self, stack: StoredStack, experts: Sequence[int], use: Use) -> None:
        """Call `use` with all `experts` of a stack, as many at once as fit into memory, those that are there first."""
        experts = sorted(experts, key=lambda expert: (stack, expert) not in self._kept)
        step = self.capacity // stack.bytes_per_expert
        for first in range(0, len(experts), step):
            use(self._matrices(stack, experts[first : first + step]))

    def clear(self) -> None:
        """Forget all matrices, and what was counted."""
        self._kept.clear()
        self.read_experts.clear()
        self.held = self.read_bytes = 0

    def _matrices(self, stack: StoredStack, experts: Sequence[int]) -> list[tuple[int, Matrix]]:
        missing = []
        for expert in experts:
            if (stack, expert) in self._kept:
                self._kept.move_to_end((stack, expert))
            else:
                missing.append(expert)
        while self.held + len(missing) * stack.bytes_per_expert > self.capacity:
            (oldest, _), _ = self._kept.popitem(last=False)
            self.held -= oldest.bytes_per_expert
        read: dict[int, Matrix] = {}
        self.workers.each(lambda expert: read.update({expert: stack.read(expert)}), missing)
        for expert in missing:
            self._kept[stack, expert] = read[expert]
        self.held += len(missing) * stack.bytes_per_expert
        self.read_bytes += len(missing) * stack.bytes_per_expert
        self.read_experts.update((stack, expert) for expert in missing)
        return [(expert, self._kept[stack, expert]) for expert in experts]


class StoredStack:
    """Stacks [E, X, K] that share an input, in files.

    Raises:
        ValueError: the parts have different formats, or not even one expert fits into the store.
    """

    def __init__(self, parts: Sequence[PackedRows], store: ExpertStore) -> None:
        self.parts, self.store = parts, store
        self.bytes_per_expert = bytes_per_expert(parts)
        if self.bytes_per_expert > store.capacity:
            raise ValueError(
                f"expert_cache_bytes must hold at least one expert's matrix, {self.bytes_per_expert} bytes, "
                f"got {store.capacity}"
            )

    def read(self, expert: int) -> Matrix:
        """Read one expert and lay it out, in this thread."""
        [matrix] = pack_stack(self.parts, _ALONE, [expert])
        return matrix

    def each(self, experts: Sequence[int], use: Use) -> None:
        """See `ExpertStore.each`."""
        self.store.each(self, experts, use)


_ALONE = Workers(1)
