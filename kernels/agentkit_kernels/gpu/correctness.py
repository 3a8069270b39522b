"""Every kernel against its twin on this device: real bfloat16 and FP8, at the shapes of V4-Flash.

The interpreter tests (`tests/kernels/triton/`) cover awkward shapes; what they cannot see is what this GPU computes. So
quantisers must give the bits of their twins here, and other kernels stay within the rounding of their formats. Every
kernel of a file must have been launched. Dimension key: `agentkit_kernels.ops`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit_kernels.gpu.attention import Case, case
from agentkit_kernels.gpu.bench import Bench, OutOfTimeError, OutputsDifferError, difference
from agentkit_kernels.gpu.catalogue import kernels
from agentkit_kernels.gpu.compressor import random_compressor
from agentkit_kernels.gpu.experts import LIMIT, swiglu
from agentkit_kernels.gpu.hyper_connections import boundary, random_hc
from agentkit_kernels.gpu.indexer import index_scores
from agentkit_kernels.gpu.record import Goal, Measurement
from agentkit_kernels.ops import Heads, HyperHead, Plan, Router
from agentkit_kernels.packed import Packed
from agentkit_kernels.reference import quantize as quantize_twin
from agentkit_kernels.reference.batch import Batch
from agentkit_kernels.reference.compressor import compress as compressor_twin
from agentkit_kernels.reference.formats import dequantise
from agentkit_kernels.reference.indexer import select_top_k
from agentkit_kernels.reference.rope import rotate
from agentkit_kernels.reference.sampler import sample as sampler_twin
from agentkit_kernels.reference.state import PooledState
from agentkit_kernels.triton import (
    compressor,
    experts,
    hyper_connections,
    indexer,
    linear,
    norm,
    qkv,
    quantize,
    rope,
    router,
    sampler,
)
from agentkit_kernels.triton import swiglu as swiglu_kernel
from agentkit_kernels.triton.launch import INTERPRET, LAUNCHES

BF16 = 2e-2 if INTERPRET else 1e-2
"""Tolerance over the largest value: a bfloat16 result is rounded by 2^-9, and so are operands within a kernel. The
interpreter truncates instead, which doubles the error."""
FP32 = 1e-4
FP8 = 0.065
"""An E4M3 code is rounded by 2^-4 of its value at most."""
EXACT = 0.0
FLIPS = 1e-3
"""A compiler may fuse the products of a rotation in other ways in two kernels, so that a value gets another code."""

Found = Iterator[tuple[str, object, object, float]]
"""The name of a comparison, the kernel's result, the twin's, and the tolerance."""


def correctness(bench: Bench) -> Iterator[Measurement]:
    """Compare every kernel with its twin.

    Raises:
        OutputsDifferError: One differs by more than its tolerance, or a kernel was not launched.
        OutOfTimeError: The part's time is over, and nothing differed so far.
    """
    faults = []
    for file, names in kernels().items():
        LAUNCHES.clear()
        try:
            for what, ours, theirs, tolerance in CHECKS[file](bench):
                error = difference(ours, theirs)
                if not error <= tolerance:
                    faults.append(f"{file}: {what}: error {error:.2e}, the tolerance is {tolerance:.0e}")
                yield Measurement(f"{file}: {what}", error, Goal("error", tolerance), launches=dict(LAUNCHES))
                bench.check_time()
            faults += [f"{file}: {name} was not launched" for name in names if not LAUNCHES[name]]
        except OutOfTimeError:
            if not faults:
                raise
            break
        except Exception:  # the other files are still checked
            faults.append(f"{file}: {traceback.format_exc()}")
    if faults:
        raise OutputsDifferError("\n".join(faults))


def _vector(bench: Bench, *shape: int) -> Tensor:
    return bench.floats(*shape, dtype=torch.float32)


def _rotations(bench: Bench, rows: int) -> Tensor:
    angles = bench.floats(rows, bench.shapes.qk_rope_head_dim // 2, dtype=torch.float32)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)


def _attend(made: Case) -> Tensor:
    """Attention with a sink in float32 over gathered rows, rotated back."""
    a, rows = made.arguments, made.rows(torch.float32)
    scores = torch.bmm(a["q"].float(), rows.mT)
    scores = torch.cat((scores, a["sink"].expand(len(rows), -1)[:, :, None]), dim=2)
    out = torch.bmm(scores.softmax(-1)[:, :, :-1], rows)
    return rotate(out, a["rotations"], inverse=True)


def _attention(bench: Bench) -> Found:
    start = bench.pick(5000, 199)
    keys = (("window", 0, 0), ("chosen", 4, bench.shapes.index_topk), ("all", 128, 0))
    for (name, ratio, picks), rows in product(keys, ("float32", "FP8")):
        made = case(bench, bench.pick(3, 2), 1, start, ratio, picks, fp8=rows == "FP8")
        made.arguments["sink"] = _vector(bench, bench.shapes.num_attention_heads)
        made.arguments["rotations"] = _rotations(bench, made.sequences)
        out = made.run(decode=True)
        yield f"decode, {name}, {rows} rows", out, _attend(made), BF16
        yield f"decode and prefill alike, {name}, {rows} rows", made.run(decode=False), out, EXACT


def _compressor(bench: Bench) -> Found:
    rotary = bench.shapes.qk_rope_head_dim
    for kind, ratio, prefix in (("CSA", 4, ""), ("HCA", 128, ""), ("index keys", 4, "index_")):
        of = random_compressor(bench, ratio, prefix=prefix)
        size, width, per_span = len(of.norm), of.ape.shape[1], 256 // ratio
        first, second = bench.pick(700, 2 * ratio + 3), bench.pick(300, ratio + 2)
        spans = -(-(first + second) // 256)
        rows = bench.floats(first + second, 2 * width)
        tables = [torch.randperm(spans, generator=bench.generator, device=bench.device).add(1).tolist()]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=bench.device)

        def pools(entries: Tensor, width: int = width, ratio: int = ratio, prefix: str = prefix) -> dict[str, Tensor]:
            values = zeros(1, (2 if ratio == 4 else 1) * ratio + 12, width)
            parts = {"entries": entries, "values": values, "scores": torch.full_like(values, -torch.inf)}
            return {f"{prefix}{name}": pool for name, pool in parts.items()}

        twin = pools(zeros(spans + 1, per_span, size))
        made = [pools(zeros(spans + 1, per_span, size))]
        options: list[dict[str, Any]] = [{}]
        if prefix:
            made += [pools(zeros(spans + 1, per_span, size, dtype=torch.uint8))]
            made += [pools(zeros(spans + 1, per_span, size))]
            options += [{"key_scales": zeros(spans + 1, per_span)}, {"fp4": True}]
        else:
            made += [pools(zeros(spans + 1, per_span, quantize_twin.kv_row_bytes(size, rotary), dtype=torch.uint8))]
            options += [{}]
        for start, length in ((0, first), (first, second)):
            part = rows[start : start + length]
            plan = Plan([0] * length, [length], [start], [0], tables)
            compressor_twin(part.float(), of, Batch(plan, bench.device), PooledState(twin))
            for each, formats in zip(made, options, strict=True):
                sequence = (bench.ints([0, length]), bench.ints([start]), bench.ints([0]), bench.ints(tables[0])[None])
                state = [each[f"{prefix}{name}"] for name in ("values", "scores", "entries")]
                compressor.compress(part, of, *sequence, length, *state, **formats)
        for name in ("values", "entries"):
            yield f"{kind}, {name}", made[0][f"{prefix}{name}"], twin[f"{prefix}{name}"], FP32
        expected, stored = twin[f"{prefix}entries"], made[1][f"{prefix}entries"]
        used = bench.ints([*range((first + second) // ratio)])
        slots = bench.ints(tables[0])[used // per_span] * per_span + used % per_span
        flat = expected.flatten(0, 1)[slots]
        if prefix:
            codes = stored.view(torch.float8_e4m3fn).float() * options[1]["key_scales"][:, :, None]
            yield f"{kind}, FP8", codes.flatten(0, 1)[slots], flat, FP8
            plain, rounded = (each["index_entries"].flatten(0, 1)[slots] for each in (made[0], made[2]))
            equal = (rounded == quantize_twin.round_index(plain)).float().mean()
            yield f"{kind} in FP4: share of equal values", equal, torch.ones_like(equal), FLIPS
        else:
            loaded = quantize_twin.load_kv_rows(stored, slots, size, rotary=rotary, dtype=torch.float32)
            yield f"{kind}, FP8 rows", loaded, flat, FP8


def _experts(bench: Bench) -> Found:
    number, dim, width = bench.pick(16, 8), bench.shapes.hidden_size, bench.shapes.moe_intermediate_size
    active = bench.shapes.num_experts_per_tok
    for number_format in ("bfloat16", "fp8", "mxfp4", "int8"):
        sizes = ((number, width, dim), (number, width, dim), (number, dim, width))
        w1, w3, w2 = (_weight(bench, number_format, *size) for size in sizes)
        for tokens in (1, bench.pick(700, 40)):
            x, shared = bench.floats(tokens, dim), bench.floats(tokens, dim)
            chosen = torch.rand(tokens, number, generator=bench.generator, device=bench.device).topk(active).indices
            weights = torch.rand(tokens, active, generator=bench.generator, device=bench.device)
            out = experts.experts(x, chosen, weights, w1, w3, w2, LIMIT, shared)
            yield f"{number_format}, {tokens} tokens", out, _mixture(x, chosen, weights, w1, w3, w2, shared), BF16
        alone = experts.experts(x[:1], chosen[:1], weights[:1], w1, w3, w2, LIMIT, shared[:1])
        yield f"{number_format}, one token alone and among others alike", alone, out[:1], EXACT


def _mixture(x: Tensor, chosen: Tensor, weights: Tensor, w1: Any, w3: Any, w2: Any, shared: Tensor) -> Tensor:
    w13, down = torch.cat((_dense(w1), _dense(w3)), dim=1), _dense(w2)
    out = shared.float()
    for e in range(len(down)):
        weight = (weights * (chosen == e)).sum(1, keepdim=True)
        hidden = (swiglu(x.float() @ w13[e].mT) * weight).to(x.dtype).float()
        out = out + hidden @ down[e].mT
    return out


def _weight(bench: Bench, number_format: str, *shape: int) -> Tensor | Packed:
    """Return a random weight of about unit gain."""
    weight: Tensor | Packed = linear.random_weight(number_format, shape, bench)
    gain = shape[-1] ** -0.5
    if isinstance(weight, Tensor):
        return weight.mul_(gain)
    codes = {"fp8": 2.0, "mxfp4": 3.0, "int8": 64.0}[weight.format]
    scale = torch.full_like(weight.scale.float(), gain / codes).to(weight.scale.dtype)
    data = weight.data
    if weight.format != "fp8":
        data = bench.below(256, *data.shape).to(torch.uint8).view(data.dtype)
    return Packed(weight.format, data, scale, weight.shape)


def _dense(weight: Tensor | Packed) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else dequantise(weight)


def _hyper_connections(bench: Bench) -> Found:
    hc, (size, dim) = random_hc(bench), (bench.shapes.hc_mult, bench.shapes.hidden_size)
    for rows in (1, bench.pick(100, 18)):
        streams, y = bench.floats(rows, size, dim), bench.floats(rows, dim)
        mixing = torch.rand(rows, size + size * size, generator=bench.generator, device=bench.device)
        new, x, weights = boundary(streams, y, mixing, hc)
        fused = hyper_connections.hc_post_pre(streams, y, mixing, hc, dtype=y.dtype)
        yield f"hc_post_pre, {rows} rows", fused, (new, x, weights), BF16
        yield f"hc_post, {rows} rows", hyper_connections.hc_post(streams, y, mixing), fused[0], EXACT
        yield f"hc_pre, {rows} rows", hyper_connections.hc_pre(fused[0], hc, dtype=y.dtype), fused[1:], EXACT
    head = HyperHead(hc.fn[:size].contiguous(), hc.base[:size], hc.scale[:1], hc.norm, hc.norm_eps, hc.eps)
    flat = new.flatten(1).float()
    mix = F.linear(flat, head.fn) * torch.rsqrt(flat.square().mean(1, keepdim=True) + head.norm_eps)
    pre = (mix * head.scale + head.base).sigmoid() + head.eps
    collapsed = F.rms_norm((pre[:, :, None] * new.float()).sum(1), (dim,), head.norm, head.norm_eps)
    yield "hc_head", hyper_connections.hc_head(new, head, dtype=y.dtype), collapsed, BF16


def _indexer(bench: Bench) -> Found:
    heads, size, top_k = bench.shapes.index_n_heads, bench.shapes.index_head_dim, bench.shapes.index_topk
    spans = bench.pick(200, 9)
    rows = bench.pick(200, 34)
    # Small integers: every product and sum is exact, so ties are real and must go to the lowest entry.
    q = bench.below(3, rows, heads, size).to(torch.bfloat16) - 1
    values = bench.below(2, spans, 64, size).float() + 1
    codes, scales = values.to(torch.float8_e4m3fn).view(torch.uint8), torch.ones(spans, 64, device=bench.device)
    weights = bench.below(4, rows, heads).float()
    tables = torch.randperm(spans, generator=bench.generator, device=bench.device)[None]
    positions = bench.ints([4 * spans * 64 - 1 - 4 * n for n in range(rows)])
    owners = torch.zeros(rows, dtype=torch.int64, device=bench.device)
    entries = values[tables[0]].view(-1, size)
    visible = torch.arange(len(entries), device=bench.device) < ((positions + 1) // 4)[:, None]
    mask = select_top_k(index_scores(q.float(), entries, weights), top_k, visible)
    expected = mask.nonzero()[:, 1].view(rows, top_k)
    # Random queries and keys have near ties, which other bits of the scores would decide in another way.
    random_q = bench.floats(rows, heads, size)
    for name, keys, key_scales in (("float32", values, None), ("FP8", codes, scales)):

        def choose(
            q: Tensor, rows: int, keys: Tensor = keys, key_scales: Tensor | None = key_scales
        ) -> tuple[Tensor, Tensor]:
            return indexer.index_topk(
                q[:rows],
                weights[:rows],
                positions[:rows],
                owners[:rows],
                tables,
                keys,
                key_scales,
                ratio=4,
                top_k=top_k,
            )

        chosen, counts = choose(q, rows)
        yield f"chosen entries, with ties, {name} keys", chosen, expected, EXACT
        yield f"counts, {name} keys", counts, torch.full_like(counts, top_k), EXACT
        yield f"few and many rows alike, {name} keys", choose(random_q, 5)[0], choose(random_q, rows)[0][:5], EXACT


def _linear(bench: Bench) -> Found:
    outputs, inputs = bench.pick((2048, 4096), (96, 672))
    groups, group_outputs, group_inputs = bench.pick((8, 1024, 4096), (2, 64, 96))
    for number_format in ("bfloat16", "fp8", "int8", "mxfp4"):
        weight = _weight(bench, number_format, outputs, inputs)
        few, many = bench.floats(3, inputs), bench.floats(bench.pick(300, 70), inputs)
        yield f"{number_format}, few rows", linear.linear(few, weight), few.float() @ _dense(weight).mT, BF16
        out = linear.linear(many, weight)
        yield f"{number_format}, many rows", out, many.float() @ _dense(weight).mT, BF16
        yield f"{number_format}, few and many rows alike", linear.linear(many[:3], weight), out[:3], EXACT
        weight = _weight(bench, number_format, groups, group_outputs, group_inputs)
        x = bench.floats(3, groups, group_inputs)
        grouped = torch.einsum("ngk,gok->ngo", x.float(), _dense(weight)).flatten(1)
        yield f"{number_format}, grouped", linear.grouped_linear(x.flatten(1), weight), grouped, BF16


def _norm(bench: Bench) -> Found:
    size = bench.shapes.q_lora_rank
    x, weight = bench.floats(7, size + 8), _vector(bench, size)
    expected = F.rms_norm(x[:, :size].float(), (size,), weight, 1e-6)
    yield "rms_norm of a view", norm.rms_norm(x, weight, 1e-6), expected, BF16


def _qkv(bench: Bench) -> Found:
    shapes, rows = bench.shapes, bench.pick(9, 2)
    count, size, index_heads, index_size = (
        shapes.num_attention_heads,
        shapes.head_dim,
        shapes.index_n_heads,
        shapes.index_head_dim,
    )
    q = bench.floats(rows, count * size + index_heads * index_size)
    projected = bench.floats(rows, size + index_heads)
    heads = Heads(count, size, 0, _vector(bench, size), 1e-6, index_heads, index_size, size)
    turns = _rotations(bench, rows)
    plain, index = torch.split(q.float(), [count * size, index_heads * index_size], dim=1)
    expected_q = rotate(F.rms_norm(plain.view(rows, count, size), (size,), eps=1e-6), turns) * size**-0.5
    expected_kv = rotate(F.rms_norm(projected[:, :size].float(), (size,), heads.kv_norm, 1e-6), turns)
    expected_index = rotate(index.view(rows, index_heads, index_size), turns)
    expected_weights = projected[:, size:].float() * (index_heads * index_size) ** -0.5
    expected = (expected_q, expected_kv, expected_index, expected_weights)
    where, rotary = bench.ints(range(rows)), shapes.qk_rope_head_dim
    pool = torch.zeros(rows, 3, size, device=bench.device)
    found = qkv.qkv(q, projected, turns, heads, where, where, where, pool, store=True)
    yield "queries, rows and index queries", found, expected, BF16
    yield "rows in the window", pool[where, where % 3], found[1], EXACT
    pages = torch.zeros(rows, 3, quantize_twin.kv_row_bytes(size, rotary), dtype=torch.uint8, device=bench.device)
    twin = torch.zeros_like(pages)
    in_fp8 = qkv.qkv(q, projected, turns, heads, where, where, where, pages, store=True)
    quantize_twin.store_kv_rows(found[1], where * 3 + where % 3, twin, rotary=rotary)
    yield "FP8 rows' bits in the window", pages, twin, EXACT
    page = torch.empty_like(in_fp8[1])[None]
    quantize_twin.store_kv_rows(found[1], where, page, rotary=rotary)
    yield "FP8 rows' bits", in_fp8[1], page[0], EXACT
    wide = q.float()
    plain_index = qkv.qkv(wide, projected, turns, heads, where, where, where, pool, store=False)[2]
    rounded = qkv.qkv(wide, projected, turns, heads, where, where, where, pool, store=False, fp4=True)[2]
    equal = (rounded == quantize_twin.round_index(plain_index)).float().mean()
    yield "index queries in FP4: share of equal values", equal, torch.ones_like(equal), FLIPS


def _quantize(bench: Bench) -> Found:
    rows, size = 5, bench.shapes.hidden_size
    x = bench.floats(rows, size) * 2.0 ** bench.below(20, rows, 1).sub(10).float()
    x[0, :200] = 0
    x = x.bfloat16()
    for e8m0 in (True, False):
        ours, theirs = quantize.quantise_fp8(x, e8m0=e8m0), quantize_twin.quantise_fp8(x, e8m0=e8m0)
        name = "E8M0" if e8m0 else "float32"
        yield f"FP8 bits, {name} scales", ours, theirs, EXACT
        decoded = quantize.dequantise_fp8(*ours, dtype=torch.float32)
        yield f"FP8 decoded, {name}", decoded, quantize_twin.dequantise_fp8(*theirs, dtype=torch.float32), EXACT
    four, eight = quantize.quantise_fp4(x), quantize.quantise_int8(x)
    yield "MXFP4 bits", four, quantize_twin.quantise_fp4(x), EXACT
    decoded = quantize.dequantise_fp4(*four, dtype=torch.float32)
    yield "MXFP4 decoded", decoded, quantize_twin.dequantise_fp4(*four, dtype=torch.float32), EXACT
    yield "int8 bits", eight, quantize_twin.quantise_int8(x), EXACT
    decoded = quantize.dequantise_int8(*eight, dtype=torch.float32)
    yield "int8 decoded", decoded, quantize_twin.dequantise_int8(*eight, dtype=torch.float32), EXACT
    yield "activations", quantize.round_activations(x), quantize_twin.round_activations(x).to(x.dtype), EXACT
    head, rotary = bench.shapes.head_dim, bench.shapes.qk_rope_head_dim
    kv, slots = bench.floats(rows, head), bench.ints([3, -1, 130, 0, 65])
    pages = torch.zeros(3, 64, quantize_twin.kv_row_bytes(head, rotary), dtype=torch.uint8, device=bench.device)
    twin = torch.zeros_like(pages)
    quantize.store_kv_rows(kv, slots, pages, rotary=rotary)
    quantize_twin.store_kv_rows(kv, slots, twin, rotary=rotary)
    yield "key-value rows' bits", pages, twin, EXACT
    slots = slots[slots >= 0]
    loaded = quantize.load_kv_rows(pages, slots, head, rotary=rotary, dtype=torch.float32)
    expected = quantize_twin.load_kv_rows(twin, slots, head, rotary=rotary, dtype=torch.float32)
    yield "key-value rows decoded", loaded, expected, EXACT


def _rope(bench: Bench) -> Found:
    positions = bench.ints([0, 1, 999, 1_048_575])
    frequencies = torch.tensor([10000.0 ** (-i / 32) for i in range(32)], device=bench.device)
    angles = (positions.float()[:, None] * frequencies).double()  # the float32 angle is part of the definition
    expected = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)
    yield "cosines and sines up to a million radians", rope.rotations(positions, frequencies), expected, 1e-6


def _router(bench: Bench) -> Found:
    shapes, rows = bench.shapes, 6
    number, active = shapes.n_routed_experts, shapes.num_experts_per_tok
    logits, bias = _vector(bench, rows, number), _vector(bench, number)
    logits[1] = 0.5  # ties
    bias[: number // 2] = 1.0
    affinity = F.softplus(logits).sqrt()
    chosen = (affinity + bias).sort(dim=1, descending=True, stable=True).indices[:, :active]
    ids, table = bench.below(11, rows), bench.below(number, 11, active)
    both = ((Router(None, bias, active, 1.5), chosen), (Router(table, None, active, 1.5), table[ids]))
    for name, (parameters, expected) in zip(("by score, with ties", "by table"), both, strict=True):
        weights = affinity.gather(1, expected)
        found = router.route(logits, parameters, ids, ids)
        yield f"experts {name}", found[0], expected, EXACT
        yield f"weights {name}", found[1], weights / weights.sum(1, keepdim=True) * 1.5, FP32


def _sampler(bench: Bench) -> Found:
    rows, size = 4, bench.shapes.vocab_size
    logits = _vector(bench, rows, size) * 3
    logits[0, 5] = logits[0, 3] = 50.0  # the first of equals
    temperatures = torch.tensor([0.0, 1.0, 0.7, 1.3], device=bench.device)
    uniforms = torch.rand(rows, generator=bench.generator, device=bench.device, dtype=torch.float64)
    mask = bench.below(1 << 31, rows, -(-size // 32)).int()
    for name, bitmask in (("any id", None), ("packed mask", mask)):
        ours, theirs = (
            chosen(logits, temperatures, uniforms, bitmask) for chosen in (sampler.sample, sampler_twin)
        )  # fmt: skip
        yield f"ids, {name}", ours.ids, theirs.ids, EXACT
        yield f"log-probabilities, {name}", ours.logprobs, theirs.logprobs, 1e-6


def _swiglu(bench: Bench) -> Found:
    x = bench.floats(5, 2 * bench.shapes.moe_intermediate_size) * 8
    yield "clamped", swiglu_kernel.swiglu(x, LIMIT), swiglu(x), BF16


CHECKS: dict[str, Callable[[Bench], Found]] = {
    "attention": _attention,
    "compressor": _compressor,
    "experts": _experts,
    "hyper_connections": _hyper_connections,
    "indexer": _indexer,
    "linear": _linear,
    "norm": _norm,
    "qkv": _qkv,
    "quantize": _quantize,
    "rope": _rope,
    "router": _router,
    "sampler": _sampler,
    "swiglu": _swiglu,
}
