"""The engine's benchmarks: one function each, which yields its measurements.

A benchmark first compares the outputs of engine and peer, then (or meanwhile) times them alternately. Speeds are
reported twice: tokens per CPU-second with one thread, to which the targets refer, and tokens per second with two
threads.

Dimension key: 1 one sequence, B batch, T tokens, W compressed entries.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from agentkit_engine.benchmarks import (
    batching,
    caching,
    cold_start,
    experts_on_disk,
    flash_width,
    floor,
    grammars,
    scheduling,
)
from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.peers import (
    Transformers,
    compare_tokens,
    import_transformers,
    random_ids,
)
from agentkit_engine.benchmarks.random_checkpoint import flash, random_model, tiny_v4
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import CLOCKS, Clock, Median, seconds, threads
from agentkit_engine.engine import CACHE_BYTES, Engine
from agentkit_engine.model import Decoder, Trace
from agentkit_engine.runtime import Request, Scheduler
from agentkit_engine.runtime.disk_cache import DiskCache
from agentkit_engine.runtime.scheduler import MAX_NUM_BATCHED_TOKENS
from agentkit_engine.sampler import SampledToken
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.session import Session
from agentkit_engine.spec import ModelSpec

GREEDY = SamplingParams(temperature=0)
TIE = 1e-5
"""Index scores closer than this may be ordered either way by two sums of the same terms."""
CHUNKS = (1, 3, 127, 128, 512)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the benchmarks; counts are tokens unless stated otherwise.

    Attributes:
        repeats: Timed runs of each side.
        contexts: Lengths at which decoding is timed.
        decoded: Tokens per timed run of decoding.
        prefilled: Lengths at which prefilling is timed; growth is measured from the first.
        compared: Length of the parity check.
        grown_from: Length from which memory growth is measured. This and the next two are multiples of
            `MAX_NUM_BATCHED_TOKENS`.
        grown_to: Length to which memory growth is measured.
        grown_to_peer: The same for the peer, which is slower.
        looked_up: Lengths of the prompts looked up in the prefix cache.
        cold_experts: Routed experts of the cold-start model; 256 make it 600 MB.
        guessed: Calls in the session of the speculation benchmark.
        scheduled: Numbers of decoding sessions in a scheduler step, and the number of timed steps.
        appended_to: Length of the session to which a turn is appended.
        stored: Turns of a session on disk, tokens appended in each, and tokens after which the peer saves it again.
        wide: The model of the flash-width benchmark, tokens prefilled, and tokens decoded.
        long, nightly: Lengths of the long session in a normal run and in the one that must be named.
    """

    repeats: int
    contexts: tuple[int, ...]
    decoded: int
    prefilled: tuple[int, ...]
    compared: int
    grown_from: int
    grown_to: int
    grown_to_peer: int
    looked_up: tuple[int, ...]
    cold_experts: int
    guessed: int
    scheduled: tuple[tuple[int, ...], int]
    appended_to: int
    stored: tuple[int, int, int]
    wide: tuple[ModelSpec, int, int]
    long: int
    nightly: int


FULL = Sizes(
    repeats=3,
    contexts=(256, 8192),
    decoded=64,
    prefilled=(2048, 8192, 16_384),
    compared=1500,
    grown_from=1024,
    grown_to=131_072,
    grown_to_peer=8192,
    looked_up=(32_768, 131_072, 1_048_576),
    cold_experts=256,
    guessed=6,
    scheduled=((1, 16, 64, 256), 256),
    appended_to=100_000,
    stored=(100, 320, 10_000),
    wide=(flash(4, 128, n_routed_experts=16), 512, 32),
    long=65_536,
    nightly=1_048_576,
)
QUICK = Sizes(
    repeats=1,
    contexts=(16,),
    decoded=2,
    prefilled=(64, 128),
    compared=300,
    grown_from=512,
    grown_to=1024,
    grown_to_peer=1024,
    looked_up=(512, 1024),
    cold_experts=16,
    guessed=2,
    scheduled=((1, 3), 2),
    appended_to=600,
    stored=(3, 100, 150),
    wide=(tiny_v4(), 16, 2),
    long=1100,
    nightly=1200,
)


