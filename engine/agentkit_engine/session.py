"""A session: an append-only list of token ids, and the state computed from them.

The state may lag behind: the next step computes appended ids and the id sampled last. It may also be dropped, when
memory is short or after a failed step, without changing the session.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from agentkit_engine.errors import (
    ContextLengthError,
    SessionClosedError,
    SessionEmptyError,
    TokenIdError,
)
from agentkit_engine.generation import Generation, next_tokens
from agentkit_engine.ids import Ids
from agentkit_engine.reading import Reader
from agentkit_engine.runtime import PromptUsage, Request, Scheduler
from agentkit_engine.sampler import SampledToken
from agentkit_engine.sampling_params import SamplingParams
from agentkit_engine.spec import ModelSpec

if TYPE_CHECKING:
    from agentkit_engine.engine import Engine
    from agentkit_engine.grammar import Grammar


def check_ids(token_ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return the ids as a list of int.

    Raises:
        TypeError: an id is not a whole number.
        TokenIdError: an id is not in `range(vocab_size)`.
    """
    if isinstance(token_ids, str | bytes):
        raise TypeError(f"token ids must be whole numbers, got text: {token_ids[:40]!r}; encode it with a tokenizer")
    ids = list(token_ids)
    if set(map(type, ids)) - {int}:  # integers of other libraries are accepted; fractions and bools are not
        for token_id in ids:
            if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
                raise TypeError(f"token ids must be whole numbers, got {token_id!r}")
        ids = [operator.index(token_id) for token_id in ids]
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise TokenIdError(f"token id {token_id} (at index {index}) is outside the vocabulary 0..{vocab_size - 1}")
    return ids


def check_whole(name: str, value: int) -> int:
    """Return the number.

    Raises:
        TypeError: it is not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return value


class SessionBase:
    """The append-only ids of a session and the checks on them; the base of `Session` and `AsyncSession`."""

    def __init__(self, spec: ModelSpec, request: Request, ids: Ids) -> None:
        self._spec, self._request, self._ids = spec, request, ids
        self._closed = False

    @property
    def token_ids(self) -> Sequence[int]:
        """All ids, prompt and sampled, as a tuple."""
        return tuple(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def usage(self) -> PromptUsage:
        """Prompt tokens found in the prefix cache, and prompt tokens computed."""
        return self._request.usage

    def _check_new(self, token_ids: Iterable[int]) -> list[int]:
        """Return the ids as a list of int, checked to fit into this session."""
        self._check_open()
        ids = check_ids(token_ids, self._spec.vocab_size)
        self._check_room(len(ids))
        return ids

    def _check_can_generate(self) -> None:
        self._check_open()
        if not self._ids:
            raise SessionEmptyError("the session is empty: append at least one id (the BOS id, say) before generate()")
        self._check_room(1)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("the session is closed; open a new one with engine.session()")

    def _check_forks(self, n: int) -> None:
        self._check_open()
        if check_whole("n of fork(n)", n) < 0:
            raise ValueError(f"fork(n) takes at least 0, got {n}")

    def _check_room(self, count: int) -> None:
        limit = self._spec.max_position_embeddings
        if len(self._ids) + count > limit:
            raise ContextLengthError(
                f"{len(self._ids)} ids in the session and {count} more exceed the model's {limit} positions"
            )


class Session(SessionBase):
    """One conversation with a model; made by `Engine.session()`, freed by `close()` or `with`.

    A session belongs to one thread and has forwards of its own. `AsyncEngine.session()` makes sessions that share
    forwards.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        super().__init__(engine.spec, request, request.ids)
        self._engine = engine

    @property
    def _scheduler(self) -> Scheduler:
        return self._engine.scheduler

    def append(self, token_ids: Iterable[int]) -> None:
        """Add ids to the end; the next `generate` computes them. Either all are added or none.

        Raises:
            TokenIdError: an id is outside the vocabulary.
            ContextLengthError: the ids would exceed the model's positions.
            SessionClosedError: the session was closed.
        """
        self._request.extend(self._check_new(token_ids))

    def generate(
        self, params: SamplingParams | None = None, *, grammar: Grammar | None = None
    ) -> Iterator[SampledToken]:
        """Generate tokens one at a time, until a stop id or text, `max_tokens`, or until the caller stops iterating.

        With `grammar`, one of `Engine.grammars`, ids that it forbids are left out, last of all changes to the logits.

        Each id is in `token_ids` when it is yielded. Ids may be appended between two tokens.

        Raises:
            SessionEmptyError: nothing was appended yet.
            ContextLengthError: the last position is taken and neither a stop id nor `max_tokens` came first.
            NonFiniteLogitsError: the model computed NaN or infinity.
            GrammarError: ids do not fit `grammar`, or there is no assistant turn that it could constrain.
            OutOfMemoryError: the session does not fit into the engine's memory.
            SessionClosedError: the session was closed.
            TokenizerMissingError: stop texts need a tokenizer, and the model has none.
        """
        self._check_can_generate()
        generation = Generation(self._request, params or SamplingParams(), grammar)
        return self._generate(generation, self._engine.reader(generation.params))

    def checkpoint(self) -> None:
        """Keep the state at this length, once it is computed, for other sessions with the same prefix.

        Ends of prompts and closed sessions are kept automatically. Call this for a prefix that many sessions
        share, such as an agent's system prompt and tools.
        """
        self._check_open()
        self._scheduler.mark(self._request)

    def fork(self, n: int = 1) -> list[Session]:
        """Return `n` independent sessions that continue from here and share the state so far.

        Pending ids are computed first, once for all forks.

        Raises:
            OutOfMemoryError: the session does not fit into the engine's memory.
            SessionClosedError: the session was closed.
        """
        self._check_forks(n)
        self._scheduler.resume(self._request)
        while self._request.pending:
            self._scheduler.step([self._request])
        return [Session(self._engine, self._scheduler.fork(self._request)) for _ in range(n)]

    def park(self) -> None:
        """Let the engine evict this session first, for example while a tool runs.

        The session continues where it stopped; evicted state is computed again.
        """
        self._check_open()
        self._scheduler.park(self._request)

    def save(self, path: str | Path) -> None:
        """Write the session to a file. `Engine.open` continues from it without recomputation.

        Raises:
            SessionClosedError: the session was closed.
            OSError: the file cannot be written.
        """
        self._check_open()
        self._scheduler.save(self._request, Path(path), model=self._engine.fingerprint)

    def close(self) -> None:
        """Free the state. The ids stay readable; every other use raises from now on. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._scheduler.close(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _generate(self, generation: Generation, reader: Reader) -> Iterator[SampledToken]:
        while generation.left and not reader.stopped:
            self._check_can_generate()
            while not (outcomes := next_tokens([generation], self._scheduler)):
                self._scheduler.step([self._request])
            [(_, outcome)] = outcomes
            if isinstance(outcome, BaseException):
                raise outcome
            assert outcome is not None
            yield reader.read(outcome, last=generation.ended)
