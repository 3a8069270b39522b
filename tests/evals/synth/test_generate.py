"""Training rows: ids of real runs, masks of the assistant's ids, and the distance of far facts."""

from __future__ import annotations

import itertools

import pytest

from agentkit.task import VerifierConfig
from agentkit_engine.chat import Tokenizer
from agentkit_environments import open_environment
from agentkit_evals.synth import FAMILIES, sample
from agentkit_evals.synth.generate import OracleError, generate, require_solved
from agentkit_evals.synth.rows import FAR_TOKENS

pytestmark = pytest.mark.anyio
FAR = [name for name, family in FAMILIES.items() if family.far_fact]


async def test_rows_come_in_order_and_the_mask_covers_the_assistants_ids(tokenizer: Tokenizer) -> None:
    families = list(FAMILIES)
    rows = [row async for row in generate(families, (4, 8, 9), tokenizer=tokenizer, verify_every=1)]
    assert [(row.seed, row.family) for row in rows] == [(seed, family) for seed in (4, 8, 9) for family in families]
    for row in rows:
        text = tokenizer.decode(row.ids)
        written = tokenizer.decode([token for token, mine in zip(row.ids, row.loss_mask, strict=True) if mine])
        assert sample(row.family, row.seed, "train").task.instruction in text
        assert text.endswith("<｜end▁of▁sentence｜>") and written.endswith("<｜end▁of▁sentence｜>")
        assert "<｜User｜>" not in written and "<tool_result>" not in written and "<｜Assistant｜>" not in written
        turns = text.count("<｜Assistant｜>")
        thinking = text.count("<｜Assistant｜><think>")
        assert thinking == {4: thinking, 8: turns, 9: 0}[row.seed]  # auto, always, never
        assert row.seed != 4 or thinking >= 1


async def test_a_seed_gives_the_same_row_again(tokenizer: Tokenizer) -> None:
    once = [row async for row in generate(["combine", "user_tool"], (1, 2), tokenizer=tokenizer)]
    assert once == [row async for row in generate(["combine", "user_tool"], (1, 2), tokenizer=tokenizer)]


@pytest.mark.parametrize("family", FAR)
async def test_far_facts_are_more_than_512_tokens_back(family: str, tokenizer: Tokenizer) -> None:
    async for row in generate([family], range(20, 40), tokenizer=tokenizer):
        verifier = sample(family, row.seed, "train").task.verifier
        assert isinstance(verifier, VerifierConfig)
        fact = verifier.command.split()[-1].split("-")[0]  # ledger: `... = FACT-total`; archive, poll: `... = FACT`
        pieces = [tokenizer.decode([token]) for token in row.ids]
        starts = list(itertools.accumulate((len(piece) for piece in pieces), initial=0))
        text = "".join(pieces)
        used = text.rindex(f">{fact}") + 1  # a parameter value starts with the fact
        told = text.rindex(f"\n{fact}\n", 0, used) + 1 if FAMILIES[family].spread_fact else text.rindex(fact, 0, used)
        assert starts.index(used) - starts.index(told) > FAR_TOKENS


async def test_a_wrong_answer_of_an_oracle_is_an_error(tokenizer: Tokenizer) -> None:
    synth = sample("combine", 0, "train")
    async with await open_environment(backend="unsafe-local") as environment:
        archive = (await environment.export_dir(environment.spec.workdir)).data
    with pytest.raises(OracleError, match=r"combine-train-0: answered 'wrong', which scores 0, expected 1"):
        await require_solved(synth, archive, "wrong")


async def test_names_are_tokenized_into_syllables_everywhere(tokenizer: Tokenizer) -> None:
    for text in ("kalo", " kalo", "`kalo`", ">kalo<", '"kalo"', "kalo.txt", "(kalo)", "\nkalo\n", "box/kalo", "=kalo"):
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode_text(text)]
        assert "ka,lo" in ",".join(pieces), pieces
