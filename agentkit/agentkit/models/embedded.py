"""The embedded engine as a `Model`. The engine and torch are imported when a model is constructed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from agentkit.checks import check_type
from agentkit.model import Effort, History, ModelSession
from agentkit.models.grammars import grammar_for
from agentkit.models.tokens import TokenizedSession
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import Tool

if TYPE_CHECKING:
    import torch

    from agentkit_engine import AsyncEngine, Engine, SampledToken
    from agentkit_engine.grammar import Grammar


class EmbeddedModel:
    """A model in this process: `"tiny"`, a checkpoint folder, an `Engine`, or a running `AsyncEngine`.

    `async with EmbeddedModel("tiny") as model:` runs one model thread, whose steps batch all sessions. Without `async
    with`, each session runs its own model thread.
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine | str | Path,
        *,
        cache_dir: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Use a given engine, or load one on `device`, with `cache_dir` as its disk cache.

        Raises:
            TypeError: `engine` is not an engine, name or folder; or it is an engine, and `cache_dir` or `device` is
                given.
            ModelNotFoundError, CheckpointError and others: see `Engine.load`.
            TokenizerMissingError: the model's folder has no tokenizer.
        """
        from agentkit_engine import AsyncEngine, Engine

        expected = '"tiny", a checkpoint folder, an Engine or an AsyncEngine'
        check_type("EmbeddedModel(engine)", engine, AsyncEngine | Engine | str | Path, expected)
        check_type("EmbeddedModel(cache_dir=...)", cache_dir, str | Path | None, "a folder or None")
        if isinstance(engine, AsyncEngine | Engine) and (cache_dir, device) != (None, None):
            raise TypeError("the engine is already loaded; pass cache_dir and device to Engine.load")
        self._running = engine if isinstance(engine, AsyncEngine) else None
        self.engine: Engine
        if isinstance(engine, AsyncEngine):
            self.engine = engine.engine
        elif isinstance(engine, Engine):
            self.engine = engine
        else:
            self.engine = Engine.load(engine, cache_dir=cache_dir, device="cpu" if device is None else device)
            self.engine.warm_up()
        self.name = self.engine.name
        self.tokenizer = self.engine.tokenizer
        self.sampling = self.engine.sampling
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        from agentkit_engine import AsyncEngine

        if self._running is None:
            self._running = await self._stack.enter_async_context(AsyncEngine(self.engine))
            self._stack.callback(setattr, self, "_running", None)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(exc_type, exc, traceback)

    @property
    def fingerprint(self) -> str:
        """See `Engine.fingerprint`."""
        return self.engine.fingerprint

    @asynccontextmanager
    async def open(
        self, *, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams, history: History | None = None
    ) -> AsyncIterator[ModelSession]:
        """See `Model.open`.

        Raises:
            GrammarMissingError, GrammarError: see `grammar_for`.
        """
        from agentkit_engine import AsyncEngine

        params = replace(sampling, stop_token_ids=sampling.stop_token_ids | {self.tokenizer.eos_id})
        grammar, grammar_off = await grammar_for(self.engine, tools, sampling)
        if grammar is None and sampling.grammar is True:  # there are no tools to constrain calls to
            params = replace(params, grammar="auto")
        async with AsyncExitStack() as stack:
            running = self._running
            if running is None:
                running = await stack.enter_async_context(AsyncEngine(self.engine))
            max_length = self.engine.spec.max_position_embeddings
            on_disk = self.engine.cache_dir is not None
            tokens = EngineTokens(running, params, grammar=grammar, max_length=max_length, on_disk=on_disk)
            await stack.enter_async_context(aclosing(tokens))
            session = TokenizedSession(
                tokens,
                self.tokenizer,
                tools=tools,
                effort=effort,
                dialect=self.engine.dialect,
                grammar_off=grammar_off,
            )
            if history is not None:
                await session.restore(history)
            yield session


class EngineTokens:
    """A `TokenSession` over an engine session."""

    def __init__(
        self,
        engine: AsyncEngine,
        params: SamplingParams,
        *,
        grammar: Grammar | None = None,
        max_length: int,
        on_disk: bool = False,
    ) -> None:
        """`on_disk` is set if the engine has a disk cache, which then gets the state at the end of each prompt."""
        self.max_length = max_length
        self._on_disk = on_disk
        self._grammar = grammar
        self._engine = engine
        self._session = engine.session()
        self._params = params
        self._cleared = (0, 0)  # cache counts of the sessions before this one

    @property
    def token_ids(self) -> Sequence[int]:
        """The engine's list of ids."""
        return self._session.token_ids

    @property
    def cache_usage(self) -> tuple[int, int]:
        """The engine's cache counts."""
        usage, (hits, misses) = self._session.usage, self._cleared
        return hits + usage.hit_tokens, misses + usage.miss_tokens

    async def append(self, ids: Sequence[int], /) -> None:
        """Feed ids."""
        await self._session.append(ids)

    async def clear(self) -> None:
        """Go on in a new engine session."""
        self._cleared = self.cache_usage
        await self._session.close()
        self._session = self._engine.session()

    async def aclose(self) -> None:
        """Free the engine session."""
        await self._session.close()

    async def checkpoint(self) -> None:
        """Ask the engine to keep the state at this position once it is computed."""
        await self._session.checkpoint()

    async def keep(self) -> None:
        """Ask the engine to write the state at this position to the disk cache, if there is one."""
        if self._on_disk:
            await self._session.checkpoint()

    async def prefill(self) -> None:
        """Compute the ids so far."""
        await self._session.prefill()

    async def park(self) -> None:
        """Allow the engine to free the session's memory until its next use."""
        await self._session.park()

    async def generate(self, *, max_tokens: int | None) -> AsyncGenerator[SampledToken, None]:
        """Continue sampling with the session's parameters."""
        params = replace(self._params, max_tokens=max_tokens)
        async with aclosing(self._session.generate(params, grammar=self._grammar)) as tokens:
            async for token in tokens:
                yield token
