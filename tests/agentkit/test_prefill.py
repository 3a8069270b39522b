"""Results are computed in call order while other calls of the turn still run, with the bits of all at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agentkit import (
    Agent,
    AssistantTurn,
    EmbeddedModel,
    Message,
    SystemMessage,
    ToolMessage,
    Trajectory,
    UserMessage,
    tool,
)
from agentkit.benchmarks.steered import SteeredModel
from agentkit.model import GenerationLimits
from agentkit.models.scripted import ScriptedTokens
from agentkit.models.tokens import TokenizedSession, rebuild_token_ids
from agentkit_engine import AsyncEngine
from agentkit_engine.chat import Tokenizer

from .conftest import get_weather

pytestmark = pytest.mark.anyio

TEXTS = [f"The {name} is in stock. " * 60 for name in ("bolt", "nut", "screw", "nail")]


@pytest.fixture
async def running(tiny: EmbeddedModel) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny.engine) as running:
        yield running


def fetching(messages: Sequence[Message], think: bool) -> AssistantTurn:
    """Fetch all texts in one turn, then answer."""
    if isinstance(messages[-1], ToolMessage):
        return AssistantTurn(content="All four are in stock.")
    return AssistantTurn(calls=[("fetch", {"number": number}) for number in range(len(TEXTS))])


async def run(running: AsyncEngine, order: Sequence[int]) -> Trajectory:
    """Run a turn whose calls finish in this order. Each waits until the engine has computed what is there in order."""
    finished = [anyio.Event() for _ in TEXTS]
    scheduler = running.engine.scheduler
    start = 0

    @tool
    async def fetch(number: int) -> str:
        """Fetch a text."""
        nonlocal start
        place = order.index(number)
        if place == 0:
            start = scheduler.prefilled
        else:
            await finished[order[place - 1]].wait()
        if place == len(order) - 1 and number > 0:
            while scheduler.prefilled < start + 100 * number:
                await checkpoint()
        finished[number].set()
        return TEXTS[number]

    agent = Agent(SteeredModel(running, fetching), [fetch], effort="none")
    return (await agent.run("What is in stock?")).trajectory


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3), (1, 0, 3, 2), (3, 2, 1, 0)])
async def test_results_are_computed_while_siblings_run_with_the_same_bits(
    running: AsyncEngine, order: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last call waits for the state of the results before it; without prefill, it would wait forever."""
    record = await run(running, order)
    with monkeypatch.context() as patch:

        async def nothing(self: TokenizedSession, messages: Sequence[Message]) -> None:
            pass

        patch.setattr(TokenizedSession, "prefill", nothing)
        at_once = await run(running, (3, 2, 1, 0))
    assert [message.content for message in record.messages if isinstance(message, ToolMessage)] == TEXTS
    assert (record.token_ids, record.logprobs) == (at_once.token_ids, at_once.logprobs)
    assert rebuild_token_ids(record, running.engine.tokenizer) == record.token_ids


async def test_a_run_that_is_cancelled_during_a_prefill_can_be_resumed(running: AsyncEngine, tmp_path: Path) -> None:
    scheduler, start = running.engine.scheduler, 0

    @tool
    async def fetch(number: int) -> str:
        """Fetch a text; the last call cancels the run."""
        nonlocal start
        start = start or scheduler.prefilled
        if number == len(TEXTS) - 1:
            while scheduler.prefilled == start:
                await checkpoint()
            scope.cancel()
            await checkpoint()
        return TEXTS[number]

    agent = Agent(SteeredModel(running, fetching), [fetch], effort="none")
    with anyio.CancelScope() as scope:
        await agent.run("What is in stock?", trajectory=tmp_path / "run.jsonl")
    assert scope.cancelled_caught
    result = await agent.resume(tmp_path / "run.jsonl")
    assert result.answer == "All four are in stock."
    assert rebuild_token_ids(result.trajectory, running.engine.tokenizer) == result.trajectory.token_ids


class Tokens(ScriptedTokens):
    """A script that notes how many ids it had when it was asked to compute them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(lambda messages, think: AssistantTurn(content="Yes."), tokenizer)
        self.computed: list[int] = []

    async def prefill(self) -> None:
        self.computed.append(len(self.token_ids))


async def one_turn(session: TokenizedSession) -> None:
    async for _ in session.generate(think=False, limits=GenerationLimits()):
        pass


async def session_of(tokenizer: Tokenizer, tokens: Tokens) -> TokenizedSession:
    session = TokenizedSession(tokens, tokenizer, tools=[get_weather], effort="none", dialect="v4-preview")
    tokens.messages = session.messages
    await session.append([SystemMessage("S"), UserMessage("Q")])
    await one_turn(session)
    return session


@pytest.mark.parametrize("later", [TEXTS[0], TEXTS[0] + "!", TEXTS[1], ""])
async def test_the_ids_are_right_whatever_follows(tokenizer: Tokenizer, later: str) -> None:
    """Even if the prompt does not begin with the messages that were announced."""
    tokens = Tokens(tokenizer)
    session = await session_of(tokenizer, tokens)
    await session.prefill([ToolMessage("a", "t", TEXTS[0])])
    assert len(tokens.computed) == 1
    await session.append([ToolMessage("a", "t", later), ToolMessage("b", "t", "last")])
    await one_turn(session)
    assert tokens.token_ids == [token for segment in session.segments for token in segment.ids]
    assert session.usage.prompt_tokens == sum(len(each.ids) for each in session.segments if each.kind == "prompt")


async def test_only_results_that_are_worth_it_are_computed(tokenizer: Tokenizer) -> None:
    """Each prefill encodes all results again, so the number of prefills grows with the logarithm of their length."""
    tokens = Tokens(tokenizer)
    session = await session_of(tokenizer, tokens)
    await session.prefill([ToolMessage("a", "t", "short")])
    assert tokens.computed == []
    for count in range(1, 129):
        await session.prefill([ToolMessage(str(number), "t", "x" * 500) for number in range(count)])
    assert 10 < len(tokens.computed) < 25 and tokens.computed == sorted(set(tokens.computed))


async def test_results_that_do_not_fit_are_not_computed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(tokenizer)
    session = await session_of(tokenizer, tokens)
    monkeypatch.setattr(ScriptedTokens, "max_length", len(tokens.token_ids) + 1000)
    await session.prefill([ToolMessage("a", "t", TEXTS[0])])
    assert tokens.computed == []
