"""Experts in page-locked host memory, of which a GPU holds those that were used last.

A token uses a few experts of each layer, so a model may be larger than the GPU's memory. The experts that a product
needs are copied to slots on the device before it, in place of those that were used longest ago. Products see the same
bits as if all experts were resident. The host must know which experts a batch has chosen, so it waits for the router
in every layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from agentkit_kernels.packed import Packed


class PinnedStack:
    """Stacks [E, X, K] that share an input, with a number of their experts on the device.

    Attributes:
        bytes_per_expert: Bytes of one expert's matrices.
        copied: Number of experts that were copied to the device.
    """

    def __init__(self, parts: Sequence[Packed], device: torch.device) -> None:
        self.device = device
        self._host = [_pinned(part, device) for part in parts]
        self.experts = parts[0].shape[0]
        self.bytes_per_expert = sum(part.nbytes for part in parts) // self.experts
        self.copied = 0
        self._slots: OrderedDict[int, int] = OrderedDict()  # of each expert on the device, least recently used first
        self._free: list[int] = []

    def allocate(self, slots: int) -> None:
        """Allocate memory for `slots` experts on the device."""
        self.slots = min(slots, self.experts)
        self._free = list(range(self.slots))
        self._device = [_empty(part, self.slots, self.device) for part in self._host]
        self._slot_of = torch.zeros(self.experts, dtype=torch.int64, device=self.device)

    def load(self, experts: Sequence[int]) -> tuple[list[Packed], Tensor]:
        """Copy those of at most `slots` experts that are not on the device.

        Returns:
            The stacks of the experts on the device, and each expert's place in them, int64 [E].
        """
        missing = [expert for expert in experts if expert not in self._slots]
        for expert in experts:
            if expert in self._slots:
                self._slots.move_to_end(expert)
        for expert in missing:
            slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
            self._slots[expert] = slot
            self._slot_of[expert] = slot
            for device, host in zip(self._device, self._host, strict=True):
                device.data[slot].copy_(host.data[expert], non_blocking=True)
                device.scale[slot].copy_(host.scale[expert], non_blocking=True)
        self.copied += len(missing)
        return self._device, self._slot_of


def row_groups(chosen: Sequence[Sequence[int]], slots: int) -> Iterator[tuple[int, int, list[int]]]:
    """Divide rows into groups of neighbours that choose at most `slots` experts: first row, last row, experts.

    Raises:
        ValueError: a row alone chooses more.
    """
    first, experts = 0, dict[int, None]()
    for row, choice in enumerate(chosen):
        more = {**experts, **dict.fromkeys(choice)}
        if len(more) > slots:
            if len({*choice}) > slots:
                raise ValueError(f"a token chooses {len({*choice})} experts, and {slots} fit on the device")
            yield first, row, list(experts)
            first, more = row, dict.fromkeys(choice)
        experts = more
    if len(chosen) > first:
        yield first, len(chosen), list(experts)


def _pinned(part: Packed, device: torch.device) -> Packed:
    if device.type != "cuda":
        return part
    return Packed(part.format, part.data.pin_memory(), part.scale.pin_memory(), part.shape)


def _empty(part: Packed, slots: int, device: torch.device) -> Packed:
    data, scale = (torch.empty(slots, *of.shape[1:], dtype=of.dtype, device=device) for of in (part.data, part.scale))
    return Packed(part.format, data, scale, (slots, *part.shape[1:]))
