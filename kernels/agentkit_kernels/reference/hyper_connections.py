"""Manifold-constrained hyper-connections (mHC): M parallel residual streams, mixed per token.

A sub-layer reads one vector, a weighted sum of the streams, and writes its output back to every stream, while a
doubly stochastic matrix (softmax, then Sinkhorn normalisation) mixes the streams. Source: Xie et al. 2025,
arXiv:2512.24880, and DeepSeek-V4's reference. Everything is float32. Dimension key: `agentkit_kernels.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.ops import HyperConnection, HyperHead
from agentkit_kernels.reference.linear import Weight, values
from agentkit_kernels.reference.norm import rms_norm

SINKHORN_ROWS = 4096
"""Rows normalised together, so that the iterations stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """Weights of a sub-layer's write: its output times `post_NM`, stream j to k by `comb_NMM`[n, j, k]."""

    post_NM: Tensor
    comb_NMM: Tensor


def mix_logits(streams_NMD: Tensor, fn: Weight, eps: float) -> Tensor:
    """fn · v / rms(v) for the M*D values v of each token (one rms over all streams, no weight)."""
    (matrix,) = fn.parts
    logits: Tensor = _MixLogits.apply(streams_NMD.flatten(1), values(matrix), eps)  # type: ignore[no-untyped-call]
    return logits


def read(streams_NMD: Tensor, pre_NM: Tensor) -> Tensor:
    """Return the weighted sum of the streams that a sub-layer reads, [N, D]."""
    x_ND: Tensor = _Read.apply(streams_NMD, pre_NM)  # type: ignore[no-untyped-call]
    return x_ND


def write(streams_NMD: Tensor, y_ND: Tensor, mixing: Mixing) -> Tensor:
    """X'_k = post_k * y + sum_j comb[j, k] * X_j (the sum runs over the first index of `comb`)."""
    out_NMD: Tensor = _Write.apply(  # type: ignore[no-untyped-call]
        streams_NMD, y_ND, mixing.post_NM, mixing.comb_NMM
    )
    return out_NMD


# The streams are the widest tensors of the model, so these three functions are memory-bound. Their backward passes are
# written by hand to read and write the streams as rarely as possible.


