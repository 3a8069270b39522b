"""The calls that are compiled and counted, and the tensors for them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from agentkit_kernels import triton as kernels
from agentkit_kernels.calls import FLASH, TINY, Call, Make, Shapes

ROWS = {"decode": 8, "prefill": 2048}
"""Rows of a compiled call. 8 is no multiple of 16, which Triton would specialise for."""
COMPILED = {shapes.name: shapes for shapes in (FLASH, TINY)}
COUNTED = Shapes("counted", 512, 16, 128, 64, 256, 2, 128, 128, 16, 128, 64, 4, 20, 8, 2, 256, 2048)
"""Shapes that fill their tiles and are small enough to interpret."""
COUNTED_ROWS = {"decode": 2, "prefill": 128}
COUNTED_AT_FLASH = ("attention",)
"""Files whose decoding is counted at V4-Flash's shapes, with one row: their traffic depends on the number of splits."""


class OnMeta:
    """Makes tensors that have shapes and strides but no memory."""

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def ints(self, values: Sequence[int] | range, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(len(values), dtype=dtype, device="meta")


class Random:
    """Makes the same random tensors in every run."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if dtype.itemsize > 1:
            return torch.randn(shape, generator=self._generator, device=self._device).to(dtype)
        # FP8 codes of 0.5 to 3.75; FP4 and power-of-two scales have no code that is not a number in this range either.
        codes = torch.randint(0x30, 0x48, shape, generator=self._generator, device=self._device, dtype=torch.uint8)
        return codes.view(dtype)

    def ints(self, values: Sequence[int] | range, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self._device)


def kernel_files() -> list[str]:
    """Return the names of the files in `agentkit_kernels.triton` that list calls."""
    names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__))
    return [name for name in names if hasattr(_module(name), "calls")]


def calls(file: str, shapes: Shapes, rows: Mapping[str, int], make: Make) -> Iterator[Call]:
    """Yield the calls that one of these files lists for decoding and prefill, named by the phase.

    A file whose launcher is called differently in the two phases starts the names of its calls with the phase.
    """
    for phase, count in rows.items():
        for call in _module(file).calls(shapes, count, make):
            if not any(call.name.startswith(other) for other in ROWS if other != phase):
                yield replace(call, name=f"{phase}, {call.name.removeprefix(f'{phase}, ')}")


def counted_calls(file: str, make: Make) -> Iterator[Call]:
    """Yield the calls of a file that are counted; see `calls`."""
    rows = COUNTED_ROWS
    if file in COUNTED_AT_FLASH:
        yield from calls(file, FLASH, {"decode": 1}, make)
        rows = {"prefill": COUNTED_ROWS["prefill"]}
    yield from calls(file, COUNTED, rows, make)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{kernels.__name__}.{name}")