def decode(sizes: Sizes) -> Iterator[Measurement]:
    """decode: one session of a random tiny-V4 that decodes greedily."""
    with random_model(tiny_v4()) as folder:
        engine, peer = Engine.load(folder), Transformers(folder)
    yield from _decode("decode", engine, peer, sizes, bounded=True)


def decode_packaged(sizes: Sizes) -> Iterator[Measurement]:
    """decode-tiny: the same with the packaged model.

    Raises:
        ModelNotFoundError: no model is packaged.
    """
    engine = Engine.load("tiny")
    yield from _decode("decode-tiny", engine, Transformers(engine.folder), sizes, bounded=False)


def _decode(
    benchmark: str, engine: Engine, peer: Transformers, sizes: Sizes, *, bounded: bool
) -> Iterator[Measurement]:
    engine.scheduler.speculate = False  # one token per forward on both sides; `speculation` measures drafts
    ids = random_ids(engine.spec, max(sizes.contexts))
    peer.tune_decode(ids[: sizes.decoded])
    for context in sizes.contexts:
        with engine.session() as session:
            session.append(ids[:context])
            cache = peer.new_cache()
            logits = [peer.prefill(ids[:context], cache)]
            tokens = _generate(session, 1)
            compared = _decode_both(session, peer, cache, sizes.decoded, "s")
            outputs = compare_tokens([*tokens, *compared.tokens], [*logits, *compared.logits])
            for clock, num_threads, with_threads in CLOCKS:
                with threads(num_threads, engine.scheduler):
                    runs = [_decode_both(session, peer, cache, sizes.decoded, clock) for _ in range(sizes.repeats)]
                ours = Median.of([sizes.decoded / run.our_s for run in runs])
                yield Measurement(
                    benchmark,
                    f"decode, one session at {context} tokens, {with_threads}",
                    ours.value,
                    f"tokens/{clock}",
                    ours.spread,
                    f"{peer}, {peer.decode_experts} experts",
                    median(sizes.decoded / run.their_s for run in runs),
                    target=Bound("ratio", ">=", 2) if bounded and clock == "CPU-s" else None,
                    stretch=Bound("ratio", ">=", 5) if bounded and clock == "CPU-s" else None,
                    outputs=outputs,
                )
            yield floor.beside_products(
                engine.scheduler,
                benchmark,
                f"a step, one session at {context} tokens",
                partial(_generate, session, sizes.decoded),
                sizes.repeats,
                goal=floor.DECODE_GOAL if bounded else None,
                steps=sizes.decoded,
            )


@dataclass(frozen=True, slots=True)
class _Run:
    """One timed run of both sides."""

    our_s: float
    their_s: float
    tokens: list[SampledToken]
    logits: list[Tensor]


def _decode_both(session: Session, peer: Transformers, cache: Any, count: int, clock: Clock) -> _Run:
    """Run `count` forwards of one token on each side; the peer is fed the engine's tokens, so that both stay in
    step."""
    tokens: list[SampledToken] = []
    logits: list[Tensor] = []
    inputs = session.token_ids[-1:]
    our_s = seconds(clock, lambda: tokens.extend(_generate(session, count)))
    inputs = (*inputs, *(token.id for token in tokens[:-1]))
    their_s = seconds(clock, lambda: logits.extend(peer.decode(inputs, cache)))
    return _Run(our_s, their_s, tokens, logits)


def _generate(session: Session, count: int) -> list[SampledToken]:
    return list(session.generate(SamplingParams(temperature=0, max_tokens=count)))


