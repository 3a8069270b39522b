"""The embedded engine with a scripted output: it feeds, computes and samples every id, but a logit bias selects the id.

A run thus has the length and the calls that a benchmark needs, independent of the model's abilities.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from agentkit.model import Effort, History, ModelSession
from agentkit.models.embedded import EngineTokens
from agentkit.models.scripted import Policy, ScriptedTokens
from agentkit.models.tokens import TokenizedSession
from agentkit_engine import AsyncEngine, SampledToken, SamplingParams
from agentkit_tools import Tool

BIAS = 1e9
"""Far above any logit, and finite in float32."""


class SteeredModel:
    """A `Model` on a running engine that takes every turn from `policy(messages, think)`."""

    def __init__(self, running: AsyncEngine, policy: Policy) -> None:
        self.name = f"{running.engine.name}, steered"
        self.sampling = SamplingParams(temperature=0)
        self._running = running
        self._policy = policy

    @asynccontextmanager
    async def open(
        self, *, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams, history: History | None = None
    ) -> AsyncIterator[ModelSession]:
        """See `Model.open`; sampling has no effect on a script."""
        engine = self._running.engine
        script = ScriptedTokens(self._policy, engine.tokenizer)
        tokens = SteeredTokens(self._running, script, max_length=engine.spec.max_position_embeddings)
        async with aclosing(tokens):
            session = TokenizedSession(tokens, engine.tokenizer, tools=tools, effort=effort, dialect=engine.dialect)
            script.messages = session.messages
            if history is not None:
                await session.restore(history)
            yield session


class SteeredTokens(EngineTokens):
    """A `TokenSession` over an engine session that samples the ids of a script."""

    def __init__(self, engine: AsyncEngine, script: ScriptedTokens, *, max_length: int) -> None:
        super().__init__(engine, SamplingParams(temperature=0, max_tokens=1), max_length=max_length)
        self._script = script

    async def append(self, ids: Sequence[int], /) -> None:
        """Feed ids."""
        await self._script.append(ids)
        await super().append(ids)

    async def clear(self) -> None:
        """Remove all ids."""
        await self._script.clear()
        await super().clear()

    async def generate(self, *, max_tokens: int | None) -> AsyncGenerator[SampledToken, None]:
        """Sample the script's ids, one at a time."""
        async with aclosing(self._script.generate(max_tokens=max_tokens)) as script:
            async for wanted in script:
                params = replace(self._params, logit_bias={wanted.id: BIAS})
                async with aclosing(self._session.generate(params)) as tokens:
                    async for token in tokens:
                        yield token
