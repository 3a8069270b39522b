"""Muon for the matrices and AdamW for everything else, as in DeepSeek-V4's training (its report names Muon).

Muon replaces a matrix's momentum by the nearest semi-orthogonal matrix, found by a Newton-Schulz iteration (Jordan et
al. 2024, "Muon: An optimizer for hidden layers in neural networks"). The update is scaled to AdamW's usual root mean
square (Liu et al. 2025, arXiv:2502.16982, section 2.2) so that both share one learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of `[..., m, n]` towards 1 by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum, for parameters of two or more dimensions; leading dimensions are batches of matrices.

    In a process group, where gradients are already averaged, each process orthogonalises its share of the parameters
    and the results are all-reduced.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype`: dtype of the Newton-Schulz iteration."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            sizes = [parameter.numel() for parameter in trained]
            owners = _share(sizes, world)
            flat = torch.zeros(sum(sizes), device=trained[0].device)
            updates = torch.split(flat, sizes)
            for parameter, update, owner in zip(trained, updates, owners, strict=True):
                if owner != rank:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(momentum, group["momentum"])
                update.view_as(parameter).copy_(orthogonalize(nesterov.to(self.dtype)))
            if world > 1:
                dist.all_reduce(flat)
            for parameter, update in zip(trained, updates, strict=True):
                scale = 0.2 * max(parameter.size(-2), parameter.size(-1)) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def _share(sizes: Sequence[int], world: int) -> list[int]:
    """Assign each parameter to a process: largest first, to the process with the least so far."""
    loads, owners = [0] * world, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += sizes[index]
    return owners
