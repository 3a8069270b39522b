"""`Reference`: the operations of this folder, as `agentkit_kernels.ops.Ops`."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agentkit_kernels.invariance import check_products
from agentkit_kernels.ops import Plan
from agentkit_kernels.packed import Packed, PackedRows, in_memory
from agentkit_kernels.reference.attention import attend
from agentkit_kernels.reference.batch import ROWS, Batch, pad_rows
from agentkit_kernels.reference.compressor import compress
from agentkit_kernels.reference.experts import experts, swiglu
from agentkit_kernels.reference.hyper_connections import hc_head, hc_post, hc_post_pre, hc_pre
from agentkit_kernels.reference.indexer import index_topk
from agentkit_kernels.reference.linear import Weight, each_expert, embed, grouped_linear, linear, take, values
from agentkit_kernels.reference.norm import rms_norm
from agentkit_kernels.reference.qkv import qkv
from agentkit_kernels.reference.rope import rotations
from agentkit_kernels.reference.router import route
from agentkit_kernels.reference.state import FreshState, LayerState, PooledState


def host_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros in host memory, of which the operating system allocates each page when it is first written."""
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize))
    return torch.frombuffer(memory, dtype=dtype)[: math.prod(shape)].view(*shape)


class Reference:
    """See `ops.Ops`."""

    name = "reference"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        train_detached: bool = False,
        products: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            device: Device of all tensors.
            train_detached: Whether gradients reach the weights that are `detached` from their input. Without a loss of
                their own these gradients are zeros, with which an optimizer still decays a weight and applies its
                momentum.
            products: Dtype of the factors of products with weights that are not `wide`.
        """
        self.device = torch.device(device)
        self.train_detached = train_detached
        self.products = products
        self._shapes: dict[tuple[int, ...], Tensor | Packed] = {}

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return host_zeros(shape, dtype)
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def state(self, pools: Mapping[str, Tensor]) -> LayerState:
        return PooledState(pools) if pools else FreshState()

    def weight(
        self, *parts_XK: Tensor | PackedRows, detached: Sequence[Tensor | PackedRows] = (), wide: bool = False
    ) -> Weight:
        if not self.train_detached:
            detached = [part.detach() if isinstance(part, Tensor) else part for part in detached]
        dtype = torch.float32 if wide else self.products
        weight = Weight(tuple(map(in_memory, parts_XK)), tuple(map(in_memory, detached)), dtype)
        self._shapes |= {tuple(part.shape): part for part in (*weight.parts, *weight.detached)}
        return weight

    def stack(self, *parts_EXK: Tensor | PackedRows) -> Weight:
        weight = Weight(tuple(map(in_memory, parts_EXK)), dtype=self.products)
        self._shapes |= {tuple(part.shape[1:]): each_expert(part)[0] for part in weight.parts}
        return weight

    def table(self, rows: Tensor) -> Tensor:
        return rows

    def vector(self, parameter: Tensor) -> Tensor:
        return parameter

    def settle(self, *, exact: bool, active: int = 1) -> None:
        if exact:
            with torch.no_grad():
                check_products([values(weight) for weight in self._shapes.values()], ROWS)

    def batch(self, plan: Plan) -> Batch:
        return Batch(plan, self.device)

    def array(self, rows: Tensor, batch: Batch) -> Tensor:
        return pad_rows(rows)

    def tensor(self, array: Tensor) -> Tensor:
        return array

    attend = staticmethod(attend)
    compress = staticmethod(compress)
    embed = staticmethod(embed)
    experts = staticmethod(experts)
    grouped_linear = staticmethod(grouped_linear)
    hc_head = staticmethod(hc_head)
    hc_post = staticmethod(hc_post)
    hc_post_pre = staticmethod(hc_post_pre)
    hc_pre = staticmethod(hc_pre)
    index_topk = staticmethod(index_topk)
    linear = staticmethod(linear)
    qkv = staticmethod(qkv)
    rms_norm = staticmethod(rms_norm)
    rotations = staticmethod(rotations)
    route = staticmethod(route)
    swiglu = staticmethod(swiglu)
    take = staticmethod(take)
