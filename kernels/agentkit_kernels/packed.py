"""Packed weights: 8-bit and 4-bit values with their scales, as checkpoints store them and all backends multiply them.

Dimension key: X output rows, K input columns; leading dimensions, such as experts, are `...`.

| format | data | scale |
|---|---|---|
| `fp8` | float8_e4m3fn [..., X, K] | [..., ceil(X/128), ceil(K/128)]: one per 128 x 128 block |
| `mxfp4` | uint8 [..., X, K/2]: two E2M1 codes, the even column in the low half | [..., X, K/32]: one per 32 columns |
| `int8` | int8 [..., X, K] | [..., X]: one per row |

Scales multiply. They are float8_e8m0fnu or float32.
Source: DeepSeek-V4 `inference/kernel.py`; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Format = Literal["fp8", "mxfp4", "int8"]

FP8_BLOCK = 128
MXFP4_GROUP = 32

MOST_EXPONENT = 240
"""Largest E8M0 byte: 2^113. All codes times a larger scale would not fit in a float32."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes of MXFP4."""

_DATA_DTYPE = {"fp8": torch.float8_e4m3fn, "mxfp4": torch.uint8, "int8": torch.int8}


class PackedRows(Protocol):
    """A packed matrix, or a stack of them, whose rows can be had in pieces: in memory (`Packed`), or in a file."""

    @property
    def format(self) -> Format: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def scale_dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""

    def rows(self, first: int, last: int, expert: int | None = None) -> Packed:
        """Return some rows of the matrix, or of one in a stack; `first` is a multiple of `FP8_BLOCK`."""

    def __getitem__(self, rows: slice) -> PackedRows:
        """Return rows of a matrix, from a multiple of `FP8_BLOCK` on."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One packed matrix [X, K], or a stack of them.

    Attributes:
        format: The number format.
        data: The codes.
        scale: Their scales.
        shape: Shape of the matrix that this represents, [..., X, K].

    Raises:
        ValueError: A shape or dtype disagrees with the table above.
    """

    format: Format
    data: Tensor
    scale: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        *lead, rows, columns = self.shape
        if self.format == "mxfp4" and columns % MXFP4_GROUP:
            raise ValueError(f"mxfp4 needs a multiple of {MXFP4_GROUP} input columns, got shape {self.shape}")
        data = (*lead, rows, columns // 2 if self.format == "mxfp4" else columns)
        scale = {
            "fp8": (*lead, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)),
            "mxfp4": (*lead, rows, columns // MXFP4_GROUP),
            "int8": (*lead, rows),
        }[self.format]
        if tuple(self.data.shape) != data or tuple(self.scale.shape) != scale:
            raise ValueError(
                f"{self.format} of shape {self.shape} needs data {data} and scale {scale}, "
                f"got {tuple(self.data.shape)} and {tuple(self.scale.shape)}"
            )
        if self.data.dtype != _DATA_DTYPE[self.format]:
            raise ValueError(f"{self.format} data must be {_DATA_DTYPE[self.format]}, got {self.data.dtype}")
        if self.scale.dtype not in (torch.float8_e8m0fnu, torch.float32):
            raise ValueError(f"scales must be float8_e8m0fnu or float32, got {self.scale.dtype}")

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the scales."""
        return self.scale.dtype

    def rows(self, first: int, last: int, expert: int | None = None) -> Packed:
        """See `PackedRows`."""
        data, scale = (self.data, self.scale) if expert is None else (self.data[expert], self.scale[expert])
        block = FP8_BLOCK if self.format == "fp8" else 1
        scale = scale[first // block : -(-last // block)]
        return Packed(self.format, data[first:last], scale, (last - first, self.shape[-1]))

    def __getitem__(self, rows: slice) -> Packed:
        first, last, _ = rows.indices(self.shape[0])
        return self.rows(first, last)

    def dequantise(self) -> Tensor:
        """Return the values, float32: codes times scales."""
        scale = self.scale.float()
        if self.format == "int8":
            return self.data.float() * scale[..., None]
        if self.format == "mxfp4":
            codes = torch.stack((self.data & 15, self.data >> 4), -1).flatten(-2).long()
            return torch.tensor(E2M1, device=codes.device)[codes] * scale.repeat_interleave(MXFP4_GROUP, -1)
        rows, columns = self.shape[-2:]
        scale = scale.repeat_interleave(FP8_BLOCK, -2)[..., :rows, :].repeat_interleave(FP8_BLOCK, -1)[..., :columns]
        return self.data.float() * scale


def in_memory(part: Tensor | PackedRows) -> Tensor | Packed:
    """Read a packed part that is still in a file; return any other part as it is."""
    if isinstance(part, (Tensor, Packed)):
        return part
    if len(part.shape) == 2:
        return part.rows(0, part.shape[0])
    experts = [part.rows(0, part.shape[1], expert) for expert in range(part.shape[0])]
    data, scale = (torch.stack([getattr(one, name) for one in experts]) for name in ("data", "scale"))
    return Packed(part.format, data, scale, part.shape)
