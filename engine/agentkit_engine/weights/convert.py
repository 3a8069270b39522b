"""Conversion of a checkpoint into another number format, one tensor at a time, with a report of the errors."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from agentkit_engine.weights.checkpoint import GENERATION_FILE, read_layout
from agentkit_engine.weights.export import Format, storage_in, stored_form, write_config, write_tensors
from agentkit_engine.weights.formats import dequantise_fp4, dequantise_fp8
from agentkit_engine.weights.names import Storage, scale_name
from agentkit_engine.weights.safetensors_file import read

SHARD_BYTES = 1 << 30
"""Size of the written files, and most of the memory that a conversion takes besides its largest tensor."""
OTHER_FILES = ("tokenizer.json", "tokenizer_config.json", GENERATION_FILE)
_DTYPES: dict[Storage, str] = {"bf16": "BF16", "f32": "F32", "i64": "I64", "fp8": "F8_E4M3"}


@dataclass(slots=True)
class Kind:
    """The tensors of one name in all layers and experts, and what the conversion changed in them.

    Attributes:
        relative: Root mean square of the errors over that of the values.
        largest: Largest error of a value.
    """

    name: str
    storage: Storage
    tensors: int = 0
    largest: float = 0.0
    _values: float = 0.0
    _errors: float = 0.0

    @property
    def relative(self) -> float:
        return math.sqrt(self._errors / self._values) if self._values else 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count a tensor, before and after."""
        errors = after.float() - before.float()
        self.tensors += 1
        self.largest = max(self.largest, float(errors.abs().max()))
        self._values += float(before.float().double().square().sum())
        self._errors += float(errors.double().square().sum())


def convert_checkpoint(source: Path, target: Path, *, format: Format) -> list[Kind]:
    """Write the checkpoint in `source` into the new or empty folder `target`, and report the errors per kind of tensor.

    Tensors that are stored as wanted are copied. A DSpark draft head is left out, as it is when a model is loaded.

    Raises:
        CheckpointError: see `load_checkpoint`.
        FileExistsError: the target already holds safetensors files.
        OSError: a file of the target cannot be written.
    """
    layout = read_layout(source)
    kinds: dict[str, Kind] = {}

    def tensors() -> Iterator[dict[str, Tensor]]:
        for name, tensor in layout.expected.items():
            storage, found = storage_in(tensor.storage, format), layout.stored[name]
            before = layout.values(name)
            scale = layout.stored.get(scale_name(name))
            wanted = _DTYPES.get(storage, "I8"), _stored_shape(tensor.shape, storage)
            as_wanted = (found.dtype, found.shape) == wanted
            if as_wanted and (scale is None or scale.dtype == ("F32" if storage == "int8" else "F8_E8M0")):
                written = {one.name: value for one in (found, scale) if one is not None for value in read([one])}
            else:
                written = stored_form(name, before, storage)
            kind = re.sub(r"\.\d+\.", ".", name).removesuffix(".weight")
            kinds.setdefault(kind, Kind(kind, storage)).add(before, _values(written, name, storage))
            yield written

    write_tensors(target, tensors(), SHARD_BYTES)
    write_config(target, layout.config, format, layout.dialect)
    for file in OTHER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    return list(kinds.values())


def _stored_shape(shape: tuple[int, ...], storage: Storage) -> tuple[int, ...]:
    return (shape[0], shape[1] // 2) if storage == "fp4" else shape


def _values(written: dict[str, Tensor], name: str, storage: Storage) -> Tensor:
    value = written[name]
    match storage:
        case "fp8":
            return dequantise_fp8(value, written[scale_name(name)])
        case "fp4":
            return dequantise_fp4(value, written[scale_name(name)])
        case "int8":
            return value.float() * written[scale_name(name)][:, None]
        case _:
            return value
