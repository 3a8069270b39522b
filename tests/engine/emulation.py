"""DeepSeek-V4's numerics for one text, in float64 and without state: activations in FP8 and FP4, and rows in FP8.

Written from DeepSeek's description of its inference, one token and window at a time; nothing here is shared with the
backends but the rotary frequencies. Weights are a decoder's state, dequantised.

Dimension key: T tokens, D hidden size, M streams, H heads, K head size, W entries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_engine.model.rope import frequencies
from agentkit_engine.spec import LayerSpec, ModelSpec

CPU = torch.device("cpu")


def power_above(ratio: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(ratio)))


def in_fp8(x: Tensor, group: int) -> Tensor:
    """Round to E4M3 with a power of two per group of the last dimension."""
    rounded = []
    for part in torch.split(x, group, -1):
        scale = power_above(part.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)
        rounded.append((part / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale)
    return torch.cat(rounded, -1)


def in_fp4(x: Tensor) -> Tensor:
    """Round to E2M1, ties to the even code, with a power of two per 32 columns."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    rounded = []
    for part in torch.split(x, 32, -1):
        scale = power_above(part.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126) / 6)
        distance = ((part / scale).abs()[..., None] - values).abs()
        nearest = distance <= distance.amin(-1, keepdim=True)
        even_first = nearest.double() + torch.tensor([0.5, 0.0] * 4, dtype=torch.float64) * nearest
        rounded.append(values[even_first.argmax(-1)] * part.sign() * scale)
    return torch.cat(rounded, -1)


def hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


