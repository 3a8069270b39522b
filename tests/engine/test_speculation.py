"""Drafts change the number of forwards and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit_engine import AsyncEngine, Engine, ModelSpec, SamplingParams
from agentkit_engine.chat import encode_ids
from agentkit_engine.model import Decoder
from agentkit_engine.model.parameters import MTPBlock
from agentkit_engine.runtime import Computed, Request, ScheduledTokens, Scheduler
from agentkit_engine.runtime.state import SPAN
from agentkit_engine.speculation import LONGEST, PATIENCE, Drafter, best_length

from .conftest import randomize_, sample_one, small_config, some_ids


@torch.no_grad()
def make_decoder(*, mtp: bool) -> Decoder:
    """Return a model that tends to repeat itself, and an MTP block that expects it to: some drafts are right, some
    wrong."""
    spec = ModelSpec.from_config(small_config(0, 4, 128, mtp=mtp, sliding_window=48, index_topk=8))
    decoder = randomize_(Decoder(spec), torch.Generator().manual_seed(1))
    for block in decoder.mtp:
        assert isinstance(block, MTPBlock)
        decoder.embed.weight += 3 * decoder.embed.weight[0]
        block.h_proj.weight.copy_(torch.eye(spec.hidden_size))
        block.e_proj.weight.zero_()
    return decoder


def make_engine(*, mtp: bool) -> Engine:
    return Engine(make_decoder(mtp=mtp), name="small", dialect="v4-preview", folder=Path("none"))


@pytest.fixture(scope="module", params=[False, True], ids=["n-grams", "n-grams and MTP"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return make_engine(mtp=request.param)


def said(engine: Engine, ids: list[int], params: SamplingParams, *, speculate: bool) -> list[tuple[int, float]]:
    engine.scheduler.cache.clear()
    engine.scheduler.speculate = speculate
    with engine.session() as session:
        session.append(ids)
        return [(token.id, token.logprob) for token in session.generate(params)]


REPEATING = [1, 2, 3, 4, 5, 6, 7, 8, 9] * 6


@pytest.mark.parametrize("temperature", [0, 0.05, 1])
@pytest.mark.parametrize("ids", [REPEATING, [*range(1, 90), 5, 6, 7, 8]])
def test_the_same_bits_with_and_without(engine: Engine, ids: list[int], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=60)
    expected = said(engine, ids, params, speculate=False)
    assert said(engine, ids, params, speculate=True) == expected
    last = expected[len(expected) // 2][0]
    stopped = SamplingParams(temperature=temperature, seed=3, max_tokens=60, stop_token_ids=frozenset([last]))
    first = [token_id for token_id, _ in expected].index(last)
    assert said(engine, ids, stopped, speculate=True) == expected[: first + 1]


def test_repetition_takes_fewer_forwards(engine: Engine) -> None:
    params, steps = SamplingParams(temperature=0, logit_bias={5: 1e6}, max_tokens=200), []
    for speculate in (False, True):
        before = engine.scheduler.steps
        assert [token_id for token_id, _ in said(engine, REPEATING, params, speculate=speculate)] == [5] * 200
        steps.append(engine.scheduler.steps - before)
    assert steps[0] == 200
    assert steps[1] < 200 / LONGEST + 15


def test_after_right_and_wrong_drafts_a_session_can_be_shortened_forked_and_saved(
    engine: Engine, tmp_path: Path
) -> None:
    """At every token of a generation with drafts."""
    engine.scheduler.speculate = True
    params = SamplingParams(temperature=0, max_tokens=40)
    rest = SamplingParams(temperature=0, max_tokens=3)
    with engine.session() as session:
        session.append(REPEATING)
        for count, _ in enumerate(session.generate(params)):
            if count % 3 == 0:
                (fork,) = session.fork()
                session.save(tmp_path / "saved")
                for other in (fork, engine.open(tmp_path / "saved")):
                    ids = list(other.token_ids)
                    tokens = [token.id for token in other.generate(rest)]
                    rows = engine.logits([*ids, *tokens[:-1]])[-3:]
                    assert tokens == rows.argmax(-1).tolist()
                    other.close()


@pytest.mark.anyio
@pytest.mark.parametrize("mtp", [False, True])
async def test_many_sessions_draft_in_the_same_forwards(mtp: bool) -> None:
    engine = make_engine(mtp=mtp)
    params = SamplingParams(temperature=0, max_tokens=60)
    prompts = [[seed, *REPEATING[seed:], 50 + seed, *REPEATING[:20]] for seed in range(5)]
    expected = [said(engine, ids, params, speculate=False) for ids in prompts]
    engine.scheduler.cache.clear()
    engine.scheduler.speculate = True
    got: dict[int, list[tuple[int, float]]] = {}

    async def run(running: AsyncEngine, number: int) -> None:
        async with running.session() as session:
            await session.append(prompts[number])
            got[number] = [(token.id, token.logprob) async for token in session.generate(params)]

    async with AsyncEngine(engine) as running, anyio.create_task_group() as task_group:
        for number in range(len(prompts)):
            task_group.start_soon(run, running, number)
    assert [got[number] for number in range(len(prompts))] == expected
    assert engine.scheduler.drafted > 0
    assert (engine.scheduler.mtp_drafted > 0) == mtp


def test_drafts_continue_sampled_ids_only(engine: Engine) -> None:
    request = Request(REPEATING)
    assert request.draft(4) == []  # a prompt is pending
    while request.logits_V is None:
        engine.scheduler.step([request])
    request.push(1)
    assert request.draft(4)
    request.extend([2])
    assert request.draft(4) == []


def test_the_draft_length_follows_the_accepted_ids() -> None:
    drafter, ids = Drafter(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 2
    sizes = []
    for _ in range(4):
        draft = drafter.propose(ids, 100)
        sizes.append(len(draft))
        ids = [*ids, *draft]
        for _ in draft:
            drafter.accepted()
    assert sizes == sorted(sizes) and 1 < sizes[0] < sizes[-1] == LONGEST
    assert ids == [number % 12 + 1 for number in range(24 + sum(sizes))]
    wrong = [len(drafter.propose(ids, 100)) for _ in range(20)]
    assert wrong[0] == LONGEST and 0 in wrong and max(wrong[wrong.index(0) :]) <= 1
    while not drafter.propose(ids, 100):  # the drafter always tries again
        pass


@pytest.mark.parametrize(
    ("chance", "cost", "length"), [(0.0, 0.1, 0), (0.1, 0.2, 0), (0.5, 0.2, 1), (0.9, 0.4, 4), (0.9, 0.0, 8), (1, 1, 0)]
)
def test_the_draft_length_maximises_throughput(chance: float, cost: float, length: int) -> None:
    assert best_length(chance, cost, 8) == length


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8), st.integers(0, 5))
def test_a_draft_repeats_what_followed_the_last_occurrence(pieces: list[list[int]], most: int) -> None:
    drafter, ids = Drafter(), []
    for piece in pieces:
        ids += piece
        draft = drafter.propose(ids, most)
        assert len(draft) <= most
        if draft:
            drafter.accepted()
            ends = [n for n in (4, 2) if any(ids[i : i + n] == ids[-n:] for i in range(len(ids) - n))]
            n = ends[0]
            last = max(i for i in range(len(ids) - n) if ids[i : i + n] == ids[-n:])
            follows = ids[last + n :]
            assert draft == [follows[index % len(follows)] for index in range(len(draft))]


def test_the_mtp_block_drafts_when_lookup_finds_nothing() -> None:
    drafter = Drafter()
    assert drafter.asks([1, 2, 3])
    assert drafter.propose([1, 2, 3], 8) == []
    assert drafter.propose([1, 2, 3], 8, first=9) == [9]
    assert not drafter.asks([1, 2, 3, 4, 1, 2])
    assert drafter.propose([1, 2, 3, 4, 1, 2], 1) == [3]


def test_the_mtp_block_drafts_less_often_while_it_is_wrong() -> None:
    drafter, ids, asked = Drafter(), [1], []
    for index in range(40):
        asked.append(drafter.asks(ids))
        ids.append(10 + index)
        drafter.propose(ids, 8, first=2 if asked[-1] else None)
    turns = [index for index, ask in enumerate(asked) if ask]
    assert 2 <= len(turns) <= 12 and turns[0] == 0
    assert turns[-1] - turns[-2] == PATIENCE + 1
    drafter = Drafter()
    for _ in range(20):
        assert drafter.asks(ids)
        assert drafter.propose(ids, 8, first=2) == [2]
        drafter.accepted()


def test_lookup_is_tried_again_while_the_mtp_block_is_right() -> None:
    drafter, ids = Drafter(), list(range(12)) * 4
    for _ in range(40):  # drafts fail, from either source
        drafter.propose(ids, 8)
    for _ in range(PATIENCE + 1):
        assert drafter.propose(ids, 8, first=ids[-12]) == [ids[-12]]
        drafter.accepted()
    assert len(drafter.propose(ids, 8)) >= 1


def test_a_model_without_the_block_never_drafts_with_it() -> None:
    engine = make_engine(mtp=False)
    assert not engine.scheduler.mtp
    said(engine, REPEATING, SamplingParams(temperature=0, max_tokens=20), speculate=True)
    assert engine.scheduler.mtp_drafted == 0


def test_the_packaged_models_mtp_block_drafts_new_text() -> None:
    engine = Engine.load("tiny")
    asked = {"role": "user", "content": "Read the file report.txt and submit the number in it."}
    ids = encode_ids([asked], tokenizer=engine.tokenizer, think=True)
    params = SamplingParams(temperature=0, max_tokens=30)
    outcomes, steps = [], []
    for speculate, mtp in ((False, False), (True, False), (True, True)):
        engine.scheduler.mtp = mtp
        before = engine.scheduler.steps
        outcomes.append(said(engine, ids, params, speculate=speculate))
        steps.append(engine.scheduler.steps - before)
    assert outcomes[1] == outcomes[0] and outcomes[2] == outcomes[0]
    assert steps[2] < steps[1] <= steps[0] == 30
    assert engine.scheduler.mtp_drafted > 0


SCRIPT = st.lists(
    st.tuples(
        st.sampled_from(("say", "say", "say", "feed", "shorten", "fork", "park", "drop")),
        st.integers(0, 3),
        st.integers(1, 12),
    ),
    min_size=3,
    max_size=10,
)


def played(scheduler: Scheduler, script: list[tuple[str, int, int]], params: SamplingParams) -> list[list[object]]:
    """Play the script and return every request's sampled tokens with their log-probabilities."""
    requests, told = [Request(REPEATING), Request(range(1, 40))], list[list[object]]([[], []])
    for action, index, count in script:
        request = requests[index % len(requests)]
        match action:
            case "say":  # sample this many ids from it, and from all others computed in the same forwards
                for _ in range(count):
                    while waiting := [each for each in requests if each.logits_V is None]:
                        scheduler.step(waiting)
                    for each, tokens in zip(requests, told, strict=True):
                        assert each.logits_V is not None
                        token = sample_one(each.logits_V, params, seed=4, position=len(each.ids), past=each.past)
                        tokens.append((token, each.logits_V.tolist()))
                        each.push(token.id)
            case "feed":
                request.extend([*range(count)])
            case "shorten":
                scheduler.truncate(request, max(1, len(request.ids) - count))
            case "fork" if len(requests) < 4:
                requests.append(scheduler.fork(request))
                told.append([])
            case "park":
                scheduler.park(request)
            case "drop":
                scheduler.preempt(request)
    for request in requests:
        scheduler.preempt(request)
    scheduler.cache.clear()
    return told


