"""Savings of the runtime: prefix lookup, saved sessions, the disk cache and drafts. The peer does without them.

Benchmark functions follow the contract in `registry.py`: one per benchmark, with outputs compared in the same run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.peers import random_ids
from agentkit_engine.benchmarks.random_checkpoint import random_model, tiny_v4
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median, seconds, threads
from agentkit_engine.chat import Tokenizer, encode_continuation_ids, encode_ids
from agentkit_engine.engine import Engine
from agentkit_engine.runtime.prefix_cache import IdChain, Keep, PrefixCache
from agentkit_engine.runtime.state import SPAN, Pools
from agentkit_engine.runtime.state import Sequence as CachedSequence
from agentkit_engine.sampler import SampledToken
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.session import Session
from agentkit_engine.spec import ModelSpec

APPENDED = 50
"""Token ids appended per turn."""
RESIDENT = 1000
"""Sessions that have left a checkpoint."""
STRETCH_LENGTH = 131_072
"""Prompt length for which prefix-lookup has a stretch target."""
SAID = 4
"""Token ids sampled in a turn where their number matters little."""
SHORT = 1024
"""Length of the short session that a long one is compared with."""
DECODED = 16
"""Tokens per timed run of decoding."""


def lookup(lengths: Sequence[int], repeats: int) -> Iterator[Measurement]:
    """prefix-lookup: find the cached prefix of a long session after one more turn, with the hashes of its past kept."""
    spec = tiny_v4()
    cache = PrefixCache(Pools(spec, slots=1, spans=1, device=torch.device("meta")))
    for number in range(RESIDENT):
        resident = CachedSequence(number)
        resident.length = 10
        cache.add([number, *range(9)], IdChain(), resident, Keep.TURN)
    for length in lengths:
        ids = random_ids(spec, length)
        chain, own = IdChain(), CachedSequence(RESIDENT)
        own.length = length
        cache.add(ids, chain, own, Keep.TURN)
        longer = ids + ids[:APPENDED]
        found = [cache.find(longer, each) for each in (chain, IdChain())]
        if any(each is None or each[1] != length for each in found):
            raise OutputsDifferError(f"lookups with kept and new hashes found {found}, expected {length} ids")
        ours = Median.of([1e3 * seconds("s", partial(cache.find, longer, chain)) for _ in range(repeats)])
        peers = [partial(cache.find, longer, IdChain()) for _ in range(repeats)]
        peer = Median.of([1e3 * seconds("s", hash_and_find) for hash_and_find in peers])
        yield Measurement(
            "prefix-lookup",
            f"prefix lookup, {length} ids and {APPENDED} more, {RESIDENT} checkpoints resident",
            ours.value,
            "ms",
            ours.spread,
            "the same, hashing every id again",
            peer.value,
            higher_is_better=False,
            target=Bound("ratio", ">=", 1),
            stretch=Bound("value", "<=", 0.3) if length <= STRETCH_LENGTH else None,
            outputs="both find the session's checkpoint",
        )


def restore(length: int, repeats: int) -> Iterator[Measurement]:
    """restore: open a saved long session, or compute it again; the next token is compared."""
    with random_model(tiny_v4()) as folder, tempfile.TemporaryDirectory() as place:
        engine = Engine.load(folder, threads=1)
        path = Path(place, "session")
        ids = random_ids(engine.spec, length)

        def prefill() -> Session:
            engine.scheduler.cache.clear()
            session = engine.session()
            session.append(ids)
            next(session.generate(SamplingParams(temperature=0)))
            return session

        recomputed = Median.of([seconds("s", lambda: prefill().close()) for _ in range(min(2, repeats))])
        session = prefill()
        session.save(path)
        expected = next(session.generate(SamplingParams(temperature=0)))
        session.close()
        engine.scheduler.cache.clear()
        size = path.stat().st_size
        opened = engine.open(path)
        if next(opened.generate(SamplingParams(temperature=0))) != expected:
            raise OutputsDifferError("the restored session produced another token than the live one")
        opened.close()
        restored = Median.of([seconds("s", lambda: engine.open(path).close()) for _ in range(5 * repeats)])
        yield Measurement(
            "restore",
            f"restore a session of {length} tokens ({size / 1e6:.1f} MB in the page cache), one thread",
            restored.value,
            "s",
            restored.spread,
            "its own prefill",
            recomputed.value,
            higher_is_better=False,
            target=Bound("ratio", ">=", 30),
            stretch=Bound("ratio", ">=", 200),
            outputs="the next token and its log-probability, bit for bit",
        )


def long_session(benchmark: str, length: int, repeats: int) -> Iterator[Measurement]:
    """Memory, cost of a token and time to restore of a session that grows to `length` tokens.

    The session is prefilled, decoded, forked, saved and restored; the fork and the restored session must produce the
    same tokens.
    """
    with random_model(tiny_v4()) as folder, tempfile.TemporaryDirectory() as place:
        engine, path = Engine.load(folder, threads=1), Path(place, "session")
        engine.scheduler.speculate = False  # one token per forward
        ids = random_ids(engine.spec, length - DECODED * (repeats + 1) - 1)
        short, session = engine.session(), engine.session()
        short.append(ids[:SHORT])
        _say(short, 1)
        session.append(ids)
        prefill_s = seconds("s", lambda: _say(session, 1))
        added_ms = []
        for _ in range(repeats):
            short_s, long_s = (seconds("s", partial(_say, each, DECODED)) for each in (short, session))
            added_ms.append(1e3 * (long_s - short_s) / DECODED)
        added = Median.of(added_ms)
        scan = Median.of([1e3 * seconds("s", partial(_scan, engine, length)) for _ in range(5 * repeats)])
        short.close()
        engine.scheduler.cache.clear()
        held = engine.scheduler.pools.bytes_held
        fork = session.fork()[0]
        session.save(path)
        said = _say(session, DECODED)
        again = Engine.load(folder, threads=1)
        again.scheduler.speculate = False
        restored_s = Median.of([seconds("s", lambda: again.open(path).close()) for _ in range(repeats)])
        if any(_say(other, DECODED) != said for other in (fork, again.open(path))):
            raise OutputsDifferError("the fork or the restored session produced other tokens than the session")
    formula = length * bytes_per_token(engine.spec) + engine.scheduler.pools.bytes_per_slot
    outputs = f"{DECODED} tokens at {length}, from a fork and restored, bit for bit; prefilled in {prefill_s:.0f} s"
    yield Measurement(
        benchmark,
        f"memory held by a session of {length} tokens over the formula and one slot",
        held / formula,
        "x",
        target=Bound("value", "<=", 1.05),
        outputs=outputs,
    )
    yield Measurement(
        benchmark,
        f"decode at {length} tokens, beyond that at {SHORT}, one thread",
        added.value,
        "ms",
        added.spread,
        "a bare product of the index keys with a query's heads",
        scan.value,
        higher_is_better=False,
        target=Bound("ratio", ">=", 1 / 1.5),
        outputs=outputs,
    )
    yield Measurement(
        benchmark,
        f"restore a session of {length} tokens, one thread",
        restored_s.value,
        "s",
        restored_s.spread,
        "its own prefill",
        prefill_s,
        higher_is_better=False,
        target=Bound("ratio", ">=", 100),
        outputs=outputs,
    )


def bytes_per_token(spec: ModelSpec) -> float:
    """Return the bytes of one token's compressed entries in float32, the only state that grows with length."""
    return 4 * sum(
        (spec.head_dim + (spec.index_head_dim if layer.attention == "csa" else 0)) / layer.compress_ratio
        for layer in spec.layers
        if layer.compress_ratio
    )


