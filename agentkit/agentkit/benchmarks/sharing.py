"""The benchmark shared-prefill: tokens prefilled per unique token, in trajectories with a common prefix.

Runs go through `Agent.run` and the whole engine, several concurrently, as in an evaluation. The model computes
everything, but its output is scripted. The peer is the same engine with an LRU cache. Without any cache every turn
prefills its whole prompt, which is counted, not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import anyio

from agentkit.agent import Agent
from agentkit.benchmarks.steered import SteeredModel
from agentkit.messages import AssistantMessage, Message
from agentkit.model import History
from agentkit.models.scripted import AssistantTurn
from agentkit.result import RunResult
from agentkit.trajectory import Trajectory
from agentkit_engine import AsyncEngine, Engine
from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.peers import long_text
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.runtime import Sequence as Computed
from agentkit_engine.runtime.prefix_cache import Checkpoint, IdChain, Keep, PrefixCache
from agentkit_environments import open_environment
from agentkit_tools import Tool, tool


@dataclass(frozen=True, slots=True)
class Shape:
    """Number of trajectories, number that run at the same time, turns of each, and tokens of the system prompt."""

    trajectories: int
    at_once: int
    turns: int
    head: int


class RecencyCache(PrefixCache):
    """A prefix cache that evicts the least recently used entry, independent of its value."""

    def add(self, ids: Sequence[int], chain: IdChain, sequence: Computed, keep: Keep) -> Checkpoint:
        """See `PrefixCache.add`."""
        return super().add(ids, chain, sequence, Keep.TURN)

    def evict(self, at_most: Keep = Keep.TURN, *, rank: int | None = None) -> bool:
        """See `PrefixCache.evict`."""
        return super().evict(Keep.TURN)


@dataclass(frozen=True, slots=True)
class Counts:
    """Token counts over all trajectories.

    Attributes:
        unique: Fed tokens, counting each continuation of the same ids once.
        prompts: Sum of the lengths of all prompts; each prompt is the whole conversation before its turn.
    """

    unique: int
    prompts: int

    @classmethod
    def of(cls, records: Sequence[History]) -> Counts:
        """Count the ids of `records`."""
        nodes: dict[tuple[int, int], int] = {}  # trie: (node, id) -> next node
        unique = prompts = 0
        for record in records:
            node = length = 0
            for segment in record.segments:
                length += len(segment.ids)
                prompts += length if segment.kind == "prompt" else 0
                for token_id in segment.ids:
                    known = len(nodes)
                    node = nodes.setdefault((node, token_id), known + 1)
                    unique += len(nodes) > known and segment.kind != "sampled"
        return cls(unique, prompts)


def sharing(shape: Shape) -> Iterator[Measurement]:
    """Run shared-prefill."""
    ours, prefilled = anyio.run(_run_all, shape, False)
    theirs, prefilled_by_recency = anyio.run(_run_all, shape, True)
    if [(record.token_ids, record.logprobs) for record in ours] != [
        (record.token_ids, record.logprobs) for record in theirs
    ]:
        raise OutputsDifferError("the trajectories depend on what the cache evicts; expected the same bits")
    counts = Counts.of(ours)
    runs = (
        f"{shape.trajectories} trajectories of {shape.turns} turns, {shape.at_once} at the same time, "
        f"{_in_common(ours)} tokens in common"
    )
    same = f"both the same {sum(len(record.token_ids) for record in ours)} tokens and log-probabilities, bit for bit"
    by_recency = "the same engine, its cache by recency alone"
    yield Measurement(
        "shared-prefill",
        f"tokens prefilled ÷ unique, {runs}",
        prefilled / counts.unique,
        "x",
        peer=by_recency,
        peer_value=prefilled_by_recency / counts.unique,
        higher_is_better=False,
        target=Bound("value", "<=", 1.2),
        stretch=Bound("value", "<=", 1.02),
        outputs=same,
    )
    yield Measurement(
        "shared-prefill",
        f"the same beside no cache, {runs}",
        prefilled / counts.unique,
        "x",
        peer="every turn prefills its whole prompt (counted, not run)",
        peer_value=counts.prompts / counts.unique,
        higher_is_better=False,
        outputs=f"{counts.unique} unique of {counts.prompts} prompt tokens",
    )
    yield Measurement(
        "shared-prefill",
        f"hit rate: prompt tokens that need no prefill, {runs}",
        100 * (1 - prefilled / counts.prompts),
        "%",
        peer=by_recency,
        peer_value=100 * (1 - prefilled_by_recency / counts.prompts),
        target=Bound("value", ">=", 98),
        outputs=same,
    )


async def _run_all(shape: Shape, by_recency: bool) -> tuple[list[Trajectory], int]:
    """Return the trajectories in order, and the number of fed tokens that were prefilled."""
    engine = Engine.load("tiny")
    if by_recency:
        engine.scheduler.cache = RecencyCache(engine.scheduler.pools)
    system = long_text(shape.head, engine.tokenizer)
    results: dict[int, RunResult] = {}
    free = anyio.CapacityLimiter(shape.at_once)
    async with AsyncEngine(engine) as running, await open_environment(backend="unsafe-local") as environment:
        model = SteeredModel(running, lambda messages, think: _say(messages, shape.turns))

        async def run(index: int) -> None:
            async with free:
                agent = Agent(model, [_pages_of(index)], system=system, effort="none")
                results[index] = await agent.run(f"{index}: read page after page.", environment=environment)

        async with anyio.create_task_group() as task_group:
            for index in range(shape.trajectories):
                task_group.start_soon(run, index)
    in_order = [results[index] for index in range(shape.trajectories)]
    for result in in_order:
        if (result.status, result.outcome.usage.turns) != ("answered", shape.turns):
            raise OutputsDifferError(f"a run ended as {result.outcome}; expected an answer after {shape.turns} turns")
    return [result.trajectory for result in in_order], engine.scheduler.prefilled


def _say(messages: Sequence[Message], turns: int) -> AssistantTurn:
    """Read the next page in every turn but the last."""
    said = sum(isinstance(message, AssistantMessage) for message in messages)
    return AssistantTurn(calls=[("read_page", {"page": said})]) if said + 1 < turns else AssistantTurn(content="done")


def _pages_of(index: int) -> Tool:
    """Return a tool without cost whose text differs for every trajectory."""

    @tool(read_only=True)
    async def read_page(page: int) -> str:
        """Return a page."""
        return f"Page {page} of book {index}: {1009 * (index + 1) * (page + 1)} and {9176 * (index + 3) + page}."

    return read_page


def _in_common(records: Sequence[Trajectory]) -> int:
    """Return the number of ids in the common prefix of all trajectories."""
    least, most = min(record.token_ids for record in records), max(record.token_ids for record in records)
    return next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
