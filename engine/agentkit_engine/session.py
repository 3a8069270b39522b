"""A session: an append-only list of token ids and the KV cache that belongs to it.

The cache is derived from the ids. It may lag behind (appended ids, and the id sampled last, are computed by the next
step) and it may be thrown away (after a step that failed) without changing what the session means.

Dimension key: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from agentkit_engine.errors import ContextLengthError, SessionClosedError, SessionEmptyError, TokenIdError
from agentkit_engine.model.cache import Cache
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.sampler import SampledToken, SamplingParams, fresh_seed, sample

PREFILL_CHUNK = 512
"""Most ids one step computes: what another session of the same engine may have to wait for."""


def check_ids(token_ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as a list of int.

    Raises:
        TokenIdError: an id is not in `range(vocab_size)`.
    """
    ids = [int(token_id) for token_id in token_ids]
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise TokenIdError(f"token id {token_id} (at index {index}) is outside the vocabulary 0..{vocab_size - 1}")
    return ids


class Session:
    """One conversation with a model; made by `Engine.session()`, freed by `close()` or `with`.

    A session belongs to one thread at a time. `AsyncSession` is the same thing for async code.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._cache: Cache | None = None
        self._cached = 0  # how many of the ids are in the cache
        self._logits_V: Tensor | None = None  # after the last id, once all ids are in the cache
        self._closed = False

    @property
    def token_ids(self) -> Sequence[int]:
        """Every id so far, prompt and sampled alike, as a tuple: byte for byte what the model saw and said."""
        return tuple(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, token_ids: Iterable[int]) -> None:
        """Add ids to the end; the next `generate` computes them. Either all are added or none.

        Raises:
            TokenIdError: an id is outside the vocabulary.
            ContextLengthError: the model has fewer positions than ids there would be.
            SessionClosedError: the session was closed.
        """
        self._check_open()
        ids = check_ids(token_ids, self._decoder.spec.vocab_size)
        self._check_room(len(ids))
        self._ids += ids

    def generate(self, params: SamplingParams | None = None) -> Iterator[SampledToken]:
        """Sample on, one token at a time, until a stop id, `max_tokens`, or the caller stops asking.

        Each id is in `token_ids` when it is yielded. Ids appended between two tokens are taken up by the next one.

        Raises:
            SessionEmptyError: nothing was appended yet.
            ContextLengthError: the last position is taken and neither a stop id nor `max_tokens` came first.
            NonFiniteLogitsError: the model computed NaN or infinity.
            SessionClosedError: the session was closed.
        """
        self.check_can_generate()
        return self._generate(params or SamplingParams())

    def close(self) -> None:
        """Free the cache. The ids stay readable; everything else is an error from here on. Closing twice is fine."""
        self._closed = True
        self._drop_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # The three parts of one generated token. `AsyncEngine` runs the first on the model thread and the second where
    # the consumer lives, so that a cancelled consumer leaves no id behind that it has not seen.

    def check_can_generate(self) -> None:
        """Raise what `generate` would: SessionClosedError, SessionEmptyError or ContextLengthError."""
        self._check_open()
        if not self._ids:
            raise SessionEmptyError("the session is empty: append at least one id (the BOS id, say) before generate()")
        self._check_room(1)

    def step(self, params: SamplingParams, seed: int) -> SampledToken | None:
        """Compute at most `PREFILL_CHUNK` ids; when all are in the cache, choose the next token without adding it.

        `None` means that more steps are needed first. A step that raises drops the cache: the ids are as before and
        the next step starts over from them.
        """
        self.check_can_generate()
        try:
            if self._logits_V is None or self._cached < len(self._ids):
                self._forward(self._ids[self._cached : self._cached + PREFILL_CHUNK])
            if self._cached < len(self._ids):
                return None
            assert self._logits_V is not None
            return sample(self._logits_V, params, seed=seed, position=len(self._ids))
        except BaseException:
            self._drop_cache()
            raise

    def commit(self, token: SampledToken) -> None:
        """Make the chosen token the last id."""
        self._ids.append(token.id)

    def _generate(self, params: SamplingParams) -> Iterator[SampledToken]:
        seed = fresh_seed() if params.seed is None else params.seed
        count = 0
        while True:
            while (token := self.step(params, seed)) is None:
                pass
            self.commit(token)
            yield token
            count += 1
            if token.id in params.stop_ids or count == params.max_tokens:
                return

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> None:
        if self._cache is None:
            self._cache = self._decoder.new_cache()
        device = next(self._decoder.parameters()).device
        logits_BTV = self._decoder(torch.tensor([ids], device=device), self._cache, last_only=True)
        self._cached += len(ids)
        self._logits_V = logits_BTV[0, -1]

    def _drop_cache(self) -> None:
        self._cache = None
        self._cached = 0
        self._logits_V = None

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("the session is closed; open a new one with engine.session()")

    def _check_room(self, count: int) -> None:
        limit = self._decoder.spec.max_position_embeddings
        if len(self._ids) + count > limit:
            raise ContextLengthError(
                f"{len(self._ids)} ids in the session and {count} more exceed the model's {limit} positions"
            )
