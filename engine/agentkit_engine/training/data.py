"""Training rows: token ids and a mask of the assistant's tokens, in batches of rows of similar length.

Dimension key: B rows of a batch, T tokens of a row (right-padded).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agentkit_engine.weights import safetensors_file

DTYPES = (torch.int32, torch.uint8, torch.int64, torch.int32, torch.uint8)
"""The dtypes of the fields of `Rows`, in their order."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Concatenated trajectories: row i is `[offsets[i], offsets[i + 1])` of `ids` and `mask`."""

    ids: Tensor  # int32 [N]
    mask: Tensor  # uint8 [N], 1 for tokens the assistant wrote
    offsets: Tensor  # int64 [R + 1]
    copied: Tensor  # int32 [C]: token ids that occur in names and values
    spread: Tensor  # uint8 [R], 1 if the row's fact is spread over a stretch of text

    @classmethod
    def pack(
        cls,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        copied: Sequence[int],
        spread: Sequence[bool] | None = None,
    ) -> Rows:
        """Build rows from `(ids, mask)` pairs; `spread` defaults to False for every row.

        Raises ValueError if a pair's lengths differ, or if `spread` does not have one value per row.
        """
        if spread is not None and len(spread) != len(rows):
            raise ValueError(f"spread has {len(spread)} values for {len(rows)} rows")
        for index, (ids, mask) in enumerate(rows):
            if len(ids) != len(mask):
                raise ValueError(f"row {index} has {len(ids)} ids but a mask of {len(mask)}")
        lengths = torch.tensor([0, *(len(ids) for ids, _ in rows)], dtype=torch.int64)
        return cls(
            ids=torch.tensor([i for ids, _ in rows for i in ids], dtype=torch.int32),
            mask=torch.tensor([m for _, mask in rows for m in mask], dtype=torch.uint8),
            offsets=lengths.cumsum(0),
            copied=torch.tensor(copied, dtype=torch.int32),
            spread=torch.tensor([False] * len(rows) if spread is None else spread, dtype=torch.uint8),
        )

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Read rows that `save` wrote.

        Raises ValueError if the file holds anything else.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        found = {name: (tensor.dtype, tensor.dim()) for name, tensor in tensors.items()}
        expected = {name: (dtype, 1) for name, dtype in zip(cls.__slots__, DTYPES, strict=True)}
        if found != expected:
            raise ValueError(f"{path} holds {found}; expected {expected} (names with dtype and dimensions)")
        rows = cls(**tensors)
        offsets = rows.offsets.tolist()
        if offsets[:1] != [0] or offsets[-1] != len(rows.ids) or any(a >= b for a, b in pairwise(offsets)):
            raise ValueError(f"{path}: offsets must rise from 0 to the {len(rows.ids)} ids")
        if len(rows.mask) != len(rows.ids) or len(rows.spread) != len(rows):
            raise ValueError(
                f"{path} has {len(rows.mask)} mask values for {len(rows.ids)} ids, "
                f"and {len(rows.spread)} spread values for {len(rows)} rows"
            )
        return rows

    def save(self, path: Path) -> None:
        safetensors_file.write({name: getattr(self, name) for name in self.__slots__}, path)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def length(self, row: int) -> int:
        return int(self.offsets[row + 1] - self.offsets[row])


@dataclass(frozen=True, slots=True)
class Batch:
    ids_BT: Tensor  # int64, right-padded with the pad id
    mask_BT: Tensor  # float32: 1 for tokens the assistant wrote, 0 for the others and for padding
    real_BT: Tensor  # bool: not padding
    window: int | None = None  # sliding window to train with; None for the model's
    spread: bool = False  # True if its facts are spread over stretches of text

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            mask_BT=self.mask_BT.to(device),
            real_BT=self.real_BT.to(device),
        )


def batches(rows: Rows, *, tokens: int, pad_id: int, seed: int) -> Iterator[Batch]:
    """Yield one epoch of batches of at most `tokens` padded tokens, in an order shuffled by `seed`.

    A batch holds rows of similar length. Rows with spread facts get batches of their own.
    Right padding is safe: every layer is causal, and no real token sees a compressed entry that includes a pad token.
    """
    rng = random.Random(seed)
    order = sorted(range(len(rows)), key=lambda row: (int(rows.spread[row]), rows.length(row), rng.random()))
    groups: list[list[int]] = [[]]
    for row in order:
        group = groups[-1]
        full = (len(group) + 1) * rows.length(row) > tokens
        if group and (full or rows.spread[row] != rows.spread[group[0]]):
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in groups:
        yield collate(rows, group, pad_id=pad_id)


def collate(rows: Rows, group: Sequence[int], *, pad_id: int) -> Batch:
    width = max(rows.length(row) for row in group)
    ids = torch.full((len(group), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(group), width))
    real = torch.zeros((len(group), width), dtype=torch.bool)
    for index, row in enumerate(group):
        start, stop = int(rows.offsets[row]), int(rows.offsets[row + 1])
        ids[index, : stop - start] = rows.ids[start:stop].long()
        mask[index, : stop - start] = rows.mask[start:stop].float()
        real[index, : stop - start] = True
    return Batch(ids, mask, real, spread=bool(rows.spread[group[0]]))