@pytest.fixture(scope="module")
def scheduler() -> Scheduler:
    return Scheduler(make_decoder(mtp=True), kv_cache_bytes=64 << 20)


@settings(max_examples=8, deadline=None)
@given(script=SCRIPT, temperature=st.sampled_from([0, 0.3]))
def test_any_action_between_drafts_leaves_the_bits_unchanged(
    scheduler: Scheduler, script: list[tuple[str, int, int]], temperature: float
) -> None:
    params = SamplingParams(temperature=temperature)
    outcomes = []
    for speculate in (False, True):
        scheduler.speculate = speculate
        outcomes.append(played(scheduler, script, params))
    assert outcomes[0] == outcomes[1]
    assert scheduler.pools.bytes_held == 0


def test_the_lookup_index_is_bounded_and_shared_with_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_engine.speculation.REACH", 50)
    drafter, ids = Drafter(), list[int]()
    for token_id in range(1000):
        ids += [token_id, 5, 6, 7, 8, 9][: 1 if token_id % 10 else 6]
        drafter.propose(ids, 1)
        assert all(len(after) <= 100 for after in drafter._after)
    ids += [5, 6, 7]
    fork = drafter.fork(ids)
    assert fork.propose(ids, 1) == drafter.propose(ids, 1) == [8]
    fork.propose([*ids, 8, 1, 2, 3, 4, 5, 5], 1)
    assert drafter.propose([*ids, 8], 1) == [9]


