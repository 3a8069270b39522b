from __future__ import annotations

import pytest

from agentkit_engine.chat import Tokenizer
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_evals.synth import FAMILIES
from agentkit_evals.synth.generate import phrases, texts


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def tokenizer(anyio_backend: str) -> Tokenizer:
    """Return a tokenizer like the tiny model's, trained on a few conversations of each family."""
    corpus = [text async for text in texts(list(FAMILIES), range(3))]
    return Tokenizer.from_json(build_tokenizer(corpus, phrases=phrases(), vocab_size=1024))
