"""Every family: its oracle solves each task, trivial answers fail, and the splits do not overlap."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from agentkit.messages import AssistantMessage
from agentkit_environments import open_environment
from agentkit_evals.selfcheck import selfcheck
from agentkit_evals.synth import FAMILIES, SPLITS, SynthTask, is_held_out, sample
from agentkit_evals.synth.generate import require_solved, transcript
from agentkit_evals.synth.rows import FAR_TOKENS
from agentkit_evals.verify import verify

every_family = pytest.mark.parametrize("family", FAMILIES)
NEED_TOOLS = [name for name, family in FAMILIES.items() if family.needs_tool]


def both_splits(family: str, count: int) -> list[SynthTask]:
    return [sample(family, seed, split) for split in SPLITS for seed in range(count // 2)]


async def run_oracle(synth: SynthTask) -> tuple[list[AssistantMessage], str, bytes]:
    async with await open_environment(synth.task.environment.spec(), backend="unsafe-local") as environment:
        await synth.task.prepare(environment)
        messages, answer = await transcript(synth, environment)
        archive = (await environment.export_dir(environment.spec.workdir)).data
    return [message for message in messages if isinstance(message, AssistantMessage)], answer, archive


@every_family
@pytest.mark.anyio
async def test_the_oracle_solves_every_task(family: str) -> None:
    for synth in both_splits(family, 20):
        turns, answer, archive = await run_oracle(synth)
        await require_solved(synth, archive, answer)
        assert bool(turns[0].calls) == FAMILIES[family].needs_tool
        assert turns[0].reasoning
        assert all("\ue000" not in str(turn) and "\ue001" not in str(turn) for turn in turns)


@pytest.mark.parametrize("family", NEED_TOOLS)
@pytest.mark.anyio
async def test_doing_nothing_and_constant_answers_score_zero(family: str) -> None:
    for synth in both_splits(family, 6):
        async with await open_environment(synth.task.environment.spec(), backend="unsafe-local") as environment:
            await synth.task.prepare(environment)
            archive = (await environment.export_dir(environment.spec.workdir)).data
        for answer in (None, "done", "7", "The answer is 42.", synth.task.instruction):
            verdict = await verify(synth.task, archive=archive, answer=answer, backend="unsafe-local")
            assert verdict.reward == 0, f"{synth.task.id}: {answer!r} scores {verdict.reward}"


@every_family
@pytest.mark.anyio
async def test_tasks_pass_their_self_check(family: str) -> None:
    for synth in both_splits(family, 4):
        assert (await selfcheck(synth.task, backend="unsafe-local")).problems == []


@every_family
def test_no_masked_task_is_in_both_splits(family: str) -> None:
    drawn = {split: [FAMILIES[family].draw(seed, split) for seed in range(2000)] for split in SPLITS}
    signatures = {split: {each.signature for each in drawn[split]} for split in SPLITS}
    assert not signatures["train"] & signatures["heldout"]
    assert not any(is_held_out(signature) for signature in signatures["train"])
    phrasings = {split: Counter(each.phrasing for each in drawn[split]) for split in SPLITS}
    held_out = {index for index, phrasing in enumerate(FAMILIES[family].phrasings) if phrasing.held_out}
    assert set(phrasings["train"]) == set(range(len(FAMILIES[family].phrasings))) - held_out
    assert held_out < set(phrasings["heldout"])
    share = sum(phrasings["heldout"][index] for index in held_out) / 2000
    assert share == pytest.approx(len(held_out) / len(FAMILIES[family].phrasings), abs=0.04)


@every_family
def test_greetings_are_not_part_of_the_signature(family: str) -> None:
    drawn = [FAMILIES[family].draw(seed, "heldout") for seed in range(200)]
    greeted = [each for each in drawn if each.instruction.startswith("Good day. ") or each.instruction.endswith(" Go.")]
    assert greeted
    assert not [each for each in greeted if each.signature.startswith("Good day. ") or " Go." in each.signature]


@every_family
def test_signatures_contain_no_names_and_no_numbers(family: str) -> None:
    for seed in range(50):
        synth = sample(family, seed, "train")
        assert not re.search("[1-9]|\ue000|\ue001", synth.signature)
        words = set(re.findall(r"\w+", synth.signature))
        assert not words & {name for name in synth.names if re.fullmatch("([bdfgklmnprtv][aeiou]){3,}", name)}


@every_family
def test_at_least_a_fifth_of_ten_or_more_phrasings_is_held_out(family: str) -> None:
    phrasings = FAMILIES[family].phrasings
    assert len(phrasings) >= 10
    assert len({phrasing.text for phrasing in phrasings}) == len(phrasings)
    assert sum(phrasing.held_out for phrasing in phrasings) >= len(phrasings) / 5


@every_family
def test_a_seed_always_gives_the_same_task(family: str) -> None:
    for split in SPLITS:
        assert sample(family, 3, split).task == sample(family, 3, split).task
        assert len({sample(family, seed, split).task.instruction for seed in range(20)}) > 10


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown family 'combin'; expected one of combine, "):
        sample("combin", 0, "train")
    with pytest.raises(ValueError, match="unknown split 'test'; expected one of train, heldout"):
        sample("combine", 0, "test")  # type: ignore[arg-type]


def test_there_are_enough_families_and_two_need_a_far_fact() -> None:
    assert len(FAMILIES) >= 9
    assert sum(family.far_fact for family in FAMILIES.values()) >= 2
    assert FAR_TOKENS >= 512