class _MixLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, fn: Tensor, eps: float) -> Tensor:
        raw = F.linear(flat, fn)
        rms = torch.rsqrt(torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[1] + eps)
        ctx.save_for_backward(flat, fn, raw, rms)
        return raw * rms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, fn, raw, rms = ctx.saved_tensors
        scaled = grads[0] * rms
        radial = (scaled * raw).sum(-1, keepdim=True) * rms.square() / -flat.shape[1]
        return (scaled @ fn).addcmul_(flat, radial), scaled.mT @ flat, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams_NMD: Tensor, pre_NM: Tensor) -> Tensor:
        ctx.save_for_backward(streams_NMD, pre_NM)
        return torch.bmm(pre_NM.unsqueeze(1), streams_NMD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        streams_NMD, pre_NM = ctx.saved_tensors
        grad_N1D = grads[0].unsqueeze(1)
        return pre_NM.unsqueeze(2) * grad_N1D, (streams_NMD * grad_N1D).sum(-1)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams_NMD: Tensor, y_ND: Tensor, post_NM: Tensor, comb_NMM: Tensor) -> Tensor:
        ctx.save_for_backward(streams_NMD, y_ND, post_NM, comb_NMM)
        return torch.bmm(comb_NMM.mT, streams_NMD).addcmul_(post_NM.unsqueeze(2), y_ND.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        streams_NMD, y_ND, post_NM, comb_NMM = ctx.saved_tensors
        (grad,) = grads
        return (
            torch.bmm(comb_NMM, grad),
            torch.bmm(post_NM.unsqueeze(1), grad).squeeze(1),
            (grad * y_ND.unsqueeze(1)).sum(-1),
            torch.bmm(streams_NMD, grad.mT),
        )


def homogeneous_width(size: int) -> int:
    """Return the length of a flattened M x M matrix with a 1 and zeros.

    On AMD processors MKL rounds rows of products with 5 to 7 or 9 to 11 columns by their place among the rows.
    """
    return max(12, size * size + 1)


def homogeneous(matrices_NL: Tensor, size: int) -> Tensor:
    """Append a 1 and zeros to flattened M x M matrices."""
    padded = F.pad(matrices_NL, (0, homogeneous_width(size) - size * size))
    padded[:, size * size] = 1.0
    return padded


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def half_steps(size: int, iterations: int, eps: float, device: torch.device) -> list[Tensor]:
    """Return one matrix per half step that maps a flattened M x M matrix, followed by a 1, to the divisors of its
    entries.

    An entry's divisor is the sum of its column (or row) + eps; the divisor of the 1, and of zeros after it, is 1.
    """
    eye, ones = torch.eye(size, device=device), torch.ones(size, size, device=device)
    entries, width = size * size, homogeneous_width(size)

    def divisors(sums: Tensor) -> Tensor:
        homogeneous = F.pad(sums, (0, width - entries, 0, width - entries))
        homogeneous[entries, :entries] = eps
        homogeneous[entries, entries:] = 1.0
        return homogeneous

    rows, columns = divisors(torch.kron(eye, ones)), divisors(torch.kron(ones, eye))
    return [columns] + [rows, columns] * (iterations - 1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def scale_of_output(size: int, device: torch.device) -> Tensor:
    """Return the index of the scale (pre, post or comb) for each of the (2 + M) * M outputs."""
    return torch.tensor([0] * size + [1] * size + [2] * size * size, device=device)


class _Sinkhorn(torch.autograd.Function):
    """Alternating column and row normalisation of positive matrices: each entry / (its line's sum + eps).

    A half step takes two tensor operations, a product and a division. The backward pass repeats the forward instead
    of storing its 2 * iterations results.
    """

    @staticmethod
    def forward(ctx: Any, matrices_NL: Tensor, size: int, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(matrices_NL)
        ctx.settings = (size, iterations, eps)
        out = homogeneous(matrices_NL, size)
        for current in torch.split(out, SINKHORN_ROWS):
            divisor = torch.empty_like(current)
            for step in half_steps(size, iterations, eps, out.device):
                current.div_(torch.mm(current, step, out=divisor))
        return out[:, : size * size]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (matrices_NL,) = ctx.saved_tensors
        size = ctx.settings[0]
        steps = half_steps(*ctx.settings, matrices_NL.device)
        out = F.pad(grads[0], (0, homogeneous_width(size) - size * size))
        for source, grad in zip(*(torch.split(x, SINKHORN_ROWS) for x in (matrices_NL, out)), strict=True):
            current, done = homogeneous(source, size), []
            for step in steps:
                divisor = current @ step
                current = current / divisor
                done.append((step, divisor, current))
            for step, divisor, result in reversed(done):
                grad.div_(divisor)
                grad.addmm_(grad * result, step.mT, alpha=-1)
        return out[:, : size * size], None, None, None


def sinkhorn(logits_NMM: Tensor, iterations: int, eps: float) -> Tensor:
    """Return nearly doubly stochastic matrices [N, M, M], float32 and differentiable.

    Softmax over the last index + eps, then normalise columns, then (rows, columns) `iterations` - 1 times.
    """
    start = logits_NMM.softmax(-1) + eps
    size = logits_NMM.shape[-1]
    normalised: Tensor = _Sinkhorn.apply(start.flatten(1), size, iterations, eps)  # type: ignore[no-untyped-call]
    return normalised.reshape(-1, size, size)


def hc_pre(streams: Tensor, hc: HyperConnection) -> tuple[Tensor, Mixing]:
    size = streams.shape[1]
    scales = hc.scale.float()[scale_of_output(size, hc.scale.device)]
    mix = torch.addcmul(hc.base.float(), mix_logits(streams, hc.fn, hc.norm_eps), scales)
    pre, post, comb = torch.split(mix, [size, size, size * size], dim=-1)
    mixing = Mixing(2 * post.sigmoid(), sinkhorn(comb.reshape(-1, size, size), hc.iterations, hc.eps))
    return rms_norm(read(streams, pre.sigmoid() + hc.eps), hc.norm, hc.norm_eps), mixing


def hc_post(streams: Tensor, y: Tensor, mixing: Mixing) -> Tensor:
    return write(streams, y, mixing)


def hc_post_pre(streams: Tensor, y: Tensor, mixing: Mixing, hc: HyperConnection) -> tuple[Tensor, Tensor, Mixing]:
    streams = write(streams, y, mixing)
    return streams, *hc_pre(streams, hc)


def hc_head(streams: Tensor, head: HyperHead) -> Tensor:
    mix = mix_logits(streams, head.fn, head.norm_eps)
    x = read(streams, (mix * head.scale.float() + head.base.float()).sigmoid() + head.eps)
    return rms_norm(x, head.norm, head.norm_eps)
