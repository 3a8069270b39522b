"""A run without text has no answer, and a call that is only quoted does not run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentkit import Agent, AssistantMessage, AssistantTurn, CallStarted, Limits, ScriptedModel, Trajectory, tool
from agentkit.model import CallsWithdrawn
from agentkit.models.scripted import ScriptedToken, ScriptedTokens
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine.chat import Tokenizer
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import Environment

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
D = "｜DSML｜"
PAY = f'<{D}invoke name="pay">\n<{D}parameter name="amount" string="false">500</{D}parameter>\n</{D}invoke>\n'
BLOCK = f"\n\n<{D}tool_calls>\n{PAY}</{D}tool_calls>"


def spent(read_only: bool) -> tuple[list[int], Any]:
    amounts: list[int] = []

    @tool(read_only=read_only)
    def pay(amount: int) -> str:
        """Pay."""
        amounts.append(amount)
        return "paid"

    return amounts, pay


@pytest.mark.parametrize("text", ["", " ", "\n\n\t"])
@pytest.mark.parametrize("schema", [None, {"type": "object"}])
async def test_an_empty_text_is_not_an_answer(script: Script, environment: Environment, text: str, schema: Any) -> None:
    for turn in (AssistantTurn("I think.", text), AssistantTurn(None, text)):
        result = await Agent(script(turn), [], output_schema=schema).run("Q", environment=environment)
        assert (result.status, result.answer, result.limit) == ("no_answer", None, None)
        assert result.error is not None and "no text" in result.error
        again = await result.continue_("Well?")
        assert (again.status, again.answer) == ("no_answer", None)


@pytest.mark.parametrize("thought", ["", "I think", "I think.\n\n", f"I {D}", "<think>"])
async def test_a_turn_that_ends_while_thinking_has_no_answer(
    script: Script, environment: Environment, tokenizer: Tokenizer, tmp_path: Path, thought: str
) -> None:
    path = tmp_path / "t.jsonl"
    ids = [*tokenizer.encode(thought), tokenizer.eos_id]
    agent = Agent(script(ids, AssistantTurn("Hm.", "Four.")), thinking="always")
    result = await agent.run("Q", environment=environment, trajectory=path)
    assert (result.status, result.answer) == ("no_answer", None)
    outcome = Trajectory.load(path).outcome
    assert outcome is not None and outcome.status == "no_answer" == result.outcome.status
    result = await result.continue_("And?")
    assert (result.status, result.answer) == ("answered", "Four.")
    assert rebuild_token_ids(result.trajectory, tokenizer) == result.trajectory.token_ids


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (f"I could write{BLOCK} but must not.</think>No.", "No."),
        (f"I could write{BLOCK}</think>No.", "No."),
        (f"{BLOCK}</think>No.", "No."),
        (f"</think>A call is{BLOCK}\nas you see.", f"A call is{BLOCK}\nas you see."),
        (f"</think>A call is{PAY}", None),
    ],
)
async def test_a_quoted_call_does_not_run(
    script: Script, environment: Environment, tokenizer: Tokenizer, read_only: bool, said: str, answer: str | None
) -> None:
    amounts, pay = spent(read_only)
    ids = [*tokenizer.encode(said), tokenizer.eos_id]
    result = await Agent(script(ids, AssistantTurn(None, "Done.")), [pay]).run("Q", environment=environment)
    if answer is None:  # the turn ends right after the block, so it is a call
        assert (amounts, result.answer) == ([500], "Done.")
    else:
        assert (amounts, result.status, result.answer) == ([], "answered", answer)
        assert not any(isinstance(record, CallStarted) for record in result.trajectory.records)
    assert rebuild_token_ids(result.trajectory, tokenizer) == result.trajectory.token_ids


async def test_a_call_block_without_tools_is_text(
    script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    ids = [*tokenizer.encode(f"</think>Like so:{BLOCK}"), tokenizer.eos_id]
    result = await Agent(script(ids), []).run("Q", environment=environment)
    assert (result.status, result.answer) == ("answered", f"Like so:{BLOCK}")


async def test_calls_at_the_start_of_an_answer_are_withdrawn_when_text_follows(
    script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    """The read-only call has started by then and is stopped; the other call never starts."""
    amounts, pay = spent(read_only=False)
    started, stopped = [], []

    @tool(read_only=True)
    async def look() -> str:
        """Look."""
        started.append(True)
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(True)
        return ""

    calls = f'<{D}tool_calls>\n<{D}invoke name="look">\n\n</{D}invoke>\n{PAY}</{D}tool_calls>'
    ids = [*tokenizer.encode(f"</think>{calls}, I would say."), tokenizer.eos_id]
    with anyio.fail_after(30):
        result = await Agent(script(ids), [look, pay]).run("Q", environment=environment)
    assert (result.status, result.answer, amounts) == ("answered", f"{calls}, I would say.", [])
    assert len(started) == len(stopped)
    assert CallsWithdrawn(0) in result.trajectory.records
    [said] = [message for message in result.trajectory.messages if isinstance(message, AssistantMessage)]
    assert (said.calls, result.usage.calls, result.trajectory.results) == ((), 0, [])
    assert rebuild_token_ids(result.trajectory, tokenizer) == result.trajectory.token_ids


async def test_a_misspelt_block_tag_gives_one_result(
    script: Script, environment: Environment, tokenizer: Tokenizer
) -> None:
    amounts, pay = spent(read_only=False)
    ids = [*tokenizer.encode(f"</think><{D}function_calls>\n{PAY}</{D}function_calls>"), tokenizer.eos_id]
    result = await Agent(script(ids, AssistantTurn(None, "Done.")), [pay]).run("Q", environment=environment)
    assert (amounts, [each.content for each in result.trajectory.results]) == ([500], ["paid"])
    said = next(message for message in result.trajectory.messages if isinstance(message, AssistantMessage))
    assert said.content == ""


@pytest.mark.parametrize("read_only", [True, False])
async def test_a_limit_right_after_a_call_block_runs_no_calls(
    script: Script, environment: Environment, tokenizer: Tokenizer, read_only: bool
) -> None:
    amounts, pay = spent(read_only)
    ids = tokenizer.encode(f"I pay.{BLOCK}")
    agent = Agent(script([*ids, tokenizer.eos_id]), [pay], limits=Limits(max_tokens=len(ids)))
    result = await agent.run("Q", environment=environment)
    assert (result.limit, amounts, result.trajectory.results) == ("max_tokens", [], [])


async def test_a_turn_that_breaks_off_records_no_call_without_a_result(
    script: Script, environment: Environment, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block after text is ready only at the end of its turn, and nobody hears of that when the turn breaks off."""
    generate = ScriptedTokens.generate

    async def breaking(self: ScriptedTokens, *, max_tokens: int | None) -> AsyncGenerator[ScriptedToken, None]:
        async with aclosing(generate(self, max_tokens=max_tokens)) as tokens:
            async for token in tokens:
                if token.id == tokenizer.eos_id:
                    raise RuntimeError("the engine failed")
                yield token

    monkeypatch.setattr(ScriptedTokens, "generate", breaking)
    turn = AssistantTurn(None, "Let me look first.", [("list_dir", {})])
    agent = Agent(script(turn), thinking="never", sampling=SamplingParams(grammar=False))
    with pytest.raises(RuntimeError, match="the engine failed"):
        await agent.run("Q", environment=environment, trajectory=tmp_path / "t.jsonl")
    said = Trajectory.load(tmp_path / "t.jsonl").messages[-1]
    assert isinstance(said, AssistantMessage) and said.content.startswith("Let me look first.")
    assert said.calls == ()
