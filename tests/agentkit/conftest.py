"""Shared fixtures: a byte-level tokenizer, a scripted model, and a local environment."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import pytest
import torch

from agentkit import AssistantMessage, AssistantTurn, EmbeddedModel, Message, ScriptedModel, tool
from agentkit_engine.chat import CONTROL_TOKENS, Tokenizer
from agentkit_environments import Environment, open_environment


def byte_tokenizer_json() -> str:
    """Return a tokenizer with one token per byte, followed by all control tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": 256 + i,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i, token in enumerate(CONTROL_TOKENS)
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []},
        }
    )


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(byte_tokenizer_json())


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return {"Paris": "sunny, 21 degrees", "Oslo": "snowy, -3 degrees"}.get(city, "unknown")


@pytest.fixture(scope="module")
def tiny() -> Iterator[EmbeddedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield EmbeddedModel("tiny")
    torch.set_num_threads(threads)


@pytest.fixture
async def environment() -> AsyncIterator[Environment]:
    async with await open_environment(backend="unsafe-local") as environment:
        yield environment


@pytest.fixture
def script(tokenizer: Tokenizer) -> Callable[..., ScriptedModel]:
    """Return a function that makes a model of the given turns, the last of which repeats forever."""

    def make(*turns: AssistantTurn | Sequence[int]) -> ScriptedModel:
        def policy(messages: Sequence[Message], think: bool) -> AssistantTurn | Sequence[int]:
            said = sum(isinstance(message, AssistantMessage) for message in messages)
            return turns[min(said, len(turns) - 1)]

        return ScriptedModel(policy, tokenizer)

    return make
