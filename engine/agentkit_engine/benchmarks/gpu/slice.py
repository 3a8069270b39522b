"""Decoding and prefill of a few layers of DeepSeek-V4-Flash.

Four layers (CSA, HCA, CSA, HCA) at true shapes with random weights in the published formats: FP8 for attention and
shared experts, MXFP4 for routed experts, 14.4 GB in all; or sixteen, 58 GB. Multiply times per layer by 43 for the
whole model, and add the head, which has a small vocabulary here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from agentkit_engine.model import Decoder
from agentkit_engine.model.forward import Computed, Forward
from agentkit_engine.runtime.graphs import CudaCapture, Graphs
from agentkit_engine.runtime.host_tier import HostTier
from agentkit_engine.runtime.state import SPAN, KVCacheDtype, Pools
from agentkit_engine.spec import LayerSpec, ModelSpec, RopeSpec
from agentkit_kernels.gpu.attention import fill_kv_pages, kv_pages
from agentkit_kernels.gpu.bench import Bench, OutputsDifferError, Peer, floor_us
from agentkit_kernels.gpu.experts import mxfp4
from agentkit_kernels.gpu.record import Goal, Measurement, PeerResult, Skipped
from agentkit_kernels.ops import Plan
from agentkit_kernels.packed import FP8_BLOCK, Packed, PackedRows
from agentkit_kernels.reference import Reference
from agentkit_kernels.triton.backend import Triton
from agentkit_kernels.triton.launch import LAUNCHES, only_counting

MILLION = 1 << 20
"""Tokens of the longest sequence."""
LAYERS = 43
"""Of V4-Flash."""
PATTERN = (4, 128)
"""Tokens per compressed entry, in layers in turn."""
ROWS: dict[str, KVCacheDtype] = {"FP8 rows": "fp8", "float32 rows": "auto"}
"""Formats of key-value rows and index keys: that of the goals, and the engine's default."""
EXPERTS = ("w1", "w2", "w3")
FP8 = ("wq_a", "wkv", "wq_b", "wo_a", "wo_b")
"""Matrices of attention in FP8; those of compressors are not, though they have the same names."""

AGREE = 0.95
"""Least cosine between the streams of both backends: rounding to bfloat16 may choose another expert here and there."""


def slice_spec(bench: Bench, layers: int = 4) -> ModelSpec:
    """Return the spec of a slice, of half as many layers in a rehearsal; its vocabulary is small, so the head costs
    nothing."""
    shapes, rope = bench.shapes, RopeSpec(160_000.0, 16.0)
    ratios = PATTERN * bench.pick(layers // 2, layers // 4)
    kinds = [
        LayerSpec(index, "csa" if ratio == 4 else "hca", ratio, "score", rope) for index, ratio in enumerate(ratios)
    ]
    return ModelSpec(
        vocab_size=128,
        hidden_size=shapes.hidden_size,
        layers=tuple(kinds),
        mtp_layers=(),
        num_hash_layers=0,
        num_attention_heads=shapes.num_attention_heads,
        head_dim=shapes.head_dim,
        qk_rope_head_dim=shapes.qk_rope_head_dim,
        q_lora_rank=shapes.q_lora_rank,
        o_groups=shapes.o_groups,
        o_lora_rank=shapes.o_lora_rank,
        sliding_window=shapes.sliding_window,
        index_n_heads=shapes.index_n_heads,
        index_head_dim=shapes.index_head_dim,
        index_topk=shapes.index_topk,
        hc_mult=shapes.hc_mult,
        hc_sinkhorn_iters=shapes.hc_sinkhorn_iters,
        hc_eps=1e-6,
        n_routed_experts=shapes.n_routed_experts,
        n_shared_experts=1,
        num_experts_per_tok=shapes.num_experts_per_tok,
        moe_intermediate_size=shapes.moe_intermediate_size,
        routed_scaling_factor=1.5,
        swiglu_limit=10.0,
        rms_norm_eps=1e-6,
        max_position_embeddings=1 << 20,
        bos_token_id=0,
        eos_token_id=1,
    )


def fp8(bench: Bench, outputs: int, inputs: int) -> Packed:
    """Return a random FP8 matrix of about unit gain: codes of unit size, and one power of two as every scale."""
    codes = bench.floats(outputs, inputs).to(torch.float8_e4m3fn)
    blocks = (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK))
    scale = torch.full(blocks, 127 - round(torch.tensor(inputs).log2().item() / 2), dtype=torch.uint8)
    return Packed("fp8", codes, scale.to(bench.device).view(torch.float8_e8m0fnu), (outputs, inputs))


