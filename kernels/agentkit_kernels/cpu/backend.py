"""`Cpu`: the operations of this folder, as `agentkit_kernels.ops.Ops`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agentkit_kernels.cpu.attention import attend
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.compressor import compress
from agentkit_kernels.cpu.expert_store import ExpertStore
from agentkit_kernels.cpu.experts import experts, swiglu
from agentkit_kernels.cpu.hyper_connections import hc_head, hc_post, hc_post_pre, hc_pre
from agentkit_kernels.cpu.indexer import index_topk
from agentkit_kernels.cpu.layout import as_array
from agentkit_kernels.cpu.linear import Stacked, Weight, embed, grouped_linear, linear, take
from agentkit_kernels.cpu.loops import Floats
from agentkit_kernels.cpu.norm import rms_norm
from agentkit_kernels.cpu.qkv import qkv
from agentkit_kernels.cpu.rope import rotations
from agentkit_kernels.cpu.router import route
from agentkit_kernels.cpu.state import LayerState
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.ops import Plan
from agentkit_kernels.packed import PackedRows
from agentkit_kernels.reference import host_zeros


class Cpu:
    """See `ops.Ops`."""

    name = "cpu"

    def __init__(self, workers: Workers | None = None, *, expert_cache_bytes: int | None = None) -> None:
        """With `expert_cache_bytes`, packed experts stay in their files, and this many bytes of them in memory."""
        self.workers = workers or Workers()
        self.expert_store = None if expert_cache_bytes is None else ExpertStore(expert_cache_bytes, self.workers)
        self.attend, self.index_topk = partial(attend, self.workers), partial(index_topk, self.workers)
        self.qkv = partial(qkv, self.workers)
        self.hc_pre, self.hc_post = partial(hc_pre, self.workers), partial(hc_post, self.workers)
        self.hc_post_pre, self.swiglu = partial(hc_post_pre, self.workers), partial(swiglu, self.workers)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return host_zeros(shape, dtype)

    def state(self, pools: Mapping[str, Tensor]) -> LayerState:
        return LayerState(pools)

    def weight(
        self, *parts_XK: Tensor | PackedRows, detached: Sequence[Tensor | PackedRows] = (), wide: bool = False
    ) -> Weight:
        return Weight((*parts_XK, *detached), self.workers)

    def stack(self, *parts_EXK: Tensor | PackedRows) -> Stacked:
        return Stacked(parts_EXK, self.workers, self.expert_store)

    def table(self, rows: Tensor) -> Any:
        return as_array(rows.detach()) if rows.is_floating_point() else rows.numpy()

    def vector(self, parameter: Tensor) -> Floats:
        array: Floats = parameter.detach().float().contiguous().numpy()
        return array

    def settle(self, *, exact: bool, active: int = 1) -> None:
        """Do nothing: products and loops are always exact."""

    def batch(self, plan: Plan) -> Batch:
        return Batch(plan)

    def array(self, rows: Tensor, batch: Batch) -> Floats:
        array: Floats = rows.numpy()
        return array

    def tensor(self, array: Floats) -> Tensor:
        return torch.from_numpy(array)

    compress = staticmethod(compress)
    embed = staticmethod(embed)
    experts = staticmethod(experts)
    grouped_linear = staticmethod(grouped_linear)
    hc_head = staticmethod(hc_head)
    linear = staticmethod(linear)
    rms_norm = staticmethod(rms_norm)
    rotations = staticmethod(rotations)
    route = staticmethod(route)
    take = staticmethod(take)
