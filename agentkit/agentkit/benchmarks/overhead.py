"""The benchmark turn-overhead: the cost of the loop, with a model and a tool that cost nothing.

In each turn the model calls a tool that does nothing, and reads its result. The first model is a script, which leaves
only the loop: append, parse, dispatch, record, resume. The second is the embedded model with its thread, scheduler and
sampler, whose forward passes compute nothing and make the same ids the most likely.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import anyio
import torch

from agentkit.agent import Agent
from agentkit.limits import Limits
from agentkit.messages import AssistantMessage, to_openai_all
from agentkit.model import Model
from agentkit.models.embedded import EmbeddedModel
from agentkit.models.scripted import Policy, ScriptedModel
from agentkit.trajectory import Trajectory
from agentkit_engine import Engine
from agentkit_engine.benchmarks.errors import OutputsDifferError
from agentkit_engine.benchmarks.null_model import NullRunner
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median
from agentkit_engine.chat import Tokenizer, encode_completion_ids, encode_ids
from agentkit_engine.runtime import Computed, Pools, ScheduledTokens
from agentkit_environments import open_environment
from agentkit_tools import tool

CERTAIN = 1e9
"""Far above any logit, and finite in float32."""


@tool(read_only=True)
async def nothing() -> str:
    """Do nothing."""
    return "done"


def overhead(turns: int, rendered: int, repeats: int) -> Iterator[Measurement]:
    """Run turn-overhead. The peer renders the whole conversation again each turn, and is timed in `rendered` turns."""
    tokenizer = Engine.load("tiny").tokenizer
    anyio.run(_converse, ScriptedModel(_calls(2, tokenizer), tokenizer), 2)  # warm-up: what is done once per process
    runs = [anyio.run(_converse, ScriptedModel(_calls(turns, tokenizer), tokenizer), turns) for _ in range(repeats)]
    record = runs[0].record
    ours = Median.of([run.us_per_turn for run in runs])
    a_turn = f"{len(record.token_ids) / turns:.0f} tokens a turn"
    yield Measurement(
        "turn-overhead",
        f"loop overhead, {turns} turns with a null tool and a scripted model, {a_turn}",
        ours.value,
        "us/turn",
        ours.spread,
        f"rendering the conversation to tokens again each turn and nothing else, mean of {rendered} turns",
        _rendering_us(record, rendered, tokenizer),
        higher_is_better=False,
        target=Bound("value", "<=", 500),
        stretch=Bound("value", "<=", 100),
        outputs="the tokens rendered again are those of the session",
    )
    through = [anyio.run(_converse_in_engine, turns, record.token_ids) for _ in range(repeats)]
    if any(run.record.token_ids != record.token_ids for run in through):
        raise OutputsDifferError("the tokens of the run in the engine differ from those of the scripted run")
    outputs = "the same tokens as with the script alone"
    in_engine = Median.of([run.us_per_turn for run in through])
    yield Measurement(
        "turn-overhead",
        f"the same with the embedded model, whose forwards cost nothing, {a_turn}",
        in_engine.value,
        "us/turn",
        in_engine.spread,
        outputs=outputs,
    )
    fed = record.loss_mask.count(0)
    yield Measurement(
        "turn-overhead",
        f"tokens prefilled again in {turns} turns through the engine, {fed} fed",
        max(run.prefilled for run in through) - fed,
        "tokens",
        target=Bound("value", "<=", 0),
        stretch=Bound("value", "<=", 0),
        outputs=outputs,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """The record of a run, its time per turn, and the number of fed tokens that were prefilled."""

    record: Trajectory
    us_per_turn: float
    prefilled: int = 0


async def _converse(model: Model, turns: int) -> _Run:
    async with await open_environment(backend="unsafe-local") as environment:
        sampling = model.sampling.override(grammar=False)  # ids that a grammar forces would be fed, not sampled
        agent = Agent(model, [nothing], effort="none", sampling=sampling, limits=Limits(max_turns=None))
        start = time.perf_counter()
        result = await agent.run("Do nothing, often.", environment=environment)
        elapsed_s = time.perf_counter() - start
    if (result.status, result.outcome.usage.turns) != ("answered", turns):
        raise OutputsDifferError(f"the run ended as {result.outcome}; expected an answer after {turns} turns")
    return _Run(result.trajectory, 1e6 * elapsed_s / turns)


async def _converse_in_engine(turns: int, ids: Sequence[int]) -> _Run:
    engine = Engine.load("tiny")
    engine.scheduler.runner = _ScriptedRunner(engine.scheduler.pools, ids)
    async with EmbeddedModel(engine) as model:
        run = await _converse(model, turns)
    return replace(run, prefilled=engine.scheduler.prefilled)


class _ScriptedRunner(NullRunner):
    """A runner whose forward passes make the next of `ids` practically certain."""

    def __init__(self, pools: Pools, ids: Sequence[int]) -> None:
        super().__init__(pools)
        self._ids = ids

    def step(self, segments: Sequence[ScheduledTokens], *, all_rows: bool = False) -> Computed:
        """See `Runner.step`; there is one session."""
        computed = super().step(segments, all_rows=all_rows)
        [segment] = segments
        length, rows = segment.sequence.length, 1 + len(segment.draft)
        logits_RV = torch.zeros(rows, computed.logits_RV.shape[1])
        wanted = self._ids[length : length + rows]
        logits_RV[range(len(wanted)), wanted] = CERTAIN
        return Computed(logits_RV, computed.streams_RMD)


def _calls(turns: int, tokenizer: Tokenizer) -> Policy:
    """Call the tool in every turn but the last. The ids are encoded in advance, so that the script costs nothing."""
    call = {"type": "function", "function": {"name": nothing.name, "arguments": "{}"}}
    again = encode_completion_ids({"role": "assistant", "tool_calls": [call]}, tokenizer=tokenizer, think=False)
    last = encode_completion_ids({"role": "assistant", "content": "done"}, tokenizer=tokenizer, think=False)
    said = itertools.count(1)
    return lambda messages, think: again if next(said) < turns else last


def _rendering_us(record: Trajectory, count: int, tokenizer: Tokenizer) -> float:
    """Return the mean time to encode the conversation before a turn, over `count` turns including the last."""
    messages = record.messages
    before = [index for index, message in enumerate(messages) if isinstance(message, AssistantMessage)]
    ends = [end for end, segment in zip(_ends(record), record.segments, strict=True) if segment.kind == "prompt"]
    turns = [(index + 1) * len(before) // count - 1 for index in range(count)]
    taken_s = []
    for turn in turns:
        said = to_openai_all(messages[: before[turn]])
        start = time.perf_counter()
        ids = encode_ids(said, tokenizer=tokenizer, tools=list(record.header.tools))
        taken_s.append(time.perf_counter() - start)
        if ids != record.token_ids[: ends[turn]]:
            raise OutputsDifferError(f"the rendered prompt of turn {turn} differs from the ids fed to the session")
    return 1e6 * mean(taken_s)


def _ends(record: Trajectory) -> Iterator[int]:
    """Yield the total number of ids after each segment."""
    return itertools.accumulate(len(segment.ids) for segment in record.segments)
