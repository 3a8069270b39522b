"""The steps of each oracle. A model trained on these runs learns the steps, not only the answers."""

from __future__ import annotations

import json
from collections import Counter

import jsonschema
import pytest

from agentkit.messages import AssistantMessage, Message, ToolMessage
from agentkit.task import ToolConfig
from agentkit_environments import open_environment
from agentkit_evals.synth import SPLITS, SynthTask, sample
from agentkit_evals.synth.generate import transcript
from agentkit_tools import BUILTINS

pytestmark = pytest.mark.anyio


def some(family: str, seeds: int = 3) -> list[SynthTask]:
    return [sample(family, seed, split) for split in SPLITS for seed in range(seeds)]


async def watch(synth: SynthTask) -> list[Message]:
    async with await open_environment(synth.task.environment.spec(), backend="unsafe-local") as environment:
        await synth.task.prepare(environment)
        messages, _ = await transcript(synth, environment)
    return messages


def turns(messages: list[Message]) -> list[list[str]]:
    """Return the names of the calls of each turn."""
    return [[call.name for call in m.calls] for m in messages if isinstance(m, AssistantMessage)]


def results(messages: list[Message]) -> list[ToolMessage]:
    return [message for message in messages if isinstance(message, ToolMessage)]


async def test_combine_reads_all_its_files_in_one_turn() -> None:
    for synth in some("combine"):
        reads, submits = turns(await watch(synth))
        assert len(reads) >= 2 and set(reads) == {"read_file"}
        assert submits == ["submit"]


async def test_bugfix_sees_the_test_fail_and_then_pass() -> None:
    for synth in some("bugfix"):
        messages = await watch(synth)
        assert turns(messages) == [["bash"], ["read_file"], ["edit_file"], ["bash"], ["submit"]]
        before, _, _, after = results(messages)
        assert before.is_error and "FAIL" in before.content
        assert (after.is_error, after.content) == (False, "OK")


def test_config_draws_each_format_in_both_splits() -> None:
    for split in SPLITS:
        edited = [next(iter(sample("config", seed, split).task.environment.files)) for seed in range(60)]
        drawn = Counter(path.rpartition(".")[2] for path in edited)
        assert set(drawn) == {"json", "yaml", "ini"} and min(drawn.values()) >= 6, (split, drawn)


async def test_recover_reads_a_missing_file_and_then_lists() -> None:
    for synth in some("recover"):
        messages = await watch(synth)
        first, second, *_, last = turns(messages)
        assert (first, second, last) == (["read_file"], ["list_dir"], ["submit"])
        missing, *found = results(messages)
        assert missing.is_error and not any(result.is_error for result in found)


async def test_rename_changes_several_files_with_one_command() -> None:
    touched = [await renamed(synth) for synth in some("rename", 10)]
    assert min(touched) >= 1 and max(touched) >= 3
    assert sum(count >= 2 for count in touched) > len(touched) / 2


async def renamed(synth: SynthTask) -> int:
    """Return the number of files changed by the oracle's one command."""
    async with await open_environment(synth.task.environment.spec(), backend="unsafe-local") as environment:
        await synth.task.prepare(environment)
        messages, _ = await transcript(synth, environment)
        after = {path: (await environment.read_file(path)).decode() for path in synth.task.environment.files}
    assert turns(messages) == [["search"], ["bash"], ["submit"]]
    return sum(after[path] != text for path, text in synth.task.environment.files.items())


async def test_chat_answers_without_a_call() -> None:
    for synth in some("chat", 10):
        messages = await watch(synth)
        assert turns(messages) == [[]]


async def test_a_user_tool_is_defined_only_in_its_task() -> None:
    for synth in some("user_tool", 5):
        call = next(call for m in await watch(synth) if isinstance(m, AssistantMessage) for call in m.calls)
        assert call.name not in BUILTINS
        (config,) = (each for each in synth.task.tools if isinstance(each, ToolConfig) and each.name == call.name)
        arguments = json.loads(call.arguments)
        jsonschema.validate(arguments, config.parameters)
        assert set(arguments) == set(config.parameters["properties"])
        specs = {tool.name: tool.spec["function"] for tool in synth.task.build_tools()}
        assert specs[call.name]["parameters"] == config.parameters


async def test_poll_answers_with_the_most_frequent_of_many_votes() -> None:
    for synth in some("poll"):
        messages = await watch(synth)
        assert turns(messages) == [["read_file"], ["submit"]]
        ((_, content),) = synth.task.environment.files.items()
        votes = Counter(line for line in content.splitlines() if line.isalpha())
        assert len(votes) == 3 and votes.total() >= 64
        ((winner, most),) = votes.most_common(1)
        assert 0.59 <= most / votes.total() <= 0.75
        (submit,) = [c for m in messages if isinstance(m, AssistantMessage) for c in m.calls if c.name == "submit"]
        assert json.loads(submit.arguments) == {"answer": winner}
