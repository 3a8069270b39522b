"""Loader for a folder in the layout of the official DeepSeek-V4 checkpoints.

    config.json                        the architecture, official keys
    model.safetensors                  all tensors under their official names; or
    model.safetensors.index.json       {"weight_map": {tensor: file}}, and the files it names
    agentkit.json                      optional: {"format_version": 1, "dialect": "v4-preview"}
    generation_config.json             optional: do_sample and the sampling parameters; other keys are ignored

A tensor is bf16, fp16 or fp32. A matrix may also be FP8 e4m3 with a `.scale` per 128 x 128 block, and a routed expert
packed FP4 with a `.scale` per 32 inputs; scales are E8M0 or fp32. The matrices that the official checkpoints quantise
may also be int8 with an fp32 `.scale` per row (`agentkit convert`). The dtypes are read from the files, not from the
configuration.

Every tensor of the architecture must be present with its shape, and unknown tensors are an error. Ignored are:

* `mtp.*` of checkpoints with a DSpark draft head (the configuration has `dspark_*` keys, or there is an
  `mtp.0.main_proj`): the engine does not implement DSpark, and plain decoding does not need it;
* the index's `metadata`, and each file's `__metadata__`;
* other files in the folder (tokenizer, README, ...), except a `*.safetensors` file that is not in the index.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from agentkit_engine.chat import Dialect
from agentkit_engine.errors import CheckpointError
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.spec import ConfigError, ModelSpec
from agentkit_engine.untrusted import describe, parse_json, read_regular, shorten
from agentkit_engine.weights.formats import FP4_GROUP, FP8_BLOCK, dequantise_fp4, dequantise_fp8
from agentkit_engine.weights.memory import check_memory
from agentkit_engine.weights.names import TensorSpec, checkpoint_tensors, scale_name
from agentkit_engine.weights.safetensors_file import StoredTensor, read, read_header, runs
from agentkit_engine.weights.stored_rows import StoredRows, find_packed, read_rows, stored_format

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SIDECAR_FILE = "agentkit.json"
GENERATION_FILE = "generation_config.json"
MAX_JSON_BYTES = 1 << 20
MAX_INDEX_BYTES = 32 << 20
"""Enough for 250,000 tensors; the largest released checkpoint has 140,000."""
READERS = 2
"""Threads that read weights: one copies while another waits for the disk or for memory."""
RUN_BYTES = 1 << 20
"""Adjacent tensors of a file are read together, up to this many bytes."""
SLICE_BYTES = 2 << 20
"""Larger tensors are read in slices of this size."""


class Sidecar(BaseModel):
    """`agentkit.json`: settings that the official files lack."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1]
    dialect: Dialect


class _GenerationConfig(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """A model folder whose headers have been checked.

    Attributes:
        config: config.json.
        stored: Every tensor of the files, by name; without `mtp.*` if the checkpoint has a DSpark draft head.
        expected: The tensors of the architecture, without scales.
    """

    config: dict[str, Any]
    spec: ModelSpec
    dialect: Dialect
    stored: dict[str, StoredTensor]
    expected: dict[str, TensorSpec]

    def values(self, name: str) -> Tensor:
        """Read one tensor, dequantised and checked."""
        scale = self.stored.get(scale_name(name))
        [value], scales = read([self.stored[name]]), [] if scale is None else read([scale])
        return _checked(self.stored[name], value, next(iter(scales), None), self.spec)


def read_layout(folder: Path) -> Layout:
    """Read and check the headers of a model folder.

    Raises:
        CheckpointError: a file or tensor is missing, unknown, truncated, corrupted, or of the wrong shape or dtype.
    """
    config = _read_json(folder / CONFIG_FILE)
    try:
        spec = ModelSpec.from_config(config)
    except ConfigError as error:
        raise CheckpointError(folder / CONFIG_FILE, str(error).removeprefix(f"{CONFIG_FILE}: ")) from error
    stored = _read_headers(folder)

    dspark = any(key.startswith("dspark_") for key in config) or "mtp.0.main_proj.weight" in stored
    if dspark:
        spec = dataclasses.replace(spec, mtp_layers=(), draft="dspark")
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("mtp.")}
    least = 3 * spec.n_routed_experts * (len(spec.layers) + len(spec.mtp_layers))
    # Check first: building the names below would take time and memory in proportion to the claimed experts.
    if least > len(stored):
        raise CheckpointError(
            folder / CONFIG_FILE,
            f"{len(spec.layers)} layers of {spec.n_routed_experts} experts have more than {least} tensors, found "
            f"{len(stored)} in the checkpoint's files; expected the configuration of these weights",
        )
    expected = checkpoint_tensors(spec)
    _check_names(folder, stored, expected)
    for name, tensor in expected.items():
        _check_tensor(stored, name, tensor)
    return Layout(config, spec, _dialect(folder, dspark), stored, expected)


