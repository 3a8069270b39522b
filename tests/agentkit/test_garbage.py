"""A run survives any ids that a model samples, and its record stays exact."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit import Agent, Limits, Message, ScriptedModel, ToolMessage
from agentkit.models.tokens import rebuild_token_ids
from agentkit_engine.chat import Tokenizer
from agentkit_environments import open_environment

PIECES = [
    "\n\n<｜DSML｜tool_calls>\n",
    '<｜DSML｜invoke name="list_dir">\n',
    '<｜DSML｜invoke name="',
    "</｜DSML｜invoke>\n",
    '<｜DSML｜parameter name="path" string="true">',
    "</｜DSML｜parameter>\n",
    "</｜DSML｜tool_calls>",
    "｜DSML｜",
    "<think>",
    "</think>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "text",
    "\n",
    "<",
    "é",
]
garbage = st.lists(st.sampled_from(PIECES), max_size=14)


@settings(deadline=None, max_examples=60)
@given(turns=st.lists(garbage, min_size=1, max_size=3), thinking=st.sampled_from(["always", "never", "auto"]))
def test_any_ids(tokenizer: Tokenizer, turns: list[list[str]], thinking: str) -> None:
    said = 0

    def policy(messages: Sequence[Message], think: bool) -> list[int]:
        nonlocal said
        ids = [token for piece in turns[said % len(turns)] for token in tokenizer.encode(piece)]
        said += 1
        eos = tokenizer.eos_id
        return ids[: ids.index(eos) + 1] if eos in ids else ids

    async def run() -> None:
        async with await open_environment(backend="unsafe-local") as environment:
            agent = Agent(ScriptedModel(policy, tokenizer), limits=Limits(max_turns=4), thinking=thinking)  # type: ignore[arg-type]
            result = await agent.run("Q", environment=environment)
        assert rebuild_token_ids(result.trajectory, tokenizer) == result.trajectory.token_ids
        results = [message for message in result.trajectory.messages if isinstance(message, ToolMessage)]
        assert len({message.call_id for message in results}) == len(results) == result.usage.calls

    anyio.run(run)