def prefill(sizes: Sizes) -> Iterator[Measurement]:
    """prefill: a long prompt of a random tiny-V4, and the growth of its cost per token."""
    first, *_, last = sizes.prefilled
    with random_model(tiny_v4()) as folder:
        engine, peer = Engine.load(folder), Transformers(folder)
    ids = random_ids(engine.spec, last)
    peer.tune_prefill(ids[:first])
    for clock, num_threads, with_threads in CLOCKS:
        with threads(num_threads, engine.scheduler):
            runs = [_prefill_both(engine, peer, ids, sizes.prefilled, clock) for _ in range(sizes.repeats)]
        outputs = compare_tokens([t for run in runs for t in run.tokens], [x for run in runs for x in run.logits])
        setup = f"{peer}, {peer.prefill_experts} experts, chunks of {peer.chunk}"
        ours = [Median.of([length / run.our_s[i] for run in runs]) for i, length in enumerate(sizes.prefilled)]
        theirs = [Median.of([length / run.their_s[i] for run in runs]) for i, length in enumerate(sizes.prefilled)]
        bounded = clock == "CPU-s"
        for length, our_rate, their_rate in list(zip(sizes.prefilled, ours, theirs, strict=True))[1:]:
            yield Measurement(
                "prefill",
                f"prefill of {length} tokens, {with_threads}",
                our_rate.value,
                f"tokens/{clock}",
                our_rate.spread,
                setup,
                their_rate.value,
                target=Bound("ratio", ">=", 4) if bounded else None,
                stretch=Bound("ratio", ">=", 15) if bounded else None,
                outputs=outputs,
            )
        if bounded:
            yield Measurement(
                "prefill",
                f"cost per token of prefilling {last} tokens over that of {first}",
                ours[0].value / ours[-1].value,
                "x",
                None,
                setup,
                theirs[0].value / theirs[-1].value,
                higher_is_better=False,
                stretch=Bound("value", "<=", 1.3),
                outputs=outputs,
            )
    for length in sizes.prefilled[1:]:
        yield floor.beside_products(
            engine.scheduler,
            "prefill",
            f"a prefill of {length} tokens",
            partial(_prefill_alone, engine.scheduler, ids[:length]),
            sizes.repeats,
            goal=floor.PREFILL_GOAL,
        )


