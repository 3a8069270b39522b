"""Exporter in the layout of the official DeepSeek-V4 checkpoints, readable by any loader of that layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from agentkit_engine.chat import Dialect
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.weights.checkpoint import CONFIG_FILE, INDEX_FILE, SIDECAR_FILE, WEIGHTS_FILE, Sidecar
from agentkit_engine.weights.formats import quantise_fp4, quantise_fp8, quantise_int8
from agentkit_engine.weights.names import Storage, checkpoint_tensors, scale_name
from agentkit_engine.weights.safetensors_file import write

Format = Literal["bf16", "fp32", "official", "int8"]


def export_checkpoint(
    decoder: Decoder,
    folder: Path,
    *,
    format: Format = "bf16",
    dialect: Dialect = "v4-preview",
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write config.json, agentkit.json and the weights into `folder`, which is created if missing.

    Args:
        decoder: the model to write.
        folder: the target; must not hold safetensors files.
        dialect: the chat dialect, for agentkit.json.
        format: `"bf16"` rounds every weight to bfloat16 except those the official layout stores as float32. `"fp32"`
            keeps all bits. `"official"` quantises like the released checkpoints: FP8 for large matrices, FP4 for routed
            experts, both with E8M0 scales. `"int8"` stores the same matrices in 8 bits, with a float32 scale per row.
        max_shard_bytes: larger models are split into several files with an index; a weight and its scale stay in one
            file. Peak memory beyond the model is one file's tensors.

    Raises:
        FileExistsError: the folder already holds safetensors files.
        OSError: a file cannot be written.
        ValueError: a routed expert's input size is not a multiple of 32 (`"official"` only).
    """
    write_tensors(folder, _stored_tensors(decoder, format), max_shard_bytes)
    write_config(folder, decoder.spec.to_config(), format, dialect)


def write_tensors(folder: Path, tensors: Iterable[dict[str, Tensor]], max_shard_bytes: int) -> None:
    """Write tensors into safetensors files of a new or empty folder; those of one dict stay in one file.

    Raises:
        FileExistsError: the folder already holds safetensors files.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if existing := sorted(folder.glob("*.safetensors*")):
        raise FileExistsError(f"{existing[0]} exists; export into an empty folder")

    parts: list[_Part] = []
    waiting: dict[str, Tensor] = {}
    for together in tensors:
        if waiting and _bytes(waiting) + _bytes(together) > max_shard_bytes:
            parts.append(_save_part(folder / f"part-{len(parts)}.safetensors", waiting))
            waiting = {}
        waiting |= together
    parts.append(_save_part(folder / f"part-{len(parts)}.safetensors", waiting))
    _name_parts(folder, parts)


def write_config(folder: Path, config: dict[str, Any], format: Format, dialect: Dialect) -> None:
    """Write config.json and agentkit.json for weights of a format."""
    config = {key: value for key, value in config.items() if key not in ("expert_dtype", "quantization_config")}
    config |= {"torch_dtype": "float32" if format == "fp32" else "bfloat16"}
    if format == "official":
        config |= {"expert_dtype": "fp4", "quantization_config": _QUANTIZATION}
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / SIDECAR_FILE, Sidecar(format_version=1, dialect=dialect).model_dump())


_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


@dataclass(frozen=True, slots=True)
class _Part:
    """One written file."""

    path: Path
    names: list[str]
    size: int


def _save_part(path: Path, tensors: dict[str, Tensor]) -> _Part:
    write(tensors, path, {"format": "pt"})
    return _Part(path, list(tensors), _bytes(tensors))


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _name_parts(folder: Path, parts: list[_Part]) -> None:
    """Rename the files to their official names, which contain their number, and write the index if there are
    several."""
    if len(parts) == 1:
        parts[0].path.rename(folder / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.path.rename(folder / file)
        weight_map |= dict.fromkeys(part.names, file)
    total = sum(part.size for part in parts)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _stored_tensors(decoder: Decoder, format: Format) -> Iterator[dict[str, Tensor]]:
    """Yield each tensor in stored form on the CPU under its official name, with its scale if it has one."""
    parameters = decoder.state_dict()
    for name, tensor in checkpoint_tensors(decoder.spec).items():
        value = parameters[tensor.parameter].detach()
        if tensor.expert is not None:
            value = value[tensor.expert]
        yield stored_form(name, value.cpu(), storage_in(tensor.storage, format))


def storage_in(official: Storage, format: Format) -> Storage:
    """Return the storage of a tensor in a format."""
    if official in ("f32", "i64") or format == "official":
        return official
    if format == "int8" and official in ("fp8", "fp4"):
        return "int8"
    return "f32" if format == "fp32" else "bf16"


def stored_form(name: str, value: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Return a tensor as it is stored, with its scale if it has one."""
    match storage:
        case "fp8":
            weight, scale = quantise_fp8(value)
            return {name: weight, scale_name(name): scale}
        case "fp4":
            weight, scale = quantise_fp4(value)
            return {name: weight, scale_name(name): scale}
        case "int8":
            packed = quantise_int8(value)
            return {name: packed.data, scale_name(name): packed.scale}
        case "bf16":
            return {name: value.to(torch.bfloat16).contiguous()}
        case "f32":
            return {name: value.to(torch.float32).contiguous()}
        case "i64":
            return {name: value.contiguous()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
