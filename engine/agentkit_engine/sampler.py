"""From logits to one sampled token: what changes the odds, and a draw that depends on nothing but seed and position.

The draw is counter-based: the uniform number used for the token at position `p` is a hash of `(seed, p)`. There is
no generator state, so a result cannot depend on how sessions interleave or on how `generate` calls are split.

Dimension key: V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agentkit_engine.errors import NonFiniteLogitsError

if TYPE_CHECKING:
    from agentkit_engine.grammar import Grammar


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are chosen and when to stop. The defaults are those of the V4 model card.

    Penalties and biases change the logits first, then the temperature divides them, then `top_k`, `top_p` and `min_p`
    each leave out ids, in this order, as in vLLM.

    Attributes:
        temperature: divides the logits; 0 is greedy (the lowest id among equal maxima), which leaves out no more.
        top_p: sample among the fewest most likely ids whose probability reaches this mass.
        top_k: sample among the this many most likely ids; `None` for all.
        min_p: sample among the ids at least this fraction as likely as the most likely one.
        repetition_penalty: above 1, ids that occurred, fed or sampled, become less likely: a positive logit is
            divided by it, a negative one multiplied (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: taken from the logit of each id that was sampled.
        frequency_penalty: taken from the logit of each id once for each time that it was sampled.
        logit_bias: added to the logits of these ids; `-inf` forbids one.
        seed: the same seed on the same ids gives the same tokens; `None` draws a fresh one for each `generate` call.
        max_tokens: stop after this many sampled ids; `None` goes on until a stop id or the end of the context.
        stop_ids: sampling one of these ends the generation; the id itself is yielded and kept in the session.
        stop: texts; the token that completes one in what was sampled ends the generation and is kept in the session. In
            the text of the tokens neither it nor what follows it is shown.
        top_logprobs: tell this many most likely ids with each token.
        grammar: leaves out the ids that it forbids, last of all changes to the logits; of `Engine.grammars`.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "a finite number >= 0", self.temperature >= 0)
        _check("top_p", self.top_p, "in (0, 1]", 0 < self.top_p <= 1)
        _check("min_p", self.min_p, "in [0, 1]", 0 <= self.min_p <= 1)
        _check("repetition_penalty", self.repetition_penalty, "a finite number > 0", self.repetition_penalty > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), "a finite number", True)
        for name in ("top_k", "max_tokens"):
            number = 1 if getattr(self, name) is None else getattr(self, name)
            _check(name, number, "at least 1 or None", number >= 1)
        _check("top_logprobs", self.top_logprobs, "at least 0", self.top_logprobs >= 0)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a tuple of texts that are not empty, got {self.stop!r}")
        for token_id, bias in self.logit_bias.items():
            if token_id < 0 or math.isnan(bias) or bias == math.inf:
                raise ValueError(f"logit_bias must map ids >= 0 to numbers below infinity, got {token_id}: {bias}")

    @property
    def needs_past(self) -> bool:
        """Whether the logits depend on which ids came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _check(name: str, value: float, expected: str, fine: bool) -> None:
    if not (math.isfinite(value) and fine):
        raise ValueError(f"{name} must be {expected}, got {value}")


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token the model chose, or that a grammar chose for it.

    Attributes:
        id: the token id, already the last entry of the session's `token_ids`.
        logprob: log-softmax of the raw float32 logits at `id`, whatever temperature, penalties and grammar were in
            force: it is the model's own probability, and anyone can recompute it from the ids alone. NaN when forced.
        top: the `top_logprobs` most likely ids, each with its log-probability.
        text: what the token adds to the text that may be shown, see `Reader`: whole characters only, and what may turn
            out to be a stop text comes later or never. Always empty when the model has no tokenizer.
        forced: the grammar allowed no other id, so it was appended unseen; it does not count for `max_tokens`.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""
    forced: bool = False


Past = Callable[[], tuple[Sequence[int], Sequence[int]]]
"""Gives the ids of a session so far, and those of them that were sampled."""