def test_drafts_leave_half_of_a_forward_to_prompts(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit_engine.runtime.scheduler.MAX_NUM_BATCHED_TOKENS", 16)
    scheduler.speculate = True
    talkers, prompt = [Request(REPEATING), Request(REPEATING)], Request(range(1, 100))
    while waiting := [talker for talker in talkers if talker.logits_V is None]:
        scheduler.step(waiting)
    drafted = scheduler.drafted
    for step in range(1, 6):
        for talker in talkers:
            while talker.logits_V is not None:
                talker.push(REPEATING[len(talker.ids) % len(REPEATING)])
        before = prompt.computed
        scheduler.step([*talkers, prompt])
        assert prompt.computed - before >= 7, step
    assert scheduler.drafted > drafted
    for request in (*talkers, prompt):
        scheduler.preempt(request)
    scheduler.cache.clear()


def test_drafts_stay_within_the_allocated_spans(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds at the last id of a span too, and for drafts of the MTP block, which is always asked here."""
    monkeypatch.setattr(Drafter, "asks", lambda drafter, ids: True)
    scheduler.speculate, step = True, scheduler.runner.step
    ends = []

    def watched(scheduled: Sequence[ScheduledTokens], *, all_rows: bool = False) -> Computed:
        for part in scheduled:
            ends.append(part.sequence.length + len(part))
            assert ends[-1] <= part.sequence.num_spans * SPAN
        return step(scheduled, all_rows=all_rows)

    monkeypatch.setattr(scheduler.runner, "step", watched)
    for length in range(SPAN - 12, SPAN - 4):
        request = Request(some_ids(length, 3))
        while request.length < SPAN + 4:
            while request.logits_V is None:
                scheduler.step([request])
            request.push(int(request.logits_V.argmax()))
        scheduler.preempt(request)
    scheduler.cache.clear()
    assert max(ends) > SPAN


def test_only_the_ids_up_to_the_first_wrong_one_count_as_tried() -> None:
    """Three right ids in a draft of seven are three of four tried, after three of three; so the next draft has four."""
    drafter, ids, lengths = Drafter(), list(range(20)) * 2, []
    for new in range(3):
        draft = drafter.propose(ids, LONGEST)
        lengths.append(len(draft))
        for _ in draft[:3]:
            drafter.accepted()
        ids += [*draft[:3], 1000 + new, *range(20)]
    assert lengths == [3, 7, 4]
