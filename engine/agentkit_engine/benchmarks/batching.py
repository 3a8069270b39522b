"""Decoding of several sessions at once: continuous batching of mixed lengths beside the peer's best case.

Benchmark functions follow the contract in `registry.py`.

Dimension key: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.floor import DECODE_GOAL, beside_products
from agentkit_engine.benchmarks.peers import Transformers, compare_tokens, random_ids
from agentkit_engine.benchmarks.random_checkpoint import random_model, tiny_v4
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import CLOCKS, Clock, Median, seconds, threads
from agentkit_engine.engine import Engine
from agentkit_engine.runtime import Request, Scheduler
from agentkit_engine.sampler import Draw, SampledToken, sample
from agentkit_engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)
BATCH = 8


def decode_together(longest: int, decoded: int, repeats: int) -> Iterator[Measurement]:
    """batch-decode: eight sessions of eight lengths; the peer has eight sequences of their mean length."""
    with random_model(tiny_v4()) as folder:
        engine, peer = Engine.load(folder), Transformers(folder)
    scheduler = engine.scheduler
    scheduler.speculate = False  # one token per forward on both sides; `speculation` measures drafts
    lengths = [longest * (index + 1) // BATCH for index in range(BATCH)]
    mean = sum(lengths) // BATCH
    prompts = [random_ids(engine.spec, longest, seed=index + 1) for index in range(BATCH)]
    peer.chunk = 512  # attention scores of eight times 2,048 rows would take gigabytes
    peer.tune_decode(prompts[0][:decoded], together=BATCH)

    equal = _prefill(scheduler, [prompt[:mean] for prompt in prompts])
    cache = peer.new_cache()
    first_BV = peer.prefill_together([prompt[:mean] for prompt in prompts], cache)
    tokens_TB = decode(scheduler, equal, decoded)
    ids_TB = [[token.id for token in tokens_B] for tokens_B in tokens_TB]
    logits_TBV = [first_BV, *peer.decode_together(ids_TB[:-1], cache)]
    outputs = compare_tokens([t for row in tokens_TB for t in row], [x for rows in logits_TBV for x in rows])
    for request in equal:
        scheduler.preempt(request)

    mixed = [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)]
    requests = _prefill(scheduler, mixed)
    _compare_alone(scheduler, mixed, decode(scheduler, requests, decoded))
    for clock, num_threads, with_threads in CLOCKS:
        with threads(num_threads, scheduler):
            runs = [_time_both(scheduler, requests, peer, cache, decoded, clock) for _ in range(repeats)]
        ours = Median.of([BATCH * decoded / our_s for our_s, _ in runs])
        theirs = Median.of([BATCH * decoded / their_s for _, their_s in runs])
        bounded = clock == "s"
        yield Measurement(
            "batch-decode",
            f"decode, {BATCH} sessions at {lengths[0]} to {lengths[-1]} tokens, {with_threads}",
            ours.value,
            f"tokens/{clock}",
            ours.spread,
            f"{peer}, one batch of {BATCH} equal sequences at {mean} tokens, {peer.decode_experts} experts",
            theirs.value,
            target=Bound("ratio", ">=", 1) if bounded else None,
            stretch=Bound("ratio", ">=", 2) if bounded else None,
            outputs=f"at {mean} tokens each: {outputs}; mixed: bit for bit what each says alone",
        )
    yield beside_products(
        scheduler,
        "batch-decode",
        f"a step, {BATCH} sessions at {lengths[0]} to {lengths[-1]} tokens",
        partial(decode, scheduler, requests, decoded),
        repeats,
        goal=DECODE_GOAL,
        steps=decoded,
    )


def _time_both(
    scheduler: Scheduler, requests: Sequence[Request], peer: Transformers, cache: Any, count: int, clock: Clock
) -> tuple[float, float]:
    """Return the seconds of `count` forwards on each side."""
    tokens_TB: list[list[SampledToken]] = []
    our_s = seconds(clock, lambda: tokens_TB.extend(decode(scheduler, requests, count)))
    ids_TB = [[token.id for token in tokens_B] for tokens_B in tokens_TB]
    return our_s, seconds(clock, lambda: peer.decode_together(ids_TB, cache))


def _prefill(scheduler: Scheduler, prompts: Sequence[Sequence[int]]) -> list[Request]:
    requests = [Request(prompt) for prompt in prompts]
    _compute(scheduler, requests)
    return requests


def decode(scheduler: Scheduler, requests: Sequence[Request], count: int) -> list[list[SampledToken]]:
    """Decode `count` greedy tokens for every request, with a forward after each."""
    tokens_TB = []
    for _ in range(count):
        tokens_TB.append(most_likely(requests))
        for request, token in zip(requests, tokens_TB[-1], strict=True):
            request.push(token.id)
        _compute(scheduler, requests)
    return tokens_TB


def most_likely(requests: Sequence[Request]) -> list[SampledToken]:
    """Return the most likely next token of each request, whose ids have all been computed."""
    logits = [request.logits_V for request in requests if request.logits_V is not None]
    tokens = sample(torch.stack(logits), [Draw(GREEDY, seed=0, position=request.length) for request in requests])
    if errors := [token for token in tokens if isinstance(token, Exception)]:
        raise errors[0]
    return [token for token in tokens if isinstance(token, SampledToken)]


def _compute(scheduler: Scheduler, requests: Sequence[Request]) -> None:
    while waiting := [request for request in requests if request.logits_V is None]:
        scheduler.step(waiting)


def _compare_alone(scheduler: Scheduler, prompts: Sequence[Sequence[int]], tokens_TB: list[list[SampledToken]]) -> None:
    for index, prompt in enumerate(prompts):
        scheduler.cache.clear()
        (alone,) = _prefill(scheduler, [prompt])
        tokens_T1 = decode(scheduler, [alone], len(tokens_TB))
        scheduler.preempt(alone)
        if [tokens_B[0] for tokens_B in tokens_T1] != [tokens_B[index] for tokens_B in tokens_TB]:
            raise OutputsDifferError(f"session {index} of {len(prompts)} produced other tokens in the batch than alone")
