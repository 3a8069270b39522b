"""Calls of kernel launchers at a model's shapes, shared by compilation without a GPU, byte counts and timings.

Each file of `agentkit_kernels.triton` has a function `calls(shapes, rows, make)` that yields a `Call` for every
configuration that its launchers can choose at these shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of one model; fields are named as in `config.json`.

    Attributes:
        activations: Dtypes that the model can have on a GPU; V4-Flash does not fit there in float32.
    """

    name: str
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int
    activations: tuple[torch.dtype, ...] = (torch.bfloat16,)


FLOATS = (torch.bfloat16, torch.float32)
FLASH = Shapes("flash", 4096, 64, 512, 64, 1024, 8, 1024, 128, 64, 128, 512, 4, 20, 256, 6, 2048, 129_280)
"""DeepSeek-V4-Flash."""
TINY = Shapes("tiny", 256, 4, 96, 32, 128, 2, 128, 256, 8, 32, 16, 4, 20, 8, 2, 96, 3072, FLOATS)
"""The packaged tiny model; its head and expert sizes are no powers of two."""


class Make(Protocol):
    """Makes the tensors of a call: without memory to compile, random to count and to time."""

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return values of about unit size; for an 8-bit dtype, random codes."""

    def ints(self, values: Sequence[int] | range, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return these integers."""


def with_dtype(name: str, dtype: torch.dtype) -> str:
    """Return the name of a configuration with activations of this dtype; bfloat16 is not mentioned."""
    return name if dtype == torch.bfloat16 else f"{name}, {str(dtype).removeprefix('torch.')} activations"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a launcher.

    Attributes:
        name: The configuration, such as `"decode, fp8 rows"`.
        run: Calls the launcher.
        bytes: Bytes that any implementation must move: each input that the result depends on once, each output once.
        flops: Floating-point operations of the formula.
        tensor_cores: Whether its products should run on tensor cores.
    """

    name: str
    run: Callable[[], object]
    bytes: int
    flops: int
    tensor_cores: bool = False
