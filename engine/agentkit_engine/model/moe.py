"""Mixture of experts: A of E routed SwiGLU experts per token, chosen by hash table or score, plus a shared one.

Tokens are sorted by expert once, so that each expert multiplies one contiguous block of rows. Source: the
DeepSeek-V4 reference. Dimension key: `model/__init__.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agentkit_engine.model.trace import Trace
from agentkit_engine.spec import LayerSpec, ModelSpec


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in float32."""
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


class Gate(nn.Module):
    """The router. Affinities sqrt(softplus(x·W)) give the weights; experts come from a table or from the affinities.

    `bias` affects the choice only, never the weights. It has no gradient; training nudges it by load.
    """

    tid2eid: Tensor
    bias: Tensor

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.router = layer.router
        self.active = spec.num_experts_per_tok
        self.scale = spec.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(spec.n_routed_experts, spec.hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        if self.router == "hash":
            table = torch.tensor(range(self.active)).expand(spec.vocab_size, -1).contiguous()
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(spec.n_routed_experts))

    def forward(self, x_ND: Tensor, token_ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return expert ids, int64 [N, A], and their weights, float32 [N, A]. Ties go to the lowest expert id."""
        affinity_NE = F.softplus(F.linear(x_ND.float(), self.weight.float())).sqrt()
        if self.router == "hash":
            expert_ids_NA = self.tid2eid[token_ids_N]
        else:
            biased_NE = affinity_NE.detach() + self.bias.float()
            expert_ids_NA = biased_NE.sort(dim=-1, descending=True, stable=True).indices[:, : self.active]
        weights_NA = affinity_NE.gather(1, expert_ids_NA)
        return expert_ids_NA, weights_NA / weights_NA.sum(-1, keepdim=True) * self.scale


class Experts(nn.Module):
    """The routed experts, stacked: w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.limit = spec.swiglu_limit
        experts, dim, width = spec.n_routed_experts, spec.hidden_size, spec.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(experts, width, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, width))
        self.w3 = nn.Parameter(torch.empty(experts, width, dim))
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of each token's experts, float32 [N, D], and the rows per expert, int64 [E]."""
        active = expert_ids_NA.shape[1]
        order = expert_ids_NA.flatten().argsort(stable=True)
        counts_E = torch.bincount(expert_ids_NA.flatten(), minlength=self.w1.shape[0])
        counts: list[int] = counts_E.tolist()
        token_rows = order // active
        rows = torch.split(x_ND[token_rows], counts)
        weights = weights_NA.flatten()[order].unsqueeze(1)
        w1, w2, w3 = self.w1.unbind(), self.w2.unbind(), self.w3.unbind()
        used = [expert for expert, count in enumerate(counts) if count]
        gate = torch.cat([F.linear(rows[e], w1[e]) for e in used])
        up = torch.cat([F.linear(rows[e], w3[e]) for e in used])
        hidden_rows = (clamped_swiglu(gate, up, self.limit) * weights).to(x_ND.dtype)
        hidden = torch.split(hidden_rows, [counts[e] for e in used])
        down = torch.cat([F.linear(block, w2[e]) for block, e in zip(hidden, used, strict=True)])
        out = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        return out.index_add(0, token_rows, down.float()), counts_E


class SharedExpert(nn.Module):
    """The expert that every token uses, neither gated nor scaled; its SwiGLU is clamped too."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.limit = spec.swiglu_limit
        dim, width = spec.hidden_size, spec.moe_intermediate_size
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        out: Tensor = self.w2(clamped_swiglu(self.w1(x_ND), self.w3(x_ND), self.limit).to(x_ND.dtype))
        return out


class MoE(nn.Module):
    """The feed-forward part of one layer."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Gate(spec, layer)
        self.experts = Experts(spec)
        self.shared_experts = SharedExpert(spec)

    def forward(self, x_ND: Tensor, token_ids_N: Tensor, trace: Trace | None) -> Tensor:
        """[N, D] to [N, D]: routed experts are summed in float32, the shared one is added, and the result is cast
        once."""
        expert_ids_NA, weights_NA = self.gate(x_ND, token_ids_N)
        routed_ND, counts_E = self.experts(x_ND, expert_ids_NA, weights_NA)
        if trace is not None:
            trace.expert_counts[self.layer.index] = counts_E
        out: Tensor = (routed_ND + self.shared_experts(x_ND).float()).to(x_ND.dtype)
        return out