def random_decoder(bench: Bench, spec: ModelSpec) -> Decoder:
    """Return a decoder with random weights, made on the device in the published formats."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    packed: dict[str, PackedRows] = {}
    dense: dict[str, Tensor] = {}
    for name, parameter in decoder.state_dict().items():
        shape, owners = parameter.shape, name.split(".")
        leaf = owners.pop()
        if leaf in EXPERTS:
            packed[name] = mxfp4(bench, *shape)
        elif "shared_experts" in owners or (owners and owners[-1] in FP8 and "compressor" not in owners):
            packed[name] = fp8(bench, *shape)
        elif leaf == "weight" and len(shape) == 2:
            dense[name] = bench.floats(*shape) * shape[1] ** -0.5
        elif leaf == "weight" or leaf.endswith("scale"):
            dense[name] = torch.ones(shape, device=bench.device)
        else:
            dense[name] = bench.floats(*shape, dtype=torch.float32) * shape[-1] ** -0.5
    decoder.pack(packed)
    decoder.load_state_dict(dense, assign=True)
    return decoder.requires_grad_(False)


def random_pools(bench: Bench, spec: ModelSpec, sequences: int, tokens: int, kv_cache_dtype: KVCacheDtype) -> Pools:
    """Return the engine's pools for `sequences` sequences of `tokens` tokens, full of random rows."""
    spans = sequences * -(-tokens // SPAN)
    pools = Pools(spec, slots=sequences, spans=spans, device=bench.device, kv_cache_dtype=kv_cache_dtype)
    for layer in pools.layers:
        for name, pool in layer.items():
            if pool.is_meta:
                continue
            if name == "index_scales":
                pool.fill_(1.0)
            elif pool.dtype != torch.uint8:
                pool.normal_(generator=bench.generator)
            elif name == "index_entries":
                pool.copy_(bench.floats(*pool.shape, dtype=torch.uint8))
            else:
                fill_kv_pages(bench, pool)
    return pools


@dataclass(frozen=True, slots=True)
class Slice:
    """The slice over the state of `sequences` sequences, of up to `tokens` tokens each."""

    bench: Bench
    decoder: Decoder
    ops: Triton
    forward: Forward
    pools: Pools
    sequences: int
    tokens: int

    @classmethod
    def over(cls, bench: Bench, decoder: Decoder, sequences: int, tokens: int, kv_cache_dtype: KVCacheDtype) -> Slice:
        """Return a slice with random state."""
        pools, ops = random_pools(bench, decoder.spec, sequences, tokens, kv_cache_dtype), Triton(bench.device)
        forward = Forward(decoder, ops, [ops.state(each) for each in pools.layers])
        return cls(bench, decoder, ops, forward, pools, sequences, tokens)

    def plan(self, start: int, new: int) -> Plan:
        """Return `new` tokens of every sequence from position `start` on."""
        spans = -(-self.tokens // SPAN)
        ids = [(7 * n + start) % self.decoder.spec.vocab_size for n in range(self.sequences * new)]
        tables = [range(1 + n * spans, 1 + (n + 1) * spans) for n in range(self.sequences)]
        every = range(self.sequences)
        return Plan(ids, [new for _ in every], [start for _ in every], [*every], [[*table] for table in tables])

    def step(self, start: int, new: int = 1) -> Callable[[], Tensor]:
        """Return a function that computes `new` tokens from `start` on: the streams after the last layer."""
        batch = self.ops.batch(self.plan(start, new))

        def run() -> Tensor:
            with torch.inference_mode():
                return self.forward.compute(batch).streams

        return run

    def bytes(self, start: int, new: int = 1) -> int:
        """Bytes that a step must read: weights of the experts that uniform routing hits, all others, and the keys."""
        spec, rows = self.decoder.spec, self.sequences * new
        stacks = [part for name, part in self.decoder.packed.items() if name.split(".")[-1] in EXPERTS]
        others = [part for name, part in self.decoder.packed.items() if name.split(".")[-1] not in EXPERTS]
        hit = 1 - (1 - spec.num_experts_per_tok / spec.n_routed_experts) ** rows
        weights = hit * sum(_bytes(part) for part in stacks) + sum(_bytes(part) for part in others)
        weights += sum(tensor.nbytes for tensor in self.decoder.state_dict().values())
        keys = 0
        for layer, pools in zip(spec.layers, self.pools.layers, strict=True):
            row = {name: pool[0, 0].nbytes for name, pool in pools.items()}
            seen = (start + new) // layer.compress_ratio
            if layer.attention == "csa":
                keys += seen * (row["index_entries"] + row.get("index_scales", 0)) * (seen > spec.index_topk)
                seen = min(seen, spec.index_topk * new)
            keys += (seen + spec.sliding_window) * row["entries"]
        return int(weights + self.sequences * keys)

    def flops(self, start: int, new: int) -> int:
        """Floating-point operations of the products of a step."""
        spec, rows = self.decoder.spec, self.sequences * new
        share = spec.num_experts_per_tok / spec.n_routed_experts
        per_row = 0.0
        for name, part in self.decoder.packed.items():
            size = torch.Size(part.shape).numel()
            per_row += 2 * size * (share if name.split(".")[-1] in EXPERTS else 1)
        per_row += sum(2 * tensor.numel() for tensor in self.decoder.state_dict().values() if tensor.dim() == 2)
        for layer in spec.layers:
            seen = (start + new / 2) / layer.compress_ratio
            if layer.attention == "csa":
                per_row += 2 * seen * spec.index_n_heads * spec.index_head_dim * (seen > spec.index_topk)
                seen = min(seen, spec.index_topk)
            per_row += 4 * spec.num_attention_heads * spec.head_dim * (seen + spec.sliding_window)
        return int(rows * per_row)


def _bytes(part: PackedRows) -> int:
    assert isinstance(part, Packed)
    return part.nbytes


def _reference_step(made: Slice, start: int) -> Callable[[], Tensor]:
    """Return the same step on the reference backend, over a copy of the state."""
    ops = Reference(made.bench.device)
    states = [ops.state({name: pool.clone() for name, pool in pools.items()}) for pools in made.pools.layers]
    forward, plan = Forward(made.decoder, ops, states), made.plan(start, 1)

    def run() -> Tensor:
        with torch.inference_mode():
            return forward(plan).streams

    return run


def _agreement(ours: Tensor, theirs: Tensor) -> float:
    """Return the cosine between the streams of both backends."""
    cosine = torch.cosine_similarity(ours.float().flatten(), theirs.flatten(), dim=0).item()
    if not cosine >= AGREE:
        raise OutputsDifferError(f"the cosine with the reference backend's streams is {cosine:.3f}, below {AGREE}")
    return cosine


def slice_decode(bench: Bench) -> Iterator[Measurement | Skipped]:
    """H1: one token of one sequence after 4,096, and of 32 sequences, replayed from a CUDA graph. Then the same as the
    engine's step, from a plan on the host to logits, replayed and launched from Python.

    Raises:
        OutputsDifferError: The streams point elsewhere than those of the reference backend, or the replayed logits are
            not those of the forward launched from Python, bit for bit.
    """
    decoder, start = random_decoder(bench, slice_spec(bench)), bench.pick(4096, 70)
    goals = ((1, Goal("us", 200, 110)), (bench.pick(32, 2), Goal("us")))
    for (rows, kv_cache_dtype), (sequences, goal) in product(ROWS.items(), goals):
        made = Slice.over(bench, decoder, sequences, start + 1, kv_cache_dtype)
        peers, note = [], ""
        if sequences == 1:
            reference = _reference_step(made, start)
            cosine = _agreement(made.step(start)(), reference())
            note = f"cosine of the streams with the reference backend's: {cosine:.5f}"
            peers = [Peer("reference backend, torch eager", reference, graph=False, compare=False)]
        yield bench.measure(
            f"B={sequences}, after {start} tokens, {rows}, per layer",
            made.step(start),
            goal,
            bytes=made.bytes(start),
            flops=made.flops(start, 1),
            value=lambda us: us / len(decoder.spec.layers),
            peers=peers,
            note=note,
        )
        if sequences > 1 or not bench.rehearse:
            yield _engine_step(made, start, rows)
    yield Skipped("torch.compile of the slice", "the reference backend's ragged batches depend on data")


@torch.inference_mode()
def _engine_step(made: Slice, start: int, rows: str) -> Measurement:
    bench, plan, count = made.bench, made.plan(start, 1), len(made.decoder.spec.layers)
    capture = _rerun if bench.rehearse else CudaCapture(bench.device)
    graphs = Graphs(made.forward, made.ops, capture, spans=max(map(len, plan.block_tables)))
    launched, replayed = made.forward(plan), graphs(plan)
    assert replayed is not None
    if not torch.equal(launched.logits, replayed.logits):
        raise OutputsDifferError(f"B={made.sequences}: a replayed step has other logits than one launched from Python")
    replay, launch = bench.wall(lambda: graphs(plan)), bench.wall(lambda: made.forward(plan))
    return Measurement(
        f"B={made.sequences}, the engine's step after {start} tokens, {rows}, per layer",
        replay.us / count,
        Goal("us"),
        replay.spread,
        replay.us,
        floor_us(made.bytes(start)),
        peers=[PeerResult("launched from Python", launch.us / count, launch.spread, outputs="the same bits")],
        note="wall time from a plan on the host to logits on the device",
    )


def _rerun(function: Callable[[], Computed]) -> tuple[Callable[[], None], Computed]:
    """Stand for `CudaCapture` in a rehearsal: a replay runs the function again."""
    computed = function()

    def replay() -> None:
        for old, new in zip(computed, function(), strict=True):
            old.copy_(new)

    return replay, computed


def context_growth(bench: Bench) -> Iterator[Measurement]:
    """H2: the same at 1K to 1M tokens: latency over that at 1K, and index and attention of a CSA layer at 1M over the
    time of reading as many dense bfloat16 rows."""
    decoder = random_decoder(bench, slice_spec(bench))
    for rows, kv_cache_dtype in ROWS.items():
        yield from _growth(bench, decoder, rows, kv_cache_dtype)


def _growth(bench: Bench, decoder: Decoder, rows: str, kv_cache_dtype: KVCacheDtype) -> Iterator[Measurement]:
    lengths = bench.pick((1024, 16_384, 131_072, MILLION), (40, 300))
    first = None
    for length in lengths:
        bench.check_time()
        made = Slice.over(bench, decoder, 1, length, kv_cache_dtype)
        timing = bench.time(made.step(length - 1))
        first = first or timing
        goal = Goal("ratio", 1.35, 1.15) if length == lengths[-1] else Goal("ratio")
        note = f"{timing.us / len(decoder.spec.layers):.0f} us per layer"
        floor = floor_us(made.bytes(length - 1))
        what = f"decoding at {length} over at {lengths[0]} tokens, {rows}"
        yield Measurement(what, timing.us / first.us, goal, timing.spread, timing.us, floor, note=note)
    spec, ops, state = decoder.spec, made.ops, made.ops.state(made.pools.layers[0])
    batch = ops.batch(made.plan(lengths[-1] - 1, 1))
    q = bench.floats(1, spec.num_attention_heads, spec.head_dim) * 0.1
    [kv] = kv_pages(bench, 1, 1, fp8=state["window"].dtype == torch.uint8)
    index_q = bench.floats(1, spec.index_n_heads, spec.index_head_dim)
    weights = bench.floats(1, spec.index_n_heads, dtype=torch.float32)
    rotations, sink = (
        bench.floats(1, spec.qk_rope_head_dim, dtype=torch.float32),
        bench.floats(spec.num_attention_heads),
    )

    def attend() -> Tensor:
        chosen = ops.index_topk(index_q, weights, batch, state, ratio=4, top_k=spec.index_topk)
        return ops.attend(q, kv, rotations, sink, batch, state, window=spec.sliding_window, ratio=4, topk=chosen)

    timing, dense = bench.time(attend), floor_us(lengths[-1] * spec.head_dim * 2)
    yield Measurement(
        f"CSA index and attention at {lengths[-1]} tokens over reading dense rows, {rows}",
        timing.us / dense,
        Goal("ratio", 1 / 20, 1 / 50),
        timing.spread,
        timing.us,
        note=f"{timing.us:.0f} us; dense rows need {dense:.0f} us at {lengths[-1]} x {spec.head_dim} x 2 bytes",
    )


def sixteen_layers(bench: Bench) -> Iterator[Measurement]:
    """H2 with sixteen layers: one token after 1,048,575."""
    decoder, tokens = random_decoder(bench, slice_spec(bench, 16)), bench.pick(MILLION, 300)
    for rows, kv_cache_dtype in ROWS.items():
        made = Slice.over(bench, decoder, 1, tokens, kv_cache_dtype)
        held = sum(pool.nbytes for pools in made.pools.layers for pool in pools.values())
        yield bench.measure(
            f"{len(decoder.spec.layers)} layers, decoding at {tokens} tokens, {rows}, per layer",
            made.step(tokens - 1),
            Goal("us"),
            bytes=made.bytes(tokens - 1),
            flops=made.flops(tokens - 1, 1),
            value=lambda us: us / len(decoder.spec.layers),
            note=f"the state takes {held / 1e9:.2f} GB",
        )


def kernels_per_layer(bench: Bench) -> Iterator[Measurement]:
    """H3: kernels and copies of one decoding step, per layer; in a rehearsal Triton's launches alone, which are counted
    but not made."""
    bench = bench.without_memory() if bench.rehearse else bench
    decoder, start = random_decoder(bench, slice_spec(bench)), 4096
    for rows, kv_cache_dtype in ROWS.items():
        yield _kernels(Slice.over(bench, decoder, 1, start + 1, kv_cache_dtype), start, rows)


def _kernels(made: Slice, start: int, rows: str) -> Measurement:
    run, count = made.step(start), len(made.decoder.spec.layers)
    before = LAUNCHES.copy()
    if made.bench.device.type == "meta":
        with only_counting():
            run()
        names = [*(LAUNCHES - before).elements()]
    else:
        run()  # compiles
        torch.cuda.synchronize()
        before = LAUNCHES.copy()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        events = profile.events() or []
        names = [event.name for event in events if event.device_type.name != "CPU"]
    launches = dict(LAUNCHES - before)
    others = len(names) - sum(launches.values())
    return Measurement(
        f"decoding one token, {rows}, per layer",
        len(names) / count,
        Goal("kernels", 25, 12),
        launches=launches,
        note=f"{len(names)} for {count} layers, embedding and head, {others} of them not Triton's",
    )


def slice_prefill(bench: Bench) -> Iterator[Measurement | Skipped]:
    """H11: a chunk of 8,192 tokens from the start, as tokens per second of 43 such layers.

    Raises:
        OutputsDifferError: The streams are not finite.
    """
    decoder, tokens = random_decoder(bench, slice_spec(bench)), bench.pick(8192, 2)
    for rows, kv_cache_dtype in ROWS.items():
        made = Slice.over(bench, decoder, 1, tokens, kv_cache_dtype)
        if not made.step(0, tokens)().isfinite().all():
            raise OutputsDifferError(f"the streams of a prefill over {rows} are not finite")
        for exact in (True, False):
            made.ops.settle(exact=exact)
            yield bench.measure(
                f"{tokens} tokens, {rows}, {'exact' if exact else 'inexact'}",
                made.step(0, tokens),
                Goal("tokens/s", 8000, 15_000),
                bytes=made.bytes(0, tokens),
                flops=made.flops(0, tokens),
                value=lambda us: tokens / (us * 1e-6 * LAYERS / len(decoder.spec.layers)),
                graph=False,
            )
    yield Skipped("torch.compile of the slice", "the reference backend's ragged batches depend on data")


def depth_prefill(bench: Bench) -> Iterator[Measurement]:
    """H12: a chunk of 8,192 tokens after 524,288 over the same chunk at the start."""
    decoder, tokens, depth = random_decoder(bench, slice_spec(bench)), bench.pick(8192, 2), bench.pick(524_288, 300)
    for rows, kv_cache_dtype in ROWS.items():
        bench.check_time()
        made = Slice.over(bench, decoder, 1, depth + tokens, kv_cache_dtype)
        shallow, deep = bench.time(made.step(0, tokens), graph=False), bench.time(made.step(depth, tokens), graph=False)
        floors = [floor_us(made.bytes(start, tokens), made.flops(start, tokens)) for start in (0, depth)]
        yield Measurement(
            f"{tokens} tokens after {depth}, over the first {tokens}, {rows}",
            deep.us / shallow.us,
            Goal("ratio", 4, 2.8),
            deep.spread,
            deep.us,
            floors[1],
            note=f"{shallow.us:.0f} us at the start, whose floor is {floors[0]:.0f} us",
        )


def restore(bench: Bench) -> Iterator[Measurement]:
    """H14: the state of a sequence of 131,072 tokens, from host memory to its pools, over computing it again.

    Raises:
        OutputsDifferError: The state differs from the one that was stored.
    """
    decoder, tokens, chunk = random_decoder(bench, slice_spec(bench)), bench.pick(131_072, 4), bench.pick(8192, 2)
    for rows, kv_cache_dtype in ROWS.items():
        made = Slice.over(bench, decoder, 1, tokens, kv_cache_dtype)
        pools, [spans] = made.pools, made.plan(0, 1).block_tables
        host = HostTier(pools.entries, pools.tails, slots=1, spans=len(spans), device=bench.device)
        places, before = range(len(spans)), pools.rows_at(0, spans)
        host.store(0, places, before)
        for pool in (*pools.entries, *pools.tails):
            pool.zero_()

        def load(pools: Pools = pools, host: HostTier = host, places: range = places) -> None:
            pools.write_rows(0, [place + 1 for place in places], host.load(0, places))

        load()
        after = pools.rows_at(0, spans)
        if not all(torch.equal(_bits(after[name]), _bits(stored)) for name, stored in before.items()):
            raise OutputsDifferError(f"the restored state in {rows} differs from the stored one")
        steps = [made.step(start, chunk) for start in range(0, tokens, chunk)]

        def prefill(steps: list[Callable[[], Tensor]] = steps) -> None:
            for step in steps:
                step()

        loading = bench.wall(load)
        steps[0]()  # compiles
        computing = bench.wall(prefill)
        held = pools.bytes_per_slot + len(spans) * pools.bytes_per_span
        yield Measurement(
            f"restoring {tokens} tokens from host memory over computing them in chunks of {chunk}, {rows}",
            loading.us / computing.us,
            Goal("ratio", 1 / 10, 1 / 50),
            loading.spread,
            loading.us,
            note=f"{held / loading.us / 1e3:.1f} GB/s; computing takes {computing.us / 1e6:.3f} s",
        )


def _bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)