def _prefill_alone(scheduler: Scheduler, ids: Sequence[int]) -> None:
    scheduler.cache.clear()  # the previous run's
    request = Request()
    _next_token(scheduler, request, ids)
    scheduler.preempt(request)


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Seconds from the start, token and logits at each length."""

    our_s: list[float]
    their_s: list[float]
    tokens: list[SampledToken]
    logits: list[Tensor]


def _prefill_both(
    engine: Engine, peer: Transformers, ids: Sequence[int], lengths: Sequence[int], clock: Clock
) -> _Prefill:
    run = _Prefill([], [], [], [])
    engine.scheduler.cache.clear()  # the previous run's
    cache = peer.new_cache()
    request = Request()

    def ours(part: Sequence[int]) -> None:
        run.tokens.append(_next_token(engine.scheduler, request, part))

    def theirs(part: Sequence[int]) -> None:
        run.logits.append(peer.prefill(part, cache))

    start, our_s, their_s = 0, 0.0, 0.0
    for length in lengths:
        part = ids[start:length]
        our_s += seconds(clock, partial(ours, part))
        their_s += seconds(clock, partial(theirs, part))
        run.our_s.append(our_s)
        run.their_s.append(their_s)
        start = length
    engine.scheduler.preempt(request)
    return run


def exactness(sizes: Sizes) -> Iterator[Measurement]:
    """exact: cost of results that do not depend on the batch, in plain torch; the peer is the same engine with
    `exact=False`. The `cpu` backend is always exact."""
    with random_model(tiny_v4()) as folder:
        exact, other = (Engine.load(folder, exact=promise, backend="reference") for promise in (True, False))
    yield from _beside("exact", exact, other, "the same engine with exact=False", sizes)


def bfloat16(sizes: Sizes) -> Iterator[Measurement]:
    """bf16: weights in half the memory; the peer is the same engine with the same weights in float32."""
    with random_model(tiny_v4(), format="bf16") as folder:
        half, whole = Engine.load(folder), Engine.load(folder, dtype=torch.float32)
    peer = "the same weights held as float32"
    yield from _beside("bf16", half, whole, peer, sizes)
    ours, theirs = (
        held_bytes([engine.decoder.state_dict(), engine.scheduler.runner.forward]) / 1e6 for engine in (half, whole)
    )
    yield Measurement("bf16", "memory of the weights", ours, "MB", None, peer, theirs, higher_is_better=False)


def _beside(benchmark: str, ours: Engine, theirs: Engine, peer: str, sizes: Sizes) -> Iterator[Measurement]:
    """Measure prefill and decode of two engines that should produce the same tokens."""
    ids = random_ids(ours.spec, sizes.prefilled[0])
    away = float((ours.logits(ids) - theirs.logits(ids)).abs().max())
    sides: list[tuple[Engine, Request]] = []
    for engine in (ours, theirs):
        engine.scheduler.speculate = False
        sides.append((engine, Request(ids)))
        _next_token(engine.scheduler, sides[-1][1], ())
    for clock, num_threads, with_threads in CLOCKS:
        for what, count, run in (
            (f"prefill of {len(ids)} tokens", len(ids), lambda engine, _: engine.scheduler.logits(ids)),
            (
                f"decode at {len(ids)} tokens",
                sizes.decoded,
                lambda engine, request: batching.decode(engine.scheduler, [request], sizes.decoded),
            ),
        ):
            with threads(num_threads, *(engine.scheduler for engine, _ in sides)):
                timed = [[seconds(clock, partial(run, *side)) for side in sides] for _ in range(sizes.repeats)]
            rate, peer_rate = (Median.of([count / each[side] for each in timed]) for side in (0, 1))
            yield Measurement(
                benchmark,
                f"{what}, one session, {with_threads}",
                rate.value,
                f"tokens/{clock}",
                rate.spread,
                peer,
                peer_rate.value,
                outputs=f"logits of {len(ids)} tokens differ by at most {away:.1e}",
            )


def parity(sizes: Sizes) -> Iterator[Measurement]:
    """parity: logits of a random tiny-V4 against the peer's, other chunk sizes and restored states."""
    with random_model(tiny_v4()) as folder:
        engine, peer = Engine.load(folder), Transformers(folder)
    ids = random_ids(engine.spec, sizes.compared)
    end = _first_tie(engine.decoder, ids)
    whole = engine.logits(ids)
    rows = f"{end} of {len(ids)} rows: up to the first choice between index scores closer than {TIE:.0e}"
    away = (whole - peer.logits(ids)).abs().amax(-1)
    yield Measurement(
        "parity",
        f"logits of {len(ids)} tokens, largest difference from the peer",
        float(away[:end].max()),
        "logit",
        peer=str(peer),
        target=Bound("value", "<=", 1e-4),
        outputs=f"{rows}; {float((away <= 1e-4).float().mean()):.1%} of all rows lie within 1e-4",
    )
    for chunk in CHUNKS:
        chunked = engine.scheduler.logits(ids, chunk=chunk)
        yield Measurement(
            "parity",
            f"logits in chunks of {chunk}, largest difference from one chunk",
            float((chunked - whole).abs().max()),
            "logit",
            target=Bound("value", "<=", 0),
            stretch=Bound("value", "<=", 0),
            outputs=f"all {len(ids)} rows",
        )
    for how, hit, logits_V in _restored(engine, ids):
        yield Measurement(
            "parity",
            f"logits after a state from {how}, largest difference from one chunk",
            float((logits_V - whole[-1]).abs().max()),
            "logit",
            target=Bound("value", "<=", 0),
            stretch=Bound("value", "<=", 0),
            outputs=f"the last row; {hit} of {len(ids)} tokens were not computed again",
        )


