"""Packed matrices that are still in a checkpoint's files. Backends read their rows straight into place.

Dimension key: X outputs, K inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agentkit_engine.errors import CheckpointError
from agentkit_engine.weights.formats import quantise_int8
from agentkit_engine.weights.names import TensorSpec, scale_name
from agentkit_engine.weights.safetensors_file import StoredTensor, read
from agentkit_kernels.packed import FP8_BLOCK, MOST_EXPONENT, Format, Packed

_NAN = 0x7F
"""E4M3's only special value, without its sign."""


def stored_format(found: StoredTensor, shape: tuple[int, ...]) -> Format | None:
    """Return the number format of a stored matrix [X, K]; None for a plain float dtype.

    An I8 tensor holds int8 values if it has the matrix's own shape, and two FP4 codes per byte otherwise.
    """
    if found.dtype == "F8_E4M3":
        return "fp8"
    if found.dtype == "I8":
        return "int8" if found.shape == shape else "mxfp4"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """A matrix [X, K] in a file, or a stack of them; see `agentkit_kernels.packed.PackedRows`.

    Attributes:
        format: The format in which rows are returned. Rows stored otherwise are quantised to int8 when they are read.
        stored: The codes or values, and the scales, of each expert.
        first: The row of the file that is row 0 here.
        ahead: Whether what follows the rows in the file is read soon; false for experts that stay in the file.
    """

    format: Format
    shape: tuple[int, ...]
    scale_dtype: torch.dtype
    stored: Sequence[tuple[StoredTensor, StoredTensor | None]]
    first: int = 0
    ahead: bool = True

    def rows(self, first: int, last: int, expert: int | None = None) -> Packed:
        """See `PackedRows`.

        Raises:
            CheckpointError: the file is shorter than its header says, or it holds NaN, infinity, or a scale that is out
                of range.
        """
        found, scale = self.stored[expert or 0]
        kept = stored_format(found, (found.shape[0], self.shape[-1]))
        values = read_rows(found, first + self.first, last + self.first, ahead=self.ahead)
        shape = (last - first, self.shape[-1])
        if kept is None or scale is None:
            return quantise_int8(_finite(values, found))
        block = FP8_BLOCK if kept == "fp8" else 1
        begin, end = (first + self.first) // block, -(-(last + self.first) // block)
        packed = Packed(
            kept,
            values.view(torch.uint8) if kept == "mxfp4" else values,
            _in_range(read_rows(scale, begin, end, ahead=self.ahead), scale),
            shape,
        )
        if kept == "fp8" and int((values.view(torch.uint8) & _NAN).max()) == _NAN:
            raise CheckpointError(found.path, "found NaN, expected finite weights", tensor=found.name)
        return packed if self.format == kept else quantise_int8(packed.dequantise())

    def __getitem__(self, rows: slice) -> StoredRows:
        first, last, _ = rows.indices(self.shape[0])
        return replace(self, first=self.first + first, shape=(last - first, self.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in memory."""
        *experts, outputs, inputs = self.shape
        count = outputs * (experts[0] if experts else 1)
        width = {"fp8": 128, "mxfp4": 32, "int8": inputs}[self.format]
        codes = inputs // 2 if self.format == "mxfp4" else inputs
        return count * (codes + -(-inputs // width) * self.scale_dtype.itemsize)


def read_rows(tensor: StoredTensor, first: int, last: int, *, ahead: bool = True) -> Tensor:
    """Read some rows of a stored tensor; see `read`."""
    size = tensor.size // tensor.shape[0]
    some = replace(
        tensor, shape=(last - first, *tensor.shape[1:]), start=tensor.start + first * size, size=(last - first) * size
    )
    [value] = read([some], ahead=ahead)
    return value


def find_packed(
    expected: Mapping[str, TensorSpec], stored: Mapping[str, StoredTensor], *, int8: bool, group_rows: int
) -> dict[str, StoredRows]:
    """Return the parameters that stay packed, by name: those whose tensors all have one packed format.

    Args:
        expected: The checkpoint's tensors.
        stored: All tensors of the files.
        int8: Quantise every matrix that the official checkpoints quantise.
        group_rows: Rows of `wo_a` that are multiplied apart; they must be whole FP8 blocks.
    """
    tensors: dict[str, list[str]] = {}
    for name, tensor in expected.items():
        tensors.setdefault(tensor.parameter, []).append(name)
    found: dict[str, StoredRows] = {}
    for parameter, names in tensors.items():
        spec = expected[names[0]]
        formats = {stored_format(stored[name], spec.shape) for name in names}
        pairs = [(stored[name], stored.get(scale_name(name))) for name in names]
        scales = {None if scale is None else scale.dtype for _, scale in pairs}
        shape = spec.shape if spec.expert is None else (len(names), *spec.shape)
        if int8 and spec.storage in ("fp8", "fp4"):
            found[parameter] = StoredRows("int8", shape, torch.float32, pairs)
        elif len(formats) == len(scales) == 1 and None not in formats:
            [kept], [dtype] = formats, scales
            if kept == "fp8" and parameter.endswith("wo_a.weight") and group_rows % FP8_BLOCK:
                continue
            assert kept is not None
            of_scales = torch.float8_e8m0fnu if dtype == "F8_E8M0" else torch.float32
            found[parameter] = StoredRows(kept, shape, of_scales, pairs)
    return found


def _finite(values: Tensor, found: StoredTensor) -> Tensor:
    values = values.float()
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(found.path, "found NaN or infinity, expected finite weights", tensor=found.name)
    return values


def _in_range(scale: Tensor, found: StoredTensor) -> Tensor:
    if scale.dtype != torch.float8_e8m0fnu:
        return _finite(scale, found)
    if (largest := int(scale.view(torch.uint8).max())) > MOST_EXPONENT:
        problem = "NaN" if largest == 255 else f"a scale of 2^{largest - 127}"
        raise CheckpointError(
            found.path, f"found {problem}, expected at most 2^{MOST_EXPONENT - 127}", tensor=found.name
        )
    return scale
