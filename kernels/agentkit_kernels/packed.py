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
from typing import Literal

import torch
from torch import Tensor

Format = Literal["fp8", "mxfp4", "int8"]

FP8_BLOCK = 128
MXFP4_GROUP = 32

_DATA_DTYPE = {"fp8": torch.float8_e4m3fn, "mxfp4": torch.uint8, "int8": torch.int8}


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