def _restored(engine: Engine, ids: Sequence[int]) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the source of a restored state, the number of restored tokens, and the logits after `ids`, float32 [V]."""
    known = len(ids) - 40
    with tempfile.TemporaryDirectory() as place:
        cache_dir, path = Path(place, "cache"), Path(place, "session")
        writer = _copy(engine, cache_dir)
        request = Request(ids[:known])
        _next_token(writer, request, ())
        writer.save(request, path, model=engine.fingerprint)
        writer.close(request)
        assert writer.disk is not None
        writer.disk.close()
        for how, scheduler in (("the prefix cache", writer), ("the disk cache", _copy(engine, cache_dir))):
            request = Request(ids)
            _next_token(scheduler, request, ())
            assert request.logits_V is not None
            yield how, request.usage.hit_tokens, request.logits_V
        scheduler = _copy(engine, Path(place, "empty"))
        request = scheduler.open(path, model=engine.fingerprint)
        _next_token(scheduler, request, ids[known:])
        assert request.logits_V is not None
        yield "a file", request.usage.hit_tokens, request.logits_V


def _copy(engine: Engine, cache_dir: Path) -> Scheduler:
    """Return a scheduler for the same model that has computed nothing yet."""
    scheduler = Scheduler(engine.decoder, kv_cache_bytes=engine.kv_cache_bytes)
    scheduler.disk = DiskCache(cache_dir, scheduler.pools, model=engine.fingerprint, budget_bytes=CACHE_BYTES)
    return scheduler


@torch.inference_mode()
def _first_tie(decoder: Decoder, ids: Sequence[int]) -> int:
    """Return the first position at which the last chosen entry scores less than `TIE` above the next one."""
    trace, top_k, first = Trace(), decoder.spec.index_topk, len(ids)
    decoder(torch.tensor([ids]), trace=trace)
    for record in trace.index:
        if record.scores_BTW.shape[-1] > top_k:
            scores_BTW = record.scores_BTW.masked_fill(~record.visible_TW, -torch.inf)
            best = scores_BTW.topk(top_k + 1, dim=-1).values
            close_T = (best[0, :, -2] - best[0, :, -1] < TIE) & (record.visible_TW.sum(-1) > top_k)
            first = min([first, *(record.start + close_T.nonzero().flatten()).tolist()])
    return first


def _next_token(scheduler: Scheduler, request: Request, ids: Sequence[int]) -> SampledToken:
    """Append the ids, compute them, and return the greedy next token without appending it."""
    request.extend(ids)
    while request.logits_V is None:
        scheduler.step([request])
    [token] = batching.most_likely([request])
    return token


def memory(sizes: Sizes) -> Iterator[Measurement]:
    """memory: bytes per additional token of a long sequence, from the storage that the cache's tensors occupy."""
    with random_model(tiny_v4()) as folder:
        engine, peer = Engine.load(folder), Transformers(folder)
    # so that on both sides the window rows occupy the same number of bytes at the start and at the end
    peer.chunk = MAX_NUM_BATCHED_TOKENS
    low, high, peer_high = sizes.grown_from, sizes.grown_to, sizes.grown_to_peer
    ids = random_ids(engine.spec, high)

    their_cache = peer.new_cache()
    logits = [peer.prefill(ids[:low], their_cache)]
    their_low = held_bytes(their_cache)
    logits.append(peer.prefill(ids[low:peer_high], their_cache))
    their_rate = (held_bytes(their_cache) - their_low) / (peer_high - low)
    request = Request()
    tokens = [_next_token(engine.scheduler, request, part) for part in (ids[:low], ids[low:peer_high])]
    outputs = compare_tokens(tokens, logits)
    engine.scheduler.preempt(request)

    held = _held_while_filling(engine.scheduler, ids)
    formula = caching.bytes_per_token(engine.spec)
    constant = f"constant part {(held[low] - low * formula) / 2**20:.2f} MiB"
    rates = {length: (held[length] - held[low]) / (length - low) for length in held if length > high // 2}
    for what, value in (
        (f"memory per token between {low} and {high} tokens of one sequence", rates[high]),
        (f"the same at worst, up to any length in {high // 2 + 1}..{high}", max(rates.values())),
    ):
        yield Measurement(
            "memory",
            what,
            value,
            "B/token",
            peer=f"{peer}, up to {peer_high} tokens",
            peer_value=their_rate,
            higher_is_better=False,
            target=Bound("value", "<=", 1.1 * formula),
            stretch=Bound("value", "<=", 1.02 * formula),
            outputs=f"formula {formula:g} B/token, {constant}; {outputs}",
        )


def _held_while_filling(scheduler: Scheduler, ids: Sequence[int]) -> dict[int, int]:
    """Return the bytes that a sequence holds after each of the engine's steps, by its length."""
    scheduler.cache.clear()
    request, held = Request(), {}
    request.extend(ids)
    while request.pending:
        scheduler.step([request])
        scheduler.cache.clear()
        held[request.computed] = scheduler.pools.bytes_held
    scheduler.preempt(request)
    return held


def held_bytes(root: object) -> int:
    """Return the bytes behind every tensor reachable from `root`: spare capacity included, shared storage once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
    return sum(sizes.values())


def cold(sizes: Sizes) -> Iterator[Measurement]:
    """cold-start: load a sharded checkpoint and produce the first token, each time in a new process."""
    library = import_transformers()
    peer = f"transformers {library.__version__}, from_pretrained"
    with random_model(tiny_v4(n_routed_experts=sizes.cold_experts)) as folder:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        runs = [
            (cold_start.run("engine", folder), cold_start.run("transformers", folder)) for _ in range(sizes.repeats)
        ]
    away = max(abs(ours.token.logprob - theirs.token.logprob) for ours, theirs in runs)
    if any(ours.token.id != theirs.token.id for ours, theirs in runs) or away > 1e-3:
        raise OutputsDifferError(f"the first tokens differ: {[(a.token, b.token) for a, b in runs]}")
    outputs = f"same first token, log-probabilities differ by at most {away:.1e}"
    size = f"{weights / 1e6:.0f} MB of float32 shards in the page cache"

    def measurement(
        what: str,
        unit: str,
        number: Callable[[cold_start.ColdStart], float],
        target: Bound | None = None,
        stretch: Bound | None = None,
    ) -> Measurement:
        ours = Median.of([number(run) for run, _ in runs])
        theirs = median(number(run) for _, run in runs)
        return Measurement(
            "cold-start",
            f"{what}, {size}",
            ours.value,
            unit,
            ours.spread,
            peer,
            theirs,
            higher_is_better=False,
            target=target,
            stretch=stretch,
            outputs=outputs,
        )

    yield measurement("open and first token", "s", lambda run: run.first_s, target=Bound("ratio", ">=", 2))
    yield measurement("start of the process to the first token, imports included", "s", lambda run: run.process_s)
    yield measurement(
        "open and first token, beyond a warm first token",
        "s",
        lambda run: run.first_s - run.warm_s,
        stretch=Bound("value", "<=", 0.2),
    )
    yield measurement(
        "peak memory over weights",
        "x",
        lambda run: run.peak_bytes / weights,
        stretch=Bound("value", "<=", 1.05),
    )


BENCHMARKS: dict[str, Callable[[Sizes], Iterator[Measurement]]] = {
    "decode": decode,
    "batch-decode": lambda sizes: batching.decode_together(sizes.prefilled[0], sizes.decoded, sizes.repeats),
    "prefill": prefill,
    "parity": parity,
    "memory": memory,
    "scheduler": lambda sizes: scheduling.step(*sizes.scheduled, sizes.repeats),
    "prefix-lookup": lambda sizes: caching.lookup(sizes.looked_up, 5 * sizes.repeats),
    "append-turn": lambda sizes: scheduling.append(sizes.appended_to, 5 * sizes.repeats),
    "restore": lambda sizes: caching.restore(sizes.prefilled[-1], sizes.repeats),
    "disk-writes": lambda sizes: caching.amplification(*sizes.stored),
    "grammar-cost": lambda sizes: grammars.cost(5 * sizes.repeats),
    "forced-tokens": lambda _: grammars.saved(),
    "cold-start": cold,
    experts_on_disk.NAME: lambda sizes: experts_on_disk.small(
        tiny_v4(n_routed_experts=sizes.cold_experts), sizes.decoded
    ),
    flash_width.NAME: lambda sizes: flash_width.flash_width(*sizes.wide, sizes.repeats),
    "exact": exactness,
    "bf16": bfloat16,
    "speculation": lambda sizes: caching.guesses(sizes.guessed, 5 * sizes.repeats),
    "context-64k": lambda sizes: caching.long_session("context-64k", sizes.long, sizes.repeats),
    "context-1m": lambda sizes: caching.long_session("context-1m", sizes.nightly, sizes.repeats),
    "decode-tiny": decode_packaged,
}
"""The names for `--only`, in the order in which they run."""

NIGHTLY = ("context-1m",)
"""Benchmarks that take half an hour or more and run only when named."""

ELSEWHERE = ("turn-overhead", "shared-prefill", "parallel-calls", "sandboxes")
"""Names of the benchmarks in `agentkit.benchmarks`; they are skipped here."""