def _say(session: Session, count: int) -> list[SampledToken]:
    return list(session.generate(SamplingParams(temperature=0, max_tokens=count)))


@torch.inference_mode()
def _scan(engine: Engine, length: int) -> None:
    """Score every index key of a session of `length` tokens against one query, in each layer."""
    heads_CJ = torch.ones(engine.spec.index_head_dim, engine.spec.index_n_heads)
    with threads(1):
        for pools in engine.scheduler.pools.layers:
            if "index_entries" in pools:
                entries = pools["index_entries"]
                entries.flatten(0, 1)[: length * entries.shape[1] // SPAN] @ heads_CJ


def amplification(turns: int, fed: int, every: int) -> Iterator[Measurement]:
    """disk-writes: bytes that a session of many turns writes to the disk cache, relative to its final saved size.

    The peer saves the whole session again after every `every` tokens. The second measurement closes the session after
    each turn, as if each run ended there and was continued later.
    """
    for how, continued in (("parked after each", False), ("closed after each", True)):
        with random_model(tiny_v4()) as folder, tempfile.TemporaryDirectory() as place:
            path, cache_dir = Path(place, "session"), Path(place, "cache")
            engine = Engine.load(folder, cache_dir=cache_dir)
            rewritten = 0
            session = engine.session()
            for turn in range(turns):
                before = len(session)
                session.append(random_ids(engine.spec, fed, seed=turn))
                for _ in session.generate(SamplingParams(temperature=0, max_tokens=SAID)):
                    pass
                if len(session) // every > before // every or turn == turns - 1:
                    session.save(path)
                    final = path.stat().st_size
                    rewritten += final
                session.park()
                if continued:
                    session.close()
                    ids, session = session.token_ids, engine.session()
                    session.append(ids)
            length = len(session)
            session.close()
            engine.flush()
            written = sum(file.stat().st_size for file in cache_dir.rglob("*.segment"))
            outputs = _same_from_disk(folder, cache_dir, path, session.token_ids)
        yield Measurement(
            "disk-writes",
            f"bytes written ÷ final, a session of {turns} turns, {how}, {length} tokens, {final / 1e6:.1f} MB at last",
            written / final,
            "x",
            None,
            f"the whole session written again every {every} tokens and at the end",
            rewritten / final,
            higher_is_better=False,
            target=None if continued else Bound("value", "<=", 1.5),
            stretch=None if continued else Bound("value", "<=", 1.15),
            outputs=outputs,
        )


def _same_from_disk(folder: Path, cache_dir: Path, path: Path, ids: Sequence[int]) -> str:
    """Continue from the disk cache and from the file in an engine that computed neither, and compare."""
    engine = Engine.load(folder, cache_dir=cache_dir)
    with engine.session() as cached, engine.open(path) as opened:
        cached.append([*ids, 0])
        opened.append([0])
        tokens = [next(session.generate(SamplingParams(temperature=0))) for session in (cached, opened)]
        computed = cached.usage.miss_tokens
    engine.flush()
    if tokens[0] != tokens[1]:
        raise OutputsDifferError(f"the next token is {tokens[0]} from the disk cache and {tokens[1]} from the file")
    return f"from both the same next token, bit for bit; {computed} tokens computed again from the disk cache"


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


def guesses(turns: int, repeats: int) -> Iterator[Measurement]:
    """speculation: the packaged model calls a tool turn after turn, with drafts and without."""
    engine = Engine.load("tiny", threads=1)
    said: list[list[tuple[int, float]]] = [[], []]
    per_forward, rates = [0.0, 0.0], [list[float](), list[float]()]
    for _ in range(repeats + 1):
        for side, speculate in enumerate((True, False)):
            engine.scheduler.speculate = speculate
            engine.scheduler.cache.clear()
            before, tokens = engine.scheduler.steps, list[tuple[int, float]]()
            elapsed = seconds("s", partial(_calls, engine, turns, tokens))
            per_forward[side], said[side] = len(tokens) / (engine.scheduler.steps - before), tokens
            rates[side].append(len(tokens) / elapsed)
    if said[0] != said[1]:
        raise OutputsDifferError("drafts changed the sampled tokens")
    medians = [Median.of(of_side[1:]) for of_side in rates]  # drop the first run, which compiles or loads kernels
    outputs = f"the same {len(said[0])} tokens and log-probabilities, bit for bit"
    doing = f"tiny calls one tool {turns} times in a session, greedy, one thread"
    yield Measurement(
        "speculation",
        f"sampled tokens per forward, {doing}",
        per_forward[0],
        "tokens",
        None,
        "the same without guesses",
        per_forward[1],
        target=Bound("value", ">=", 1.5),
        stretch=Bound("value", ">=", 2.5),
        outputs=outputs,
    )
    yield Measurement(
        "speculation",
        f"sampled tokens, {doing}",
        medians[0].value,
        "tokens/s",
        medians[0].spread,
        "the same without guesses",
        medians[1].value,
        outputs=outputs,
    )


def _calls(engine: Engine, turns: int, said: list[tuple[int, float]]) -> None:
    """Answer `turns` requests, each with a result for the model's call, and add the sampled tokens to `said`."""
    tokenizer: Tokenizer = engine.tokenizer
    params = SamplingParams(temperature=0, max_tokens=60, stop_token_ids=frozenset([tokenizer.eos_id]))
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
