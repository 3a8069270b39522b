"""Products of the CPU backend: fused matrices of several formats, experts, and threads that change no bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agentkit_engine.weights.formats import quantise_fp4, quantise_fp8
from agentkit_kernels.cpu import linear as cpu_linear
from agentkit_kernels.cpu import workers as cpu_workers
from agentkit_kernels.cpu.batch import Batch
from agentkit_kernels.cpu.experts import experts
from agentkit_kernels.cpu.linear import Stacked, Weight, grouped_linear, linear
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.ops import Plan
from agentkit_kernels.packed import Packed
from agentkit_kernels.reference.linear import values


def randoms(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp8(weight: Tensor) -> Packed:
    return Packed("fp8", *quantise_fp8(weight), tuple(weight.shape))


def mxfp4(weight: Tensor) -> Packed:
    codes, scale = quantise_fp4(weight)
    return Packed("mxfp4", codes.view(torch.uint8), scale, tuple(weight.shape))


def stacked(parts: list[Packed]) -> Packed:
    data, scale = torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts])
    return Packed(parts[0].format, data, scale, (len(parts), *parts[0].shape))


@pytest.fixture(params=[1, 2, 3])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Threads that share out products of any size."""
    monkeypatch.setattr(cpu_linear, "SHARED", 1)
    monkeypatch.setattr(cpu_workers, "SHARED", 1)
    return Workers(request.param)


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_fused_matrices_of_several_formats_multiply_one_input(rows: int, workers: Workers) -> None:
    parts: list[Tensor | Packed] = [
        fp8(randoms(0, 200, 160)), fp8(randoms(1, 7, 160)), randoms(2, 30, 160).bfloat16(), mxfp4(randoms(3, 65, 160)),
        randoms(4, 3, 160),
    ]  # fmt: skip
    x = randoms(5, rows, 160).numpy()
    alone = [linear(x, Weight([values(part)], Workers(1))) for part in parts]
    assert np.array_equal(linear(x, Weight(parts, workers)), np.concatenate(alone, 1))


@pytest.mark.parametrize("outputs", [1, 20, 64, 100, 128])
def test_groups_multiply_their_own_parts_of_a_row(outputs: int, workers: Workers) -> None:
    weight, x = fp8(randoms(0, 3 * outputs, 64)), randoms(9, 11, 3 * 64).numpy()
    parts, matrices = np.split(x, 3, 1), weight.dequantise().chunk(3)
    alone = [
        linear(np.ascontiguousarray(part), Weight([matrix], Workers(1)))
        for part, matrix in zip(parts, matrices, strict=True)
    ]
    for whole in (weight, weight.dequantise()):
        assert np.array_equal(grouped_linear(x, Weight([whole], workers), 3), np.concatenate(alone, 1))


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_packed_experts_have_the_bits_of_dequantised_ones(tokens: int, workers: Workers) -> None:
    count, dim, width = 5, 64, 96
    w1, w3 = (stacked([mxfp4(randoms(10 * m + e, width, dim)) for e in range(count)]) for m in (1, 2))
    w2 = stacked([mxfp4(randoms(30 + e, dim, width)) for e in range(count)])
    x, shared = randoms(0, tokens, dim).numpy(), randoms(1, tokens, dim).numpy()
    chosen = np.random.default_rng(2).integers(0, count - 1, (tokens, 2))  # the last expert has no row
    weights, batch = randoms(3, tokens, 2).numpy(), Batch(Plan([0] * tokens, [tokens], [0], [0], [[]]))
    found = experts(x, chosen, weights, Stacked([w1, w3], workers), Stacked([w2], workers), 7.0, shared, batch)
    w13, down = (Stacked([part.dequantise() for part in parts], Workers(1)) for parts in ((w1, w3), (w2,)))
    assert np.array_equal(found, experts(x, chosen, weights, w13, down, 7.0, shared, batch))


def test_packed_and_unpacked_matrices_of_an_expert_cannot_be_mixed() -> None:
    packed = stacked([mxfp4(randoms(0, 32, 32))])
    with pytest.raises(ValueError, match="must all be packed, or none"):
        Stacked([packed, randoms(1, 1, 32, 32)], Workers(1))
    with pytest.raises(ValueError, match="need one format"):
        Stacked([packed, stacked([fp8(randoms(1, 32, 32))])], Workers(1))
