"""Turn oracles into training data: real trajectories as ids with a loss mask, and texts for training a tokenizer.

Each oracle runs through `agentkit.Agent` with the real tools, in a plain directory ("unsafe-local", since the oracles
are trusted code). A row therefore has exactly the ids of an engine session.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from agentkit import Agent, ScriptedModel
from agentkit.agent import DEFAULT_SYSTEM
from agentkit.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage, to_openai_all
from agentkit.thinking import Thinking
from agentkit_engine import chat
from agentkit_environments import Environment, open_environment
from agentkit_evals.errors import EvalError
from agentkit_evals.statistics import SOLVED
from agentkit_evals.synth import sample
from agentkit_evals.synth.family import Split, SynthTask
from agentkit_evals.synth.words import SYLLABLES
from agentkit_evals.verify import verify
from agentkit_tools import BUILTINS, Tool, ToolCall, ToolContext

if TYPE_CHECKING:
    from agentkit_engine.chat import Tokenizer

SYLLABLE_COPIES = 20  # more often than any pair of letters in one conversation
_SYLLABLE = re.compile("[A-Za-z][aeiou]|[0-9]+")
_NAME = re.compile("([A-Za-z][aeiou]){2,}[0-9]*")
AT_ONCE = 8  # concurrent trajectories; they mostly wait for child processes
THINKING: tuple[Thinking, ...] = ("auto",) * 8 + ("always", "never")  # seeds cycle through these


class OracleError(EvalError):
    """An oracle did not solve its own task, which is a bug in the family. The message gives the task and the answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One trajectory: its ids, and a mask that is 1 for ids written by the assistant."""

    ids: list[int]
    loss_mask: list[int]
    family: str
    seed: int


async def generate(
    families: Sequence[str],
    seeds: Iterable[int],
    split: Split = "train",
    *,
    tokenizer: Tokenizer,
    verify_every: int = 50,
) -> AsyncIterator[Row]:
    """Run the oracle of each family on each seed, and yield the rows ordered by seed, then by family.

    Every `verify_every`-th outcome is scored by the task's verifier; for the others it is enough that the oracle
    finished. Seeds cycle through the thinking policies: mostly `auto`, some `always` and `never`.

    Raises:
        OracleError: an oracle did not solve its task.
        ValueError: the family or the split is unknown.
    """
    jobs = enumerate((family, seed) for seed in seeds for family in families)
    while batch := list(itertools.islice(jobs, AT_ONCE)):
        rows: dict[int, Row] = {}

        async def run(index: int, family: str, seed: int, rows: dict[int, Row] = rows) -> None:
            check = index % verify_every == 0
            rows[index] = await _row(sample(family, seed, split), seed, tokenizer, check=check)

        async with anyio.create_task_group() as task_group:
            for index, (family, seed) in batch:
                task_group.start_soon(run, index, family, seed)
        for index, _ in batch:
            yield rows[index]


async def _row(synth: SynthTask, seed: int, tokenizer: Tokenizer, *, check: bool) -> Row:
    task = synth.task
    model = ScriptedModel(synth.oracle(), tokenizer, name="oracle")
    thinking = THINKING[seed % len(THINKING)]
    agent = Agent(model, task.build_tools(), system=task.system, thinking=thinking, effort=task.agent.effort)
    async with await open_environment(task.environment.spec(), backend="unsafe-local") as environment:
        await task.prepare(environment)
        result = await agent.run(task.instruction, environment=environment)
        if result.status not in ("submitted", "answered"):
            raise OracleError(f"{task.id}: the oracle's run ended with status {result.status}, expected an answer")
        if check:
            archive = (await environment.export_dir(environment.spec.workdir)).data
            await require_solved(synth, archive, result.answer)
    return Row(list(result.trajectory.token_ids), list(result.trajectory.loss_mask), synth.family, seed)


async def require_solved(synth: SynthTask, archive: bytes, answer: str | None) -> None:
    """Score an outcome. Raises OracleError unless the reward is full."""
    verdict = await verify(synth.task, archive=archive, answer=answer, backend="unsafe-local")
    if verdict.reward < SOLVED:
        raise OracleError(
            f"{synth.task.id}: answered {answer!r}, which scores {verdict.reward:g}, expected 1: {verdict.output}"
        )


async def transcript(
    synth: SynthTask, environment: Environment, *, thinking: Thinking = "auto"
) -> tuple[list[Message], str]:
    """Run an oracle without a tokenizer, calling the tools directly; return its messages and its answer.

    `environment` must contain the task's files.
    """
    policy = synth.oracle()
    tools = {tool.name: tool for tool in synth.task.build_tools()}
    context = ToolContext(environment)
    messages: list[Message] = [SystemMessage(synth.task.system or DEFAULT_SYSTEM), UserMessage(synth.task.instruction)]
    failed = False
    while True:
        first = not isinstance(messages[-1], ToolMessage)
        turn = policy(messages, thinking == "always" or (thinking == "auto" and (first or failed)))
        number = sum(isinstance(message, AssistantMessage) for message in messages)
        calls = tuple(
            ToolCall(f"call_{number}_{index}", name, json.dumps(arguments, ensure_ascii=False))
            for index, (name, arguments) in enumerate(turn.calls)
        )
        messages.append(AssistantMessage(turn.content, turn.reasoning, calls))
        if not calls:
            return messages, turn.content
        results = [await tools[call.name].call(call, context) for call in calls]
        if results[-1].final:
            return messages, results[-1].content
        messages += [ToolMessage.of(result) for result in results]
        failed = any(result.is_error for result in results)


async def texts(families: Sequence[str], seeds: Iterable[int]) -> AsyncIterator[str]:
    """Yield the texts to train the tokenizer on: the conversations of the train split.

    Names consist of a few syllables and must be tokenized into them, not into rare tokens of their own. Names are
    therefore split, and each conversation comes with enough copies of the syllables to make them the first merges.
    """
    for seed, family in itertools.product(seeds, families):
        yield SYLLABLE_COPIES * ("\n".join(SYLLABLES) + "\n")
        synth = sample(family, seed, "train")
        async with await open_environment(synth.task.environment.spec(), backend="unsafe-local") as environment:
            await synth.task.prepare(environment)
            messages, _ = await transcript(synth, environment, thinking="always")
        specs = [tool.spec for tool in synth.task.build_tools()]
        text = chat.encode(to_openai_all(messages), tools=specs or None, effort="high")
        for piece in between_control_tokens(_apart(text, synth.names)):
            yield piece


def _apart(text: str, names: Iterable[str]) -> str:
    """Replace each name in `text` by its syllables, one per line."""
    made = [re.escape(name) for name in names if _NAME.fullmatch(name)]
    if not made:
        return text
    return re.sub("|".join(made), lambda match: "\n".join(_SYLLABLE.findall(match[0])), text)


def phrases() -> list[str]:
    """Return constant texts of prompts and calls that a small vocabulary can include as single tokens.

    They are the default system prompt, each line (with its newline) of the tools block of the built-in tools, the
    fixed parts of a user tool's line, and the fixed parts of calls and results.
    """
    tools: list[Tool] = list(BUILTINS.values())
    block = chat.encode([{"role": "system", "content": ""}], tools=[tool.spec for tool in tools], effort="high")
    found = [DEFAULT_SYSTEM]
    for piece in between_control_tokens(block):
        found += [line for line in piece.splitlines(keepends=True) if len(line) > 3]
    for tool in tools:
        found.append(f'invoke name="{tool.name}">\n<')
        found += [f'parameter name="{name}" string="true">' for name in tool.parameters["properties"]]
    return list(dict.fromkeys([*found, *TOOL_LINE, *CALL_FRAMES]))


TOOL_LINE = (
    *('{"name": "', '", "description": "', '", "parameters": {"type": "object", "properties": {', '"}, "', '": {'),
    *('"type": "string"}', '"type": "integer"}', '"type": "number"}', '"type": "boolean"}', '"description": "'),
    *('", "type": "string"}', '", "type": "integer"}', '}, "required": ["', '"]}}\n', "}}}\n", '", "', ', "'),
)
CALL_FRAMES = (
    *('invoke name="', '">\n<', 'parameter name="', '" string="true">', '" string="false">', "tool_calls>\n<"),
    *(" `", "\n\n<", "</", "parameter>\n<", "parameter>\n</", "invoke>\n<", "invoke>\n</", "tool_calls>"),
    *("<tool_result>", "</tool_result>", "</tool_result>\n\n<tool_result>"),
)


def between_control_tokens(text: str) -> Iterator[str]:
    """Yield the pieces of a text between control tokens."""
    for token in chat.CONTROL_TOKENS:
        text = text.replace(token, "\0")
    return (piece for piece in text.split("\0") if piece)
