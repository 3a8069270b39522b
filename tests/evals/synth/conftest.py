from __future__ import annotations

import anyio
import pytest

from agentkit_engine.chat import Tokenizer
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_evals.synth import FAMILIES
from agentkit_evals.synth.generate import phrases, texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return a tokenizer like the tiny model's, trained on a few conversations of each family."""

    async def corpus() -> list[str]:
        return [text async for text in texts(list(FAMILIES), range(3))]

    # not an async fixture: its event loop would last for the session, and tests could not run their own
    return Tokenizer.from_json(build_tokenizer(anyio.run(corpus), phrases=phrases(), vocab_size=1024))
