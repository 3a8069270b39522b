"""Random models: their specs, decoders in memory, and checkpoints of any size, written a few megabytes at a time.

`weights.export` writes a decoder that is in memory. A checkpoint that is larger than memory has none.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentkit_engine.model import Decoder
from agentkit_engine.spec import ModelSpec
from agentkit_engine.weights.checkpoint import WEIGHTS_FILE
from agentkit_engine.weights.export import Format, export_checkpoint, write_config
from agentkit_engine.weights.formats import FP4_GROUP, FP8_BLOCK
from agentkit_engine.weights.names import TensorSpec, checkpoint_tensors, scale_name

PIECE = 1 << 23
"""Values that are drawn at once."""
E2M1_RMS = 2.9
"""Root mean square of MXFP4's sixteen values."""
_STORED = {"bf16": ("BF16", 2), "f32": ("F32", 4), "i64": ("I64", 8), "fp8": ("F8_E4M3", 1)}


def tiny_v4(*, n_routed_experts: int = 16) -> ModelSpec:
    """Return a spec with every V4 mechanism at 13.5 M parameters (with 16 experts); the CPU benchmarks use this
    shape."""
    return _v4(
        vocab_size=4096,
        hidden_size=256,
        num_hash_layers=2,
        compress_ratios=[0, 0, 4, 128, 4, 128],
        num_attention_heads=8,
        head_dim=64,
        qk_rope_head_dim=32,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        index_n_heads=8,
        index_head_dim=32,
        index_topk=64,
        n_routed_experts=n_routed_experts,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
    )


def flash(*ratios: int, n_routed_experts: int) -> ModelSpec:
    """Return DeepSeek-V4-Flash at its true width, with layers of these compress ratios.

    Source: `config.json` of DeepSeek-V4-Flash.
    """
    return _v4(
        vocab_size=129_280,
        hidden_size=4096,
        num_hash_layers=0,
        compress_ratios=[*ratios],
        num_attention_heads=64,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
        n_routed_experts=n_routed_experts,
        num_experts_per_tok=6,
        moe_intermediate_size=2048,
    )


def _v4(*, compress_ratios: list[int], **sizes: object) -> ModelSpec:
    """Return a spec of these sizes, with what all released models share."""
    return ModelSpec.from_config(
        {
            "model_type": "deepseek_v4",
            "num_hidden_layers": len(compress_ratios),
            "num_nextn_predict_layers": 0,
            "compress_ratios": compress_ratios,
            "sliding_window": 128,
            "routed_scaling_factor": 1.5,
            "swiglu_limit": 10.0,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "hc_eps": 1e-6,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "compress_rope_theta": 160_000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 65_536,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            "max_position_embeddings": 1_048_576,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **sizes,
        }
    )


@torch.no_grad()
def randomize_(decoder: Decoder, generator: torch.Generator) -> Decoder:
    """Make every parameter and buffer random, in place, and far from its default, so that a missing term changes the
    result."""
    spec = decoder.spec
    for name, tensor in decoder.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("tid2eid"):
            tensor.copy_(_expert_table(spec.vocab_size, spec.num_experts_per_tok, spec, generator))
        else:
            tensor.copy_(_realistic(name, noise, tensor.shape[-1]))
    return decoder


def random_decoder(spec: ModelSpec, seed: int = 0) -> Decoder:
    """Return a decoder in which every parameter and buffer is random; see `randomize_`."""
    return randomize_(Decoder(spec), torch.Generator().manual_seed(seed)).eval()


