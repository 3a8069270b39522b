"""A `Model` behind an API. The session keeps the conversation, and sends all of it with every turn."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio

from agentkit.checks import check_positive, check_type
from agentkit.errors import ApiError, ContextFullError, ModelOptionError
from agentkit.messages import Message, unanswered
from agentkit.model import (
    Effort,
    Generated,
    GenerationLimits,
    History,
    ModelEvent,
    ModelSession,
    Retried,
    StopReason,
    TokenSegment,
    Usage,
    total_cost,
)
from agentkit.models.remote.history import sendable
from agentkit.models.remote.names import ToolNames
from agentkit.models.remote.provider import (
    Provider,
    StreamFinished,
    TokenCounts,
    TokenIds,
    ToolSpec,
    TransientError,
    TurnRequest,
)
from agentkit.models.remote.resolve import endpoint_of, opener
from agentkit.models.remote.retry import MAX_WAIT_S, RateLimiter, limiter_of, wait_s
from agentkit.models.remote.turn import RemoteTurn
from agentkit.prices import Price, Prices
from agentkit_engine.sampling_params import SamplingParams
from agentkit_tools import Tool


class RemoteModel:
    """A model behind an API: `"openai:gpt-5"`, `"anthropic:claude-sonnet-4-5"`, `"deepseek:deepseek-flash"`.

    `openai:` with a base URL is for every server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, Kimi, Qwen.

    With `async with RemoteModel(...) as model:` all sessions share connections. Without it, each session has its own.

    Attributes:
        name: The name that was given.
        host: The host that conversations are sent to.
        efforts: The reasoning efforts that the model has.
        price: The list price of the model; None if it is unknown.
        sampling: `SamplingParams()`. A field with its default value is not sent, so that the API's own default holds. A
            seed is sent only to APIs that take one.
    """

    def __init__(
        self,
        name: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 5,
        max_connections: int | None = None,
        context_tokens: int | None = None,
        prices: Prices | str | Path | None = None,
    ) -> None:
        """Use the model `PROVIDER:MODEL`. Nothing is sent until a session generates.

        Args:
            name: `openai:MODEL`, `anthropic:MODEL` or `deepseek:MODEL`.
            base_url: The API's URL. Default: the environment's `OPENAI_BASE_URL` (`ANTHROPIC_BASE_URL`,
                `DEEPSEEK_BASE_URL`), else the provider's own. `openai:` speaks the Responses protocol at OpenAI itself,
                and Chat Completions at any other URL.
            api_key: The key. Default: the environment's `OPENAI_API_KEY` (`ANTHROPIC_API_KEY`, `DEEPSEEK_API_KEY`). It
                is never recorded. A server at another URL may need none.
            timeout_s: Seconds without data from the API after which a request fails.
            max_retries: Maximum number of times that a request is sent again after a rate limit, a server error, a
                timeout or a broken stream.
            max_connections: Maximum number of requests in flight with this key, over all sessions. Default: no limit
                until the API reports a rate limit.
            context_tokens: Size of the context in tokens, for servers that silently truncate a long conversation.
            prices: A price table, or the path of one. Default: see `Prices.load`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of range.
            UnknownModelError: the provider does not exist.
            ModelOptionError: the base URL is not a URL.
            ApiKeyError: there is no key.
            MissingDependencyError: the API's package is not installed.
            PriceError: the price table cannot be used.
        """
        check_type("RemoteModel(name)", name, str, 'a name such as "openai:gpt-5"')
        check_type("RemoteModel(base_url=...)", base_url, str | None, "a URL or None")
        check_type("RemoteModel(api_key=...)", api_key, str | None, "a key or None")
        check_type("RemoteModel(prices=...)", prices, Prices | str | Path | None, "a Prices, a file or None")
        check_positive("RemoteModel(timeout_s=...)", timeout_s, whole=False)
        check_positive("RemoteModel(max_connections=...)", max_connections, whole=True, none=True)
        check_positive("RemoteModel(context_tokens=...)", context_tokens, whole=True, none=True)
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ValueError(f"RemoteModel(max_retries=...) must be a whole number from 0, got {max_retries!r}")
        endpoint = endpoint_of(name, base_url=base_url, api_key=api_key, timeout_s=timeout_s)
        self._open_provider = opener(endpoint)
        self._api_key = endpoint.api_key
        self._max_retries = max_retries
        self._max_connections = max_connections
        self._context_tokens = context_tokens
        self._shared: Provider | None = None
        about = self._open_provider()
        self.name = name
        self.host = endpoint.host
        self.efforts = about.efforts
        table = prices if isinstance(prices, Prices) else Prices.load(prices)
        own = table.find(endpoint.model, host=endpoint.host)
        self.price = own or table.find(endpoint.model, host=endpoint.billing_host)
        self.sampling = SamplingParams()

    def __repr__(self) -> str:
        return f"RemoteModel({self.name!r}, host={self.host!r})"

    async def __aenter__(self) -> Self:
        self._shared = self._open_provider()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            await shared.aclose()

    @asynccontextmanager
    async def open(
        self, *, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams, history: History | None = None
    ) -> AsyncIterator[ModelSession]:
        """See `Model.open`.

        Raises:
            ModelOptionError: the API lacks the effort or a sampling parameter, or does not take so many tools.
        """
        provider = self._shared or self._open_provider()
        try:
            self._check(provider, tools, effort, sampling)
            yield RemoteSession(
                provider,
                tools=tools,
                effort=effort,
                sampling=sampling,
                limiter=limiter_of(self.host, self._api_key, self._max_connections),
                max_retries=self._max_retries,
                context_tokens=self._context_tokens,
                price=self.price,
                history=history,
            )
        finally:
            if provider is not self._shared:
                with anyio.CancelScope(shield=True):
                    await provider.aclose()

    def _check(self, provider: Provider, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams) -> None:
        if effort not in provider.efforts:
            raise ModelOptionError(f"{self.name} has no effort {effort!r}; it has {', '.join(provider.efforts)}")
        if provider.max_tools is not None and len(tools) > provider.max_tools:
            raise ModelOptionError(
                f"{self.name} takes at most {provider.max_tools} tools, and the agent has {len(tools)}; leave some out"
            )
        if sampling.grammar is True:
            raise ModelOptionError(f"{self.name} is behind an API, where no grammar can be set; leave out grammar")
        if sampling.top_logprobs:
            raise ModelOptionError(f"{self.name} is behind an API, which reports no top_logprobs; leave it out")
        provider.check_sampling(sampling)


class RemoteSession:
    """A `ModelSession` over a `Provider`."""

    dialect = None
    grammar_off = "the model is behind an API"

    def __init__(
        self,
        provider: Provider,
        *,
        tools: Sequence[Tool],
        effort: Effort,
        sampling: SamplingParams,
        limiter: RateLimiter,
        max_retries: int,
        context_tokens: int | None = None,
        price: Price | None = None,
        history: History | None = None,
    ) -> None:
        self.messages: list[Message] = list(history.messages) if history else []
        self.segments: list[TokenSegment] = list(history.segments) if history else []
        self.usage = Usage(cost_usd=None if price is None else 0.0)
        self._price = price
        self._sent = datetime.now(UTC)  # time of the last request
        self._provider = provider
        self._names = ToolNames(tool.name for tool in tools)
        self._specs = [ToolSpec(self._names.sent(tool.name), tool.description, tool.parameters) for tool in tools]
        self._tools = [tool.spec for tool in tools]
        self._effort = effort
        self._sampling = sampling
        self._limiter = limiter
        self._max_retries = max_retries
        self._context_tokens = context_tokens
        self._length = 0  # tokens of the conversation, by the API's last count
        self._ids = [token for segment in self.segments for token in segment.ids]
        self._call_ids = {call.id for message in self.messages if message.role == "assistant" for call in message.calls}
        self.turns = history.turns if history else 0

    async def append(self, messages: Sequence[Message]) -> None:
        """Add `messages`; they are sent with the next `generate`."""
        self.messages.extend(messages)
        for message in messages:
            if message.role == "assistant":  # from a message history
                self.turns += 1
                self._call_ids.update(call.id for call in message.calls)

    async def restart(self, messages: Sequence[Message]) -> None:
        """Replace the whole conversation; it is sent with the next `generate`."""
        self.messages[:] = messages
        self.segments.clear()
        self._ids.clear()
        self._length = 0

    async def prefill(self, messages: Sequence[Message]) -> None:
        """Do nothing: the API receives a prompt as a whole."""

    @property
    def context_window(self) -> int | None:
        """Size of the context in tokens, if it was given."""
        return self._context_tokens

    @property
    def context_tokens(self) -> int:
        """Estimated tokens of the next prompt: the API's last count, and one for 4 characters of what is new."""
        new = sum(len(message.content) for message in unanswered(self.messages))
        return max(self._length + new // 4, self._estimated_length())

    async def generate(self, *, think: bool, limits: GenerationLimits) -> AsyncGenerator[ModelEvent, None]:
        """Generate one turn; see `ModelSession.generate`. Its calls are ready only once the whole turn has arrived.

        Raises:
            ContextFullError: the conversation does not fit into the context.
            ApiKeyError, UnknownModelError, ApiError: the API refused the request, or all attempts failed.
        """
        if self._context_tokens is not None and self._length >= self._context_tokens:
            raise ContextFullError(f"the conversation fills the context of {self._context_tokens} tokens")
        request = TurnRequest(
            messages=sendable(self.messages, self._names),
            tools=self._specs,
            think=think,
            effort=self._effort,
            sampling=self._sampling,
            max_tokens=limits.max_tokens,
            max_thinking_tokens=limits.max_thinking_tokens if think else None,
        )
        turn = self._new_turn(think)
        failures, repeated, left_early = 0, False, True
        try:
            while turn.finished is None and not repeated:
                try:
                    async with self._limiter, aclosing(self._provider.stream(request)) as deltas:
                        self._sent = datetime.now(UTC)
                        async for delta in deltas:
                            for shown in turn.add(delta):
                                yield shown
                            repeated = turn.repeats(limits.max_repeated_tokens)
                            if repeated:
                                break
                        if turn.finished is None and not repeated:
                            raise TransientError(f"{self._provider.host} ended the stream before the turn")
                except TransientError as error:
                    turn = self._new_turn(think)
                    failures += 1
                    pause_s = self._pause(error, failures)
                    if error.status == 429:
                        self._limiter.throttle(pause_s)  # all sessions of the key, this one too, then wait
                    yield Retried(failures, error.reason, pause_s)
                    if error.status != 429:
                        await anyio.sleep(pause_s)
            left_early = False
        finally:
            if left_early or repeated:
                self._end_early(turn)
        if turn.finished is None:
            yield Generated(self.messages[-1], "repetition")  # type: ignore[arg-type]
            return
        message, events = turn.end()
        self.messages.append(message)
        self.turns += 1
        self._count(turn.finished)
        for event in events:
            yield event
        reason: StopReason = turn.finished.end
        yield Generated(message, reason)

    def _new_turn(self, think: bool) -> RemoteTurn:
        return RemoteTurn(self.turns, think=think, tools=self._tools, names=self._names, taken_ids=self._call_ids)

    def _pause(self, error: TransientError, failures: int) -> float:
        """Return the seconds to wait before the next attempt. Raises ApiError if there is none."""
        pause_s = wait_s(failures, error.retry_after_s)
        if pause_s is None:
            raise ApiError(
                f"{error.reason}; it asks to wait {error.retry_after_s:,.0f} s, more than {MAX_WAIT_S:g} s: try again "
                "later",
                status=error.status,
            ) from error
        if failures > self._max_retries:
            first = "check the base URL, and that its server runs, or " if error.status is None else ""
            text = f"{error.reason}, in {failures} attempts: {first}try again later"
            raise ApiError(text, status=error.status) from error
        return pause_s

    def _end_early(self, turn: RemoteTurn) -> None:
        """Keep the output of a turn that was stopped. The API reports no token counts for such a turn, so its chunks
        are counted, and its cost is estimated from them and from the length of the conversation."""
        message = turn.stopped()
        if message is None:
            return
        self.messages.append(message)
        self.turns += 1
        self.usage = replace(
            self.usage,
            sampled_tokens=self.usage.sampled_tokens + turn.chunks,
            cost_usd=self._cost_with(TokenCounts(self._estimated_length(), output_tokens=turn.chunks)),
            turns=self.usage.turns + 1,
        )

    def _cost_with(self, tokens: TokenCounts) -> float | None:
        """Return the cost including one more request; None if the API did not report the length of the prompt."""
        if self._price is None or not tokens.input_tokens:
            return None
        return total_cost([self.usage.cost_usd, self._price.request_cost(tokens, at=self._sent)])

    def _estimated_length(self) -> int:
        """Return an estimate of the conversation's tokens: one for 4 characters, but at least the API's last count."""
        letters = sum(len(message.content) for message in self.messages)
        letters += sum(len(spec.description) + len(str(spec.parameters)) for spec in self._specs)
        return max(self._length, letters // 4)

    def _count(self, finished: StreamFinished) -> None:
        """Add the usage and the token ids of a complete turn."""
        counts, usage = finished.usage, self.usage
        self.usage = Usage(
            prompt_tokens=usage.prompt_tokens + counts.input_tokens,
            cache_hit_tokens=usage.cache_hit_tokens + counts.cache_hit_tokens,
            cache_miss_tokens=usage.cache_miss_tokens + counts.input_tokens - counts.cache_hit_tokens,
            cache_write_tokens=usage.cache_write_tokens + counts.cache_write_tokens,
            sampled_tokens=usage.sampled_tokens + counts.output_tokens,
            thinking_tokens=usage.thinking_tokens + counts.reasoning_tokens,
            cost_usd=self._cost_with(counts),
            turns=usage.turns + 1,
        )
        self._length = counts.input_tokens + counts.output_tokens
        if finished.token_ids is not None:
            self._record_ids(finished.token_ids)

    def _record_ids(self, ids: TokenIds) -> None:
        """Record the ids of a turn. Of its prompt, record only new ids, unless the server rendered it differently."""
        if not (ids.prompt and ids.sampled):
            return
        known = len(self._ids)
        continues = list(ids.prompt[:known]) == self._ids
        new = ids.prompt[known:] if continues else ids.prompt
        logprobs = ids.logprobs if len(ids.logprobs) == len(ids.sampled) else ()
        self.segments.append(TokenSegment("prompt", new, restart=not continues))
        self.segments.append(TokenSegment("sampled", ids.sampled, logprobs))
        self._ids = [*ids.prompt, *ids.sampled]
