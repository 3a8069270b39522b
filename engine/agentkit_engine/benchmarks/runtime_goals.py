"""What the runtime saves: prefix lookups, sessions in files, shared prompts, guesses. The peer is the same without.

The same contract as in `goals.py`: one function per goal, outputs compared in the same run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.peers import random_ids, random_model, tiny_v4
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median, seconds
from agentkit_engine.chat import Tokenizer, encode_continuation_ids, encode_ids
from agentkit_engine.engine import Engine
from agentkit_engine.runtime import Batcher, Work
from agentkit_engine.runtime.prefix_cache import IdChain, Keep
from agentkit_engine.runtime.state import SPAN
from agentkit_engine.sampler import SamplingParams
from agentkit_engine.session import Session

APPENDED = 50
"""Ids of one turn."""


def lookup(length: int, repeats: int) -> Iterator[Measurement]:
    """C7: find what is known of a long session after one more turn; the hashes of its past are kept."""
    with random_model(tiny_v4()) as folder:
        batcher = Engine.load(folder).batcher
    ids = random_ids(batcher.pools.spec, length)
    while batcher.pools.free_slots:
        sequence = batcher.pools.open()
        sequence.length = 10
        batcher.cache.add([len(batcher.cache), *ids[:9]], IdChain(), sequence, Keep.TURN)
    resident = len(batcher.cache)
    chain = IdChain()
    chain.upto(ids, len(ids) // SPAN)
    longer = ids + ids[:APPENDED]
    ours = Median.of([1e3 * seconds("s", lambda: batcher.cache.find(longer, chain)) for _ in range(repeats)])
    peer = Median.of([1e3 * seconds("s", lambda: batcher.cache.find(longer, IdChain())) for _ in range(repeats)])
    yield Measurement(
        "C7",
        f"prefix lookup, {length} ids and {APPENDED} more, {resident} checkpoints resident",
        ours.value,
        "ms",
        ours.spread,
        "the same, hashing every id again",
        peer.value,
        higher_is_better=False,
        good=Bound("ratio", ">=", 1),
        moonshot=Bound("value", "<=", 0.3),
        outputs="both find nothing",
    )


def restore(length: int, repeats: int) -> Iterator[Measurement]:
    """C9: go on with a long session out of a file, or compute it again; the next token is compared."""
    with random_model(tiny_v4()) as folder, tempfile.TemporaryDirectory() as place:
        engine = Engine.load(folder)
        path = Path(place, "session")
        ids = random_ids(engine.spec, length)

        def prefill() -> Session:
            engine.batcher.cache.clear()
            session = engine.session()
            session.append(ids)
            next(session.generate(SamplingParams(temperature=0)))
            return session

        recomputed = Median.of([seconds("s", lambda: prefill().close()) for _ in range(min(2, repeats))])
        session = prefill()
        session.save(path)
        expected = next(session.generate(SamplingParams(temperature=0)))
        session.close()
        engine.batcher.cache.clear()
        size = path.stat().st_size
        opened = engine.open(path)
        if next(opened.generate(SamplingParams(temperature=0))) != expected:
            raise OutputsDifferError("the restored session says another token than the live one")
        opened.close()
        restored = Median.of([seconds("s", lambda: engine.open(path).close()) for _ in range(5 * repeats)])
        yield Measurement(
            "C9",
            f"restore a session of {length} tokens ({size / 1e6:.1f} MB in the page cache), one thread",
            restored.value,
            "s",
            restored.spread,
            "its own prefill",
            recomputed.value,
            higher_is_better=False,
            good=Bound("ratio", ">=", 30),
            moonshot=Bound("ratio", ">=", 200),
            outputs="the next token and its log-probability, bit for bit",
        )


def shared(trajectories: int, turns: int, head: int) -> Iterator[Measurement]:
    """C14: agents that begin alike, all live at the same time; each turn samples 8 ids and is told 30 more.

    Driven as the loop drives sessions, but through the batcher, so that it shows the engine alone.
    """
    engine = Engine.load("tiny")
    batcher = Batcher(engine.decoder, state_bytes=engine.state_bytes)
    ids = random_ids(engine.spec, head + trajectories * turns * 30)
    prompts = [ids[head + 30 * index : head + 30 * (index + 1)] for index in range(trajectories * turns)]
    works = []
    for index in range(trajectories):
        work = Work()
        work.extend(ids[:head])
        work.mark()
        work.extend(prompts[index])
        works.append(work)
    for turn in range(turns):
        for _ in range(8):
            while waiting := [work for work in works if work.logits_V is None]:
                batcher.advance(waiting)
            for work in works:
                assert work.logits_V is not None
                work.push(int(work.logits_V.argmax()))
        if turn + 1 < turns:
            for index, work in enumerate(works):
                work.extend(prompts[(turn + 1) * trajectories + index])
    unique = head + 30 * turns * trajectories
    without = sum(head + turn * 38 + 30 for turn in range(turns)) * trajectories
    hits = sum(work.usage.hit_tokens for work in works)
    fed = sum(work.usage.hit_tokens + work.usage.miss_tokens for work in works)
    yield Measurement(
        "C14",
        f"tokens prefilled ÷ unique, {trajectories} trajectories of {turns} turns, {head} tokens in common",
        batcher.prefilled / unique,
        "x",
        None,
        "every turn prefills its whole prompt (counted, not run)",
        without / unique,
        higher_is_better=False,
        good=Bound("value", "<=", 1.2),
        moonshot=Bound("value", "<=", 1.02),
        outputs=(
            f"{hits} of {fed} fed ids found in the cache; {1 - batcher.prefilled / without:.1%} of the "
            "peer's tokens saved"
        ),
    )


FUNCTION = {
    "name": "find_record",
    "description": "Return the record of a person.",
    "parameters": {
        "type": "object",
        "properties": {"person": {"type": "string"}, "number": {"type": "integer"}},
        "required": ["person", "number"],
    },
}
NAMES = ("Anna", "Boris", "Clara", "Dora", "Emil", "Frida")


def guesses(turns: int) -> Iterator[Measurement]:
    """C16: the packaged model calls a tool in turn after turn, with guesses and without."""
    engine = Engine.load("tiny")
    rates, said = [], []
    for speculate in (True, False):
        engine.batcher.speculate = speculate
        engine.batcher.cache.clear()
        before = engine.batcher.steps
        tokens: list[tuple[int, float]] = []
        elapsed = seconds("s", partial(_calls, engine, turns, tokens))
        rates.append((len(tokens) / (engine.batcher.steps - before), len(tokens) / elapsed))
        said.append(tokens)
    if said[0] != said[1]:
        raise OutputsDifferError("guesses changed what was sampled")
    outputs = f"the same {len(said[0])} tokens and log-probabilities, bit for bit"
    for what, unit, index in (("sampled tokens per forward", "tokens", 0), ("sampled tokens", "tokens/s", 1)):
        yield Measurement(
            "C16",
            f"{what}, tiny calls one tool {turns} times in a session, greedy, one thread",
            rates[0][index],
            unit,
            None,
            "the same without guesses",
            rates[1][index],
            good=Bound("value", ">=", 1.5) if index == 0 else None,
            moonshot=Bound("value", ">=", 2.5) if index == 0 else None,
            outputs=outputs,
        )


def _calls(engine: Engine, turns: int, said: list[tuple[int, float]]) -> None:
    """Add to `said` what the model samples over `turns` requests, each answered by a result of its call."""
    tokenizer: Tokenizer = engine.tokenizer
    params = SamplingParams(temperature=0, max_tokens=60, stop_ids=frozenset([tokenizer.eos_id]))
    with engine.session() as session:
        for turn in range(turns):
            name = NAMES[turn % len(NAMES)]
            asked = {"role": "user", "content": f"Call find_record with {name} and {turn + 11} and tell me the result."}
            if turn == 0:
                ids = encode_ids(
                    [asked],
                    tokenizer=tokenizer,
                    tools=[{"type": "function", "function": FUNCTION}],
                    effort="high",
                    think=True,
                )
            else:
                ids = encode_continuation_ids([asked], tokenizer=tokenizer, think=True)
            _exchange(session, ids, params, said, tokenizer.eos_id)
            result = {"role": "tool", "tool_call_id": f"call_{turn}_0", "content": f"{name} has bado{turn}"}
            _exchange(
                session, encode_continuation_ids([result], tokenizer=tokenizer, think=False), params, said,
                tokenizer.eos_id,
            )  # fmt: skip


def _exchange(
    session: Session, ids: Sequence[int], params: SamplingParams, said: list[tuple[int, float]], eos: int
) -> None:
    session.append(ids)
    said += [(token.id, token.logprob) for token in session.generate(params)]
    if said[-1][0] != eos:
        session.append([eos])
