"""Any records with valid checksums are a trajectory that every reader reads, or an error of a documented type."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from hypothesis import strategies as st
from tests.fuzz import amounts, fuzz, near

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    EmbeddedModel,
    Limits,
    Message,
    ReplayError,
    ResumeError,
    ScriptedModel,
    Trajectory,
    TrajectoryError,
    UserMessage,
    replay,
    tool,
)
from agentkit.atif import atif_bytes, parse_atif
from agentkit.cli.resume import RunSettings
from agentkit.history import opening_messages
from agentkit.interrupted import fork_point, interrupted_run
from agentkit.messages import to_openai_all
from agentkit_environments import open_environment

Records = list[dict[str, Any]]
TURNS = [
    AssistantTurn("Look.", "I look.", [("price", {"article": "nut"}), ("price", {"town": 1})]),
    AssistantTurn("", "", [("buy", {"article": "x"}), ("nope", {})]),
    AssistantTurn(None, "Done."),
]
COMPACTED = {
    "type": "compacted",
    "messages": [{"role": "user", "content": "x"}],
    "turns": 1,
    "cleared": ["call_0_0"],
    "turns_left_out": 0,
    "tokens_before": 3,
    "tokens_after": 1,
}
SUBAGENT = {"type": "subagent_started", "call_id": "call_0_0", "name": "x", "trajectory_id": "t", "file": "any.jsonl"}


MOVES = st.lists(
    st.tuples(st.sampled_from(["leave out", "repeat", "move"]), st.integers(0, 60), st.integers(0, 60)), max_size=6
)


@tool(read_only=True)
def price(article: str) -> int:
    """Return the price of an article."""
    return len(article)


@tool
def buy(article: str) -> str:
    """Buy an article."""
    return f"bought {article}"


@pytest.fixture(scope="module")
def tiny() -> EmbeddedModel:
    torch.set_num_threads(1)
    return EmbeddedModel("tiny")


@pytest.fixture(scope="module")
def agent(tiny: EmbeddedModel) -> Agent:
    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        return TURNS[min(sum(isinstance(message, AssistantMessage) for message in messages), 2)]

    model = ScriptedModel(policy, tiny.tokenizer, name="tiny", dialect=tiny.engine.dialect)
    return Agent(model, [price, buy], thinking="auto", limits=Limits(max_turns=4))


@pytest.fixture(scope="module")
def documents(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> list[Records]:
    """A whole record, two that were cut off, and one with a compaction and a sub-agent that is the run itself."""
    path = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    settings = {"task": {"id": "a", "instruction": "x"}, "load": {"model": "tiny"}}
    agent.run_sync("Buy.", trajectory=path, metadata={"run": settings})
    whole = [json.loads(line)["record"] for line in path.read_bytes().splitlines()]
    second = next(place for place, record in enumerate(whole) if record.get("turn") == 1)
    return [whole, whole[:-1], whole[:-5], [*whole[:second], COMPACTED, SUBAGENT, *whole[second:]]]


def rearranged(records: Records, moves: list[tuple[str, int, int]]) -> Records:
    """Return the records with some left out, repeated or moved; each of them is valid, and the header is first."""
    records = list(records)
    for change, start, end in moves:
        if len(records) > 1:
            place = 1 + start % (len(records) - 1)
            record = records[place] if change == "repeat" else records.pop(place)
            if change != "leave out":
                records.insert(1 + end % len(records), record)
    return records


def file_of(records: Records) -> bytes:
    bodies = (
        b'{"seq":%d,"time_s":%d.5,"record":%b' % (n, n, json.dumps(each).encode()) for n, each in enumerate(records)
    )
    return b"".join(body + b',"crc32":"%08x"}\n' % zlib.crc32(body) for body in bodies)


@amounts(40, 2_000)
def test_any_records_are_read_exported_resumed_and_replayed_or_refused(
    examples: int, agent: Agent, tiny: EmbeddedModel, documents: list[Records], tmp_path: Path
) -> None:
    path = tmp_path / "any.jsonl"
    done = Counter[str]()

    async def resume() -> None:
        async with await open_environment(backend="unsafe-local") as environment:
            await agent.resume(path, environment=environment)

    def attempt(name: str, read: Callable[[], object], error: type[Exception] = TrajectoryError) -> None:
        try:
            read()
        except error as exc:
            assert len(str(exc)) < 2000
        else:
            done[name] += 1

    def check(records: Records) -> None:
        path.write_bytes(file_of(records))
        path.with_suffix(".jsonl.torn").unlink(missing_ok=True)
        try:
            record = Trajectory.load(path)
        except TrajectoryError as exc:
            assert str(path) in str(exc) and len(str(exc)) < 2000
            return
        assert len(record.token_ids) == len(record.loss_mask) == len(record.logprobs)
        assert len(to_openai_all(record.messages)) == len(record.messages)
        assert record.outcome is None or record.usage.total is not None
        assert fork_point(record).length == len(record.records)
        attempt("export", lambda: parse_atif(atif_bytes(record)))
        attempt(
            "history", lambda: opening_messages(record, UserMessage("x"), system="", output_schema=None), ValueError
        )
        attempt("interrupted", lambda: interrupted_run(record, agent.tools, world_turns=0), ResumeError)
        attempt("settings", lambda: RunSettings.of(record), ResumeError)
        attempt("replay", lambda: replay(record, tiny), ReplayError)
        attempt("resume", lambda: anyio.run(resume))

    for records in documents:
        check(records)
    assert done.keys() == {"export", "history", "interrupted", "settings", "replay", "resume"}
    some = st.sampled_from(documents)
    fuzz(check, some.flatmap(lambda each: near(each, 2)).filter(is_list) | st.builds(rearranged, some, MOVES), examples)


def is_list(value: Any) -> bool:
    return isinstance(value, list)