@contextmanager
def random_model(spec: ModelSpec, *, format: Format = "fp32") -> Iterator[Path]:
    """Yield a folder with a random model in shards of at most 32 MiB; it is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="agentkit-benchmarks-") as folder:
        export_checkpoint(random_decoder(spec), Path(folder), format=format, max_shard_bytes=32 << 20)
        yield Path(folder)


def write_random_checkpoint(folder: Path, spec: ModelSpec, *, seed: int = 0) -> int:
    """Write FP4 experts, FP8 matrices and bfloat16 for the rest, all random; return the bytes of the weights.

    Every bit of a code is drawn, so no file system or disk can compress them. Values have the magnitudes of a trained
    model: outputs of a matrix are about as large as its inputs.

    Raises:
        FileExistsError: the folder already holds weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(spec)
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in tensors.items():
        for own, dtype, shape, size in _entries(name, tensor):
            header[own] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    with (folder / WEIGHTS_FILE).open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for piece in _values(name, tensor, spec, numbers, generator):
                file.write(piece.data)
    write_config(folder, spec.to_config(), "official", "v4-preview")
    return end


def _entries(name: str, tensor: TensorSpec) -> list[tuple[str, str, list[int], int]]:
    """Return name, dtype, shape and bytes of a tensor, and of its scale if it has one."""
    shape = list(tensor.shape)
    if tensor.storage == "fp4":
        codes, scales = [shape[0], shape[1] // 2], [shape[0], shape[1] // FP4_GROUP]
        return [
            (name, "I8", codes, math.prod(codes)),
            (scale_name(name), "F8_E8M0", scales, math.prod(scales)),
        ]
    dtype, size = _STORED[tensor.storage]
    entries = [(name, dtype, shape, size * math.prod(shape))]
    if tensor.storage == "fp8":
        scales = [-(-length // FP8_BLOCK) for length in shape]
        entries.append((scale_name(name), "F8_E8M0", scales, math.prod(scales)))
    return entries


def _values(
    name: str, tensor: TensorSpec, spec: ModelSpec, numbers: np.random.Generator, generator: torch.Generator
) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor and of its scale, in pieces."""
    count, inputs = math.prod(tensor.shape), tensor.shape[-1]
    if tensor.storage == "i64":
        yield _bytes(_expert_table(tensor.shape[0], inputs, spec, generator))
        return
    if tensor.storage == "fp4":
        for first in range(0, count // 2, PIECE):
            yield np.frombuffer(numbers.bytes(min(PIECE, count // 2 - first)), np.uint8)
        yield _scales(math.prod(tensor.shape) // FP4_GROUP, E2M1_RMS * math.sqrt(inputs), numbers)
        return
    for first in range(0, count, PIECE):
        noise = torch.randn(min(PIECE, count - first), generator=generator)
        if tensor.storage == "fp8":
            yield _bytes(noise.to(torch.float8_e4m3fn))
            continue
        noise = _realistic(name, noise, inputs)
        yield _bytes(noise.bfloat16() if tensor.storage == "bf16" else noise)
    if tensor.storage == "fp8":
        yield _scales(math.prod(-(-length // FP8_BLOCK) for length in tensor.shape), math.sqrt(inputs), numbers)


def _realistic(name: str, noise: Tensor, inputs: int) -> Tensor:
    """Scale noise to the magnitude that a trained parameter of this name has."""
    if name.endswith(("norm.weight", "scale")):
        return 1.0 + 0.2 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    if name.endswith(("base", "attn_sink", "ape", "embed.weight")):
        return noise
    return noise / math.sqrt(inputs)


def _expert_table(rows: int, active: int, spec: ModelSpec, generator: torch.Generator) -> Tensor:
    """Return distinct random experts for each token id."""
    draws = torch.rand(rows, spec.n_routed_experts, generator=generator)
    return draws.argsort(dim=-1)[:, :active].contiguous()


def _scales(count: int, divisor: float, numbers: np.random.Generator) -> NDArray[np.uint8]:
    """Return E8M0 bytes around 1 / divisor, of three neighbouring powers of two."""
    exponent = 127 - round(math.log2(divisor))
    return numbers.integers(exponent - 1, exponent + 2, count, dtype=np.uint8)


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = values.view(torch.uint8).numpy().reshape(-1)
    return array