class Emulation:
    """A model's forward. `activations` and `rows` select the values that are rounded."""

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor], *, activations: bool, rows: bool) -> None:
        self.spec, self.activations, self.rows = spec, activations, rows
        self.weights = {name: weight.detach().double() for name, weight in weights.items()}

    def logits(self, ids: list[int]) -> Tensor:
        spec, w, tokens = self.spec, self.weights, torch.tensor(ids)
        streams = w["embed.weight"][tokens][:, None].repeat(1, spec.hc_mult, 1)
        for index, layer in enumerate(spec.layers):
            name = f"layers.{index}."
            x, post, comb = self.read(streams, name + "hc_attn", name + "attn_norm.weight")
            streams = self.write(streams, self.attention(x, name + "attn.", layer), post, comb)
            x, post, comb = self.read(streams, name + "hc_ffn", name + "ffn_norm.weight")
            streams = self.write(streams, self.experts(x, name + "ffn.", tokens), post, comb)
        mix = rms(streams.flatten(1), spec.rms_norm_eps) @ w["hc_head_fn"].T
        pre = torch.sigmoid(mix * w["hc_head_scale"] + w["hc_head_base"]) + spec.hc_eps
        collapsed = (pre[:, :, None] * streams).sum(1)
        return rms(collapsed, spec.rms_norm_eps) * w["norm.weight"] @ w["head.weight"].T

    def read(self, streams: Tensor, hc: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        spec, w, count = self.spec, self.weights, self.spec.hc_mult
        mix = rms(streams.flatten(1), spec.rms_norm_eps) @ w[hc + "_fn"].T
        scale = w[hc + "_scale"].repeat_interleave(torch.tensor([count, count, count * count]))
        pre, post, comb = torch.split(mix * scale + w[hc + "_base"], [count, count, count * count], 1)
        comb = comb.view(-1, count, count).softmax(-1) + spec.hc_eps
        comb = comb / (comb.sum(1, keepdim=True) + spec.hc_eps)
        for _ in range(spec.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(2, keepdim=True) + spec.hc_eps)
            comb = comb / (comb.sum(1, keepdim=True) + spec.hc_eps)
        x = ((torch.sigmoid(pre) + spec.hc_eps)[:, :, None] * streams).sum(1)
        return rms(x, spec.rms_norm_eps) * w[norm], 2 * torch.sigmoid(post), comb

    def write(self, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return post[:, :, None] * y[:, None] + torch.einsum("tjk,tjd->tkd", comb, streams)

    def linear(self, x: Tensor, name: str, expert: int | None = None) -> Tensor:
        """The product with an FP8 or FP4 matrix."""
        weight = self.weights[name] if expert is None else self.weights[name][expert]
        return (in_fp8(x, 128) if self.activations else x) @ weight.T

    def rotate(self, x: Tensor, positions: Tensor, layer: LayerSpec, direction: int = 1) -> Tensor:
        """Rotate the last columns of [T, ..., K]."""
        rotary = self.spec.qk_rope_head_dim
        angles = (positions.float()[:, None] * frequencies(layer.rope, rotary, CPU)).double()
        turns = torch.polar(torch.ones_like(angles), direction * angles)
        pairs = torch.view_as_complex(x[..., -rotary:].reshape(*x.shape[:-1], -1, 2).contiguous())
        turned = pairs * turns.view(len(x), *[1] * (x.dim() - 2), -1)
        return torch.cat((x[..., :-rotary], torch.view_as_real(turned).flatten(-2)), -1)

    def kept(self, row: Tensor) -> Tensor:
        if not self.rows:
            return row
        rotary = self.spec.qk_rope_head_dim
        return torch.cat((in_fp8(row[..., :-rotary], 64), row[..., -rotary:].float().bfloat16().double()), -1)

    def entries(self, x: Tensor, name: str, layer: LayerSpec, size: int) -> Tensor:
        ratio, w = layer.compress_ratio, self.weights
        values, gates = x @ w[name + "wkv.weight"].T, x @ w[name + "wgate.weight"].T
        gates = gates + w[name + "ape"][torch.arange(len(x)) % ratio]
        pooled = []
        for window in range(len(x) // ratio):
            own = slice(window * ratio, (window + 1) * ratio)
            some_values, some_gates = values[own, -size:], gates[own, -size:]
            if values.shape[1] > size and window:
                before = slice((window - 1) * ratio, window * ratio)
                some_values = torch.cat((values[before, :size], some_values))
                some_gates = torch.cat((gates[before, :size], some_gates))
            pooled.append((some_gates.softmax(0) * some_values).sum(0))
        normed = rms(torch.stack(pooled), self.spec.rms_norm_eps) * w[name + "norm.weight"]
        return self.rotate(normed, torch.arange(len(pooled)) * ratio, layer)

    def attention(self, x: Tensor, name: str, layer: LayerSpec) -> Tensor:
        spec, w, ratio = self.spec, self.weights, layer.compress_ratio
        positions, eps = torch.arange(len(x)), spec.rms_norm_eps
        latent = rms(self.linear(x, name + "wq_a.weight"), eps) * w[name + "q_norm.weight"]
        q = self.linear(latent, name + "wq_b.weight").view(len(x), -1, spec.head_dim)
        q = self.rotate(rms(q, eps), positions, layer)
        kv = rms(self.linear(x, name + "wkv.weight"), eps) * w[name + "kv_norm.weight"]
        kv = self.kept(self.rotate(kv, positions, layer))
        entries = kv[:0]
        if ratio and len(x) >= ratio:
            entries = self.kept(self.entries(x, name + "compressor.", layer, spec.head_dim))
        scores = self.index_scores(x, latent, name + "indexer.", layer) if layer.attention == "csa" else None
        outs = []
        for t in range(len(x)):
            seen = torch.arange((t + 1) // ratio if ratio else 0)
            if scores is not None and len(seen) > spec.index_topk:
                seen = scores[t, : len(seen)].topk(spec.index_topk).indices
            keys = torch.cat((kv[max(0, t + 1 - spec.sliding_window) : t + 1], entries[seen]))
            logits = torch.cat((q[t] @ keys.T / spec.head_dim**0.5, w[name + "attn_sink"][:, None]), 1)
            outs.append(logits.softmax(1)[:, :-1] @ keys)
        out = self.rotate(torch.stack(outs), positions, layer, -1)
        parts = out.flatten(1).chunk(spec.o_groups, 1)
        groups = w[name + "wo_a.weight"].chunk(spec.o_groups)
        return self.linear(torch.cat([a @ b.T for a, b in zip(parts, groups, strict=True)], 1), name + "wo_b.weight")

    def index_scores(self, x: Tensor, latent: Tensor, name: str, layer: LayerSpec) -> Tensor:
        spec = self.spec
        size, positions = spec.index_head_dim, torch.arange(len(x))
        q = self.linear(latent, name + "wq_b.weight").view(len(x), -1, size)
        q, keys = self.rotate(q, positions, layer), self.entries(x, name + "compressor.", layer, size)
        if self.activations:
            q, keys = in_fp4(q @ hadamard(size)), in_fp4(keys @ hadamard(size))
        keys = in_fp8(keys, size) if self.rows else keys
        weights = x @ self.weights[name + "weights_proj.weight"].T * (size * spec.index_n_heads) ** -0.5
        return torch.einsum("tj,tjw->tw", weights, torch.einsum("tjc,wc->tjw", q, keys).relu())

    def experts(self, x: Tensor, name: str, tokens: Tensor) -> Tensor:
        spec, w = self.spec, self.weights
        affinity = F.softplus(x @ w[name + "gate.weight"].T).sqrt()
        if name + "gate.tid2eid" in w:
            chosen = w[name + "gate.tid2eid"].long()[tokens]
        else:
            chosen = (affinity + w[name + "gate.bias"]).topk(spec.num_experts_per_tok).indices
        weights = affinity.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True) * spec.routed_scaling_factor
        outs = []
        for t in range(len(x)):
            routed = [
                self.expert(x[t : t + 1], name + "experts.{}", weight, int(expert))
                for expert, weight in zip(chosen[t], weights[t], strict=True)
            ]
            outs.append(torch.stack(routed).sum(0))
        return torch.cat(outs) + self.expert(x, name + "shared_experts.{}.weight", torch.ones((), dtype=torch.float64))

    def expert(self, x: Tensor, name: str, weight: Tensor, expert: int | None = None) -> Tensor:
        limit = self.spec.swiglu_limit
        gate = self.linear(x, name.format("w1"), expert).clamp(max=limit)
        up = self.linear(x, name.format("w3"), expert).clamp(-limit, limit)
        return self.linear(F.silu(gate) * up * weight, name.format("w2"), expert)