def load_checkpoint(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    packed: bool = False,
    experts: range | None = None,
    expert_cache_bytes: int | None = None,
    devices: int = 1,
    lay_out: Callable[[Sequence[Tensor]], None] | None = None,
) -> tuple[Decoder, Dialect]:
    """Load the model in `folder` and return it with its chat dialect.

    All headers are checked before any weight is read. Peak memory beyond the model is `READERS` times the larger of
    `RUN_BYTES` and the largest stored tensor, plus one tensor per reader in float32 with its expanded scale.

    Tensors that the official layout stores as float32 (mixing, sinks, biases, position embeddings) stay float32.

    Args:
        folder: the model folder.
        device: device of the parameters.
        dtype: dtype of the other weights. If None, a weight is bfloat16 where that is lossless (stored as bf16, or as
            FP8 or FP4 with E8M0 scales), else float32. `torch.int8` quantises the large matrices when they are packed.
        packed: leave FP8, FP4 and int8 matrices in their files: `Decoder.packed` has them instead of parameters, and
            a backend reads and checks them when it packs the decoder.
        experts: the experts to read if not all, those of a rank (`runtime/parallel.py`); the others stay uninitialised.
        expert_cache_bytes: memory for routed experts, which stay in their files; None for all of them. A backend reads
            and checks each when it uses it.
        devices: the devices that divide packed experts among themselves; see `check_memory`.
        lay_out: called with weights that share an input while they are uninitialised; may move them in memory.

    Returns:
        The decoder, and the dialect: the sidecar's if there is one, else `v4-0731` for DSpark checkpoints and
        `v4-preview` for all others.

    Raises:
        CheckpointError: a file or tensor is missing, unknown, truncated, corrupted, or of the wrong shape or dtype.
        ModelTooLargeError: the weights need more memory than the device has left.
        ValueError: `expert_cache_bytes` is given, and the experts are not packed.
    """
    layout = read_layout(folder)
    spec, stored, expected = layout.spec, layout.stored, layout.expected
    int8 = dtype == torch.int8
    left = find_packed(expected, stored, int8=int8, group_rows=spec.o_lora_rank) if packed or int8 else {}
    dtypes = _bf16_where_it_suffices(stored, expected) if dtype is None or int8 else dtype
    if experts is not None:
        expected = {name: each for name, each in expected.items() if each.expert is None or each.expert in experts}
    routed = {tensor.parameter for tensor in expected.values() if tensor.expert is not None}
    if expert_cache_bytes is not None and not routed <= left.keys():
        raise ValueError(
            "expert_cache_bytes needs experts that stay packed, and these are not: leave dtype out or pass "
            'dtype="int8", or convert the folder to FP8 and FP4 (agentkit convert)'
        )
    if expert_cache_bytes is not None and device.type == "cpu":
        left |= {name: dataclasses.replace(left[name], ahead=False) for name in routed}
    check_memory(folder, expected, stored, dtypes, left, expert_cache_bytes, device=device, devices=devices)
    decoder = _empty_decoder(spec, device, dtypes, left)
    if lay_out is not None:
        for group in decoder.fused_weights():
            for is_packed, weights in groupby(group, lambda weight: not isinstance(weight, Tensor)):
                if not is_packed:
                    lay_out(list(weights))
    parameters = decoder.state_dict()
    expected = {name: tensor for name, tensor in expected.items() if tensor.parameter not in left}

    def read_run(run: Sequence[StoredTensor]) -> None:
        if run[0].size > SLICE_BYTES and run[0].name in expected and scale_name(run[0].name) not in stored:
            return read_slices(run[0])
        values = {found.name: value for found, value in zip(run, read(run), strict=True)}
        for name in [name for name in values if name in expected]:
            scale = stored.get(scale_name(name))
            if scale is not None and scale.name not in values:
                [values[scale.name]] = read([scale])
            tensor = expected[name]
            target = parameters[tensor.parameter]
            target = target if tensor.expert is None else target[tensor.expert]
            target.copy_(_checked(stored[name], values[name], values.get(scale_name(name)), spec))
        return None

    def read_slices(found: StoredTensor) -> None:
        """Read a large tensor in parts, so that it is not in memory twice."""
        tensor = expected[found.name]
        target = parameters[tensor.parameter]
        target = target if tensor.expert is None else target[tensor.expert]
        step = max(1, SLICE_BYTES * found.shape[0] // found.size)
        for first in range(0, found.shape[0], step):
            last = min(first + step, found.shape[0])
            target[first:last] = _checked(found, read_rows(found, first, last), None, spec)

    scales = {scale_name(name) for name in expected}
    wanted = [found for name, found in stored.items() if name in expected or name in scales]
    with ThreadPoolExecutor(READERS, thread_name_prefix="agentkit_engine: weights") as readers:
        for _ in readers.map(read_run, runs(wanted, RUN_BYTES)):
            pass
    return decoder, layout.dialect


def read_sampling(folder: Path) -> SamplingParams:
    """Return the sampling parameters in `generation_config.json`, or the defaults if there is no such file.

    Raises:
        CheckpointError: the file is not JSON, or a value is of the wrong type or outside its range.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return SamplingParams()
    try:
        config = _GenerationConfig.model_validate(_read_json(path))
        return SamplingParams(
            temperature=config.temperature if config.do_sample else 0.0,
            top_p=config.top_p,
            top_k=config.top_k or None,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
        )
    except ValidationError as error:
        raise CheckpointError(path, describe(error)) from error
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error


def _read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    try:
        value = parse_json(read_regular(path, max_bytes=max_bytes))
    except FileNotFoundError as error:
        raise CheckpointError(path, "missing; a model folder needs it") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(path, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"found a JSON {type(value).__name__}, expected an object")
    return value


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint's files, by name."""
    index_path, single_path = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if index_path.is_file():
        stored = _read_indexed(index_path)
        files = {tensor.path for tensor in stored.values()}
    elif single_path.is_file():
        stored = read_header(single_path)
        files = {single_path}
    else:
        raise CheckpointError(folder, f"no weights: expected {WEIGHTS_FILE}, or {INDEX_FILE} and the files it names")
    if stray := sorted(path.name for path in set(folder.glob("*.safetensors")) - files):
        raise CheckpointError(
            folder / stray[0], f"not part of the checkpoint: {INDEX_FILE} does not list it; remove it"
        )
    return stored


def _read_indexed(index_path: Path) -> dict[str, StoredTensor]:
    index = _read_json(index_path, MAX_INDEX_BYTES)
    if unknown := sorted(index.keys() - {"metadata", "weight_map"}):
        raise CheckpointError(index_path, f"not a safetensors index: unknown key {shorten(unknown[0])}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(index_path, f"not a safetensors index: weight_map: found {shorten(weight_map)}")
    if wrong := next((name for name, file in weight_map.items() if not isinstance(file, str)), None):
        raise CheckpointError(index_path, f"found {shorten(weight_map[wrong])}, expected a file name", tensor=wrong)
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        path = index_path.parent / file
        if Path(file).name != file or not file.isprintable() or len(file) > 255:
            raise CheckpointError(
                index_path, f"found file {shorten(file)}, expected the name of a file in the same folder"
            )
        if not path.is_file():
            names = sorted(name for name, home in weight_map.items() if home == file)
            raise CheckpointError(path, f"missing; {INDEX_FILE} expects {len(names)} tensors in it", tensor=names[0])
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != file:
                home = weight_map.get(name, "no file")
                raise CheckpointError(path, f"unexpected: {INDEX_FILE} places it in {home}", tensor=name)
            stored[name] = tensor
    for name, file in weight_map.items():
        if name not in stored:
            raise CheckpointError(index_path.parent / file, f"missing; {INDEX_FILE} expects it here", tensor=name)
    return stored


def _check_names(folder: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, TensorSpec]) -> None:
    """Require every expected tensor, a scale for every quantised weight, and no other tensor."""
    for name, tensor in expected.items():
        if name not in stored:
            listing = INDEX_FILE if (folder / INDEX_FILE).is_file() else WEIGHTS_FILE
            raise CheckpointError(folder / listing, f"missing; expected shape {list(tensor.shape)}", tensor=name)
    scales = {scale_name(name): name for name in expected if stored[name].dtype in ("F8_E4M3", "I8")}
    for name, weight in scales.items():
        if name not in stored:
            raise CheckpointError(
                stored[weight].path, f"missing; {weight} is {stored[weight].dtype} and needs it", tensor=name
            )
    for name, found in stored.items():
        if name not in expected and name not in scales:
            raise CheckpointError(
                found.path,
                f"unknown: found {found}, but the architecture in {CONFIG_FILE} has no such tensor "
                "(or it is the scale of a weight that is not quantised)",
                tensor=name,
            )


def _check_tensor(stored: Mapping[str, StoredTensor], name: str, tensor: TensorSpec) -> None:
    """Check the tensor's dtype, its shape, and the dtype and shape of its scale."""
    found = stored[name]
    allowed = ["I64"] if tensor.storage == "i64" else ["BF16", "F16", "F32"]
    if len(tensor.shape) == 2 and name.endswith(".weight"):
        allowed.append("F8_E4M3")
    if tensor.storage == "fp4" or (tensor.storage == "fp8" and found.shape == tensor.shape):
        allowed.append("I8")
    if found.dtype not in allowed:
        raise CheckpointError(found.path, f"found dtype {found.dtype}, expected {' or '.join(allowed)}", tensor=name)
    shape, scale_shape = tensor.shape, None
    if found.dtype == "F8_E4M3":
        scale_shape = tuple(-(-size // FP8_BLOCK) for size in shape)
    elif stored_format(found, shape) == "int8":
        scale_shape = shape[:1]
    elif found.dtype == "I8":
        rows, columns = shape
        shape, scale_shape = (rows, columns // 2), (rows, columns // FP4_GROUP)
    if found.shape != shape:
        raise CheckpointError(found.path, f"found {found}, expected shape {list(shape)}", tensor=name)
    if scale_shape is not None:
        scale = stored[scale_name(name)]
        if scale.shape != scale_shape or scale.dtype not in ("F8_E8M0", "F32"):
            raise CheckpointError(
                scale.path, f"found {scale}, expected F8_E8M0 or F32 {list(scale_shape)}", tensor=scale.name
            )


def _bf16_where_it_suffices(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, TensorSpec]
) -> dict[str, torch.dtype]:
    """Return bfloat16 for each parameter that is lossless in it, else float32."""
    dtypes: dict[str, torch.dtype] = {}
    for name, tensor in expected.items():
        found, scale = stored[name].dtype, stored.get(scale_name(name))
        suffices = found == "BF16" or (found in ("F8_E4M3", "I8") and scale is not None and scale.dtype == "F8_E8M0")
        if not suffices:
            dtypes[tensor.parameter] = torch.float32
        dtypes.setdefault(tensor.parameter, torch.bfloat16)
    return dtypes


def _empty_decoder(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    packed: Mapping[str, StoredRows],
) -> Decoder:
    """Return a decoder with uninitialised parameters; tensors that are float32 in the layout stay float32."""
    with torch.device("meta"), _NoInitialisation():
        decoder = Decoder(spec)
    decoder.pack(packed)
    storage_of = {tensor.parameter: tensor.storage for tensor in checkpoint_tensors(spec).values()}
    kept = {"f32": torch.float32, "i64": torch.int64}
    empty = {
        name: torch.empty(
            parameter.shape,
            dtype=kept.get(storage_of[name]) or (dtype if isinstance(dtype, torch.dtype) else dtype[name]),
            device=device,
        )
        for name, parameter in decoder.state_dict().items()
    }
    decoder.load_state_dict(empty, assign=True)
    return decoder


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`; on meta tensors it would import code that takes a second to load."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def _checked(found: StoredTensor, value: Tensor, scale: Tensor | None, spec: ModelSpec) -> Tensor:
    """Return the tensor, dequantised if it has a scale; reject NaN, infinity and invalid expert ids."""
    if scale is not None:
        if found.dtype == "I8" and scale.dim() == 1:
            value = value.float() * scale[:, None]
        else:
            value = (dequantise_fp8 if found.dtype == "F8_E4M3" else dequantise_fp4)(value, scale)
    elif found.dtype == "I64":
        if not 0 <= int(value.min()) <= int(value.max()) < spec.n_routed_experts:
            raise CheckpointError(
                found.path,
                f"found expert ids {int(value.min())} to {int(value.max())}, expected 0 to {spec.n_routed_experts - 1}",
                tensor=found.name,
            )
        return value
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(value)):
        raise CheckpointError(found.path, "found NaN or infinity, expected finite weights", tensor=found.name)
    return value


def _dialect(folder: Path, dspark: bool) -> Dialect:
    path = folder / SIDECAR_FILE
    if not path.is_file():
        return "v4-0731" if dspark else "v4-preview"
    try:
        return Sidecar.model_validate(_read_json(path)).dialect
    except ValidationError as error:
        raise CheckpointError(path, describe(error)) from error
