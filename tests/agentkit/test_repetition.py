"""Runaway turns: a turn that only repeats itself is stopped, and similar-looking turns are not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit import Agent, AssistantTurn, LimitReached, Limits, Message, ScriptedModel
from agentkit.models.tokens import rebuild_token_ids
from agentkit.repetition import CHECK_EVERY, MAX_PERIOD, is_due, repeats
from agentkit_engine.chat import Tokenizer
from agentkit_environments import Environment

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
D = "｜DSML｜"
BOUND = Limits().max_repeated_tokens or 0


def endless(text: Iterator[str], tokenizer: Tokenizer, start: str, size: int = 20_000) -> list[int]:
    """Return the ids of a turn that starts with `start` and continues with `text`, far beyond any limit."""
    ids = tokenizer.encode(start)
    while len(ids) < size:
        ids += tokenizer.encode_text(next(text))
    return ids


def forever(text: str) -> Iterator[str]:
    while True:
        yield text


def digits() -> Iterator[str]:
    numbers = random.Random(1)
    while True:
        yield str(numbers.randrange(10**9))


def blanks() -> Iterator[str]:
    numbers = random.Random(1)
    while True:
        yield numbers.choice((" ", "\n", "  ", "\t"))


RUNAWAYS: dict[str, Callable[[], Iterator[str]]] = {
    "one token": lambda: forever("a"),
    "a sentence": lambda: forever("I should check that again. "),
    "a paragraph": lambda: forever("I should check that again, and then once more.\n\n" * 4),
    "digits": digits,
    "white space": blanks,
}


@pytest.mark.parametrize("name", RUNAWAYS)
@pytest.mark.parametrize("start", ["", "Well: ", "</think>", "</think>Here it is: "])
async def test_a_turn_that_only_repeats_is_stopped(
    script: Script, environment: Environment, tokenizer: Tokenizer, name: str, start: str
) -> None:
    ids = endless(RUNAWAYS[name](), tokenizer, start)
    result = await Agent(script(ids)).run("Q", environment=environment)
    assert (result.status, result.limit, result.answer) == ("limit", "repetition", None)
    assert LimitReached("repetition") in result.trajectory.records
    assert BOUND <= result.usage.sampled_tokens <= BOUND + 2 * CHECK_EVERY
    assert rebuild_token_ids(result.trajectory, tokenizer) == result.trajectory.token_ids
    assert result.trajectory.segments[-1].kind == "forced"


@pytest.mark.parametrize("name", RUNAWAYS)
async def test_the_limit_is_four_times_as_high_inside_a_call(
    script: Script, environment: Environment, tokenizer: Tokenizer, name: str
) -> None:
    start = f'</think><{D}tool_calls>\n<{D}invoke name="submit">\n<{D}parameter name="answer" string="true">'
    result = await Agent(script(endless(RUNAWAYS[name](), tokenizer, start))).run("Q", environment=environment)
    assert (result.limit, result.trajectory.results[0].is_error) == ("repetition", True)
    assert 4 * BOUND <= result.usage.sampled_tokens <= 4 * BOUND + 4 * CHECK_EVERY


async def test_repetition_detection_can_be_switched_off(
    script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    model = script(endless(forever("a"), tokenizer, ""))
    limits = Limits(max_repeated_tokens=None, max_tokens_per_turn=3 * BOUND)
    result = await Agent(model, limits=limits).run("Q", environment=environment)
    assert (result.limit, result.usage.sampled_tokens) == ("max_tokens_per_turn", 3 * BOUND)
    result = await Agent(model, limits=Limits(max_repeated_tokens=100)).run("Q", environment=environment)
    assert (result.limit, result.usage.sampled_tokens) == ("repetition", 128)


HONEST = {
    "a ruler": "-" * 1500 + "\n",
    "indentation": " " * 1500 + "x",
    "a table": "".join(f"| {row} | ok | 0.0 |\n" for row in range(1200)),
    "a log": "".join(f"12:00:{second:02} INFO ok\n" for second in range(60)) * 30,
    "a counter": " ".join(map(str, range(4000))),
    "zeros in a matrix": "\n".join(" ".join("0" if i != j else "1" for j in range(60)) for i in range(60)),
    "hex": "\n".join(f"{line:08x}  00 00 00 00 00 00 00 00" for line in range(300)),
}


@pytest.mark.parametrize("text", HONEST.values(), ids=HONEST.keys())
async def test_similar_but_varying_text_is_not_stopped(script: Script, environment: Environment, text: str) -> None:
    result = await Agent(script(AssistantTurn(text[:20], text))).run("Q", environment=environment)
    assert (result.status, result.answer) == ("answered", text)


FILES = {"one line, often": "INFO ok\n" * 1000, "base64 of zeros": "A" * 8000, "a blank line, often": "\n" * 8000}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
async def test_a_file_can_repeat(script: Script, environment: Environment, text: str) -> None:
    write = AssistantTurn(None, "", [("write_file", {"path": "f", "content": text})])
    result = await Agent(script(write, AssistantTurn(None, "Done."))).run("Q", environment=environment)
    assert result.status == "answered"
    assert await environment.read_file("f") == text.encode()


async def test_128_identical_calls_are_not_a_runaway(script: Script, environment: Environment) -> None:
    turn = AssistantTurn(None, "", [("list_dir", {})] * 128)
    result = await Agent(script(turn, AssistantTurn(None, "Done."))).run("Q", environment=environment)
    assert (result.status, result.usage.calls) == ("answered", 128)


async def test_identical_turns_are_not_a_runaway(script: Script, environment: Environment) -> None:
    """Identical turns do not count as a turn that repeats itself."""

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        return AssistantTurn(None, "a" * 1500, [("list_dir", {})])

    result = await Agent(ScriptedModel(policy), limits=Limits(max_turns=4)).run("Q", environment=environment)
    assert result.limit == "max_turns"


def letters(token_id: int) -> bytes:
    return b"a"


@given(block=st.lists(st.integers(0, 3), min_size=1, max_size=40), before=st.lists(st.integers(0, 3), max_size=50))
def test_copies_of_a_block_repeat(block: list[int], before: list[int]) -> None:
    ids = [*before, *(block * 200)[: 2 * len(block) + 64]]
    assert repeats(ids, 2 * len(block) + 64, letters)


@given(ids=st.lists(st.integers(0, 1), min_size=8, max_size=200), count=st.integers(8, 100))
def test_repeats_matches_its_definition(ids: list[int], count: int) -> None:
    tail = ids[-count:]
    periods = range(1, min(MAX_PERIOD, count // 2) + 1)
    periodic = (
        any(all(tail[i] == tail[i - p] for i in range(p, count)) for p in periods) if len(ids) >= count else False
    )
    assert repeats(ids, count, letters) == periodic


def test_a_check_is_due_often_enough() -> None:
    for bound in (1, 10, 63, 64, 65, 2048):
        due = [length for length in range(1, 3 * bound + 200) if is_due(length, bound)]
        assert due[0] >= bound and all(b - a <= CHECK_EVERY for a, b in pairwise(due))
        assert due[0] < bound + CHECK_EVERY