def fresh_seed() -> int:
    """A seed from the operating system, for a generation whose caller gave none."""
    return secrets.randbits(63)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at `position`: the first 53 bits of blake2b("seed:position")."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def sample(
    logits_V: Tensor,
    params: SamplingParams,
    *,
    seed: int,
    position: int,
    past: Past = lambda: ((), ()),
    mask_V: Tensor | None = None,
) -> SampledToken:
    """Choose the token at `position` from `logits_V` (float32, any device) by inverting the cumulative distribution.

    Ids are ordered by decreasing probability (equal ones by increasing id) when some are left out, by id otherwise.
    The sums run in float64, so that a large vocabulary's rounding favours no id. `mask_V` (float32) is 0 for the ids
    that may be chosen and -inf for all others.

    Raises:
        NonFiniteLogitsError: the logits hold NaN or infinity.
        ValueError: `logit_bias` names an id that the vocabulary lacks, or forbids every id that the mask leaves.
    """
    logits_V = logits_V.detach().to("cpu", torch.float32)
    if not np.isfinite(logits_V.numpy()).all():  # numpy's reductions are ten times as fast as torch's here
        raise NonFiniteLogitsError(f"the logits for position {position} hold NaN or infinity; check weights and dtype")
    changed_V = _change(logits_V, params, past, mask_V)
    if params.temperature == 0:
        token_id = int(changed_V.numpy().argmax())
    else:
        token_id = _invert(changed_V, params, uniform(seed, position))
    logprobs_V = torch.log_softmax(logits_V, dim=0)
    top: tuple[tuple[int, float], ...] = ()
    if params.top_logprobs:
        values, ids = logprobs_V.sort(descending=True, stable=True)
        top = tuple(zip(ids[: params.top_logprobs].tolist(), values[: params.top_logprobs].tolist(), strict=True))
    return SampledToken(token_id, float(logprobs_V[token_id]), top)


def _change(logits_V: Tensor, params: SamplingParams, past: Past, mask_V: Tensor | None) -> Tensor:
    """The logits after penalties, biases and the mask."""
    if not params.needs_past and not params.logit_bias:
        return logits_V if mask_V is None else logits_V + mask_V
    changed_V = logits_V.clone()
    if params.needs_past:
        every, sampled = past()
        seen = torch.tensor(sorted(set(every)), dtype=torch.int64)
        old = changed_V[seen]
        changed_V[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        counts_V = torch.bincount(torch.tensor(sampled, dtype=torch.int64), minlength=len(logits_V)).float()
        changed_V -= params.frequency_penalty * counts_V + params.presence_penalty * (counts_V > 0)
    for token_id, bias in params.logit_bias.items():
        if token_id >= len(logits_V):
            raise ValueError(f"logit_bias names id {token_id}, outside the vocabulary 0..{len(logits_V) - 1}")
        changed_V[token_id] += bias
    if mask_V is not None:
        changed_V += mask_V
    if not bool((changed_V > -math.inf).any()):
        left = "of the vocabulary" if mask_V is None else "that the grammar allows"
        raise ValueError(f"logit_bias forbids every id {left}")
    return changed_V


def _invert(logits_V: Tensor, params: SamplingParams, u: float) -> int:
    """The first id at which the cumulative probability of the kept ids exceeds `u` of their total."""
    weights_V = torch.softmax((logits_V.double() - logits_V.max()) / params.temperature, dim=0)
    if (params.top_k, params.top_p, params.min_p) == (None, 1, 0):
        return _first_above(weights_V.cumsum(0), u)
    weights_V, ids_V = weights_V.sort(descending=True, stable=True)
    weights_V = weights_V[: params.top_k]
    cumulative_V = weights_V.cumsum(0)
    kept = int((cumulative_V < params.top_p * cumulative_V[-1]).sum()) + 1
    kept = min(kept, int((weights_V >= params.min_p * weights_V[0]).sum()))
    return int(ids_V[_first_above(cumulative_V[:kept], u)])


def _first_above(cumulative: Tensor, u: float) -> int:
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return min(index, len(cumulative) - 1)
