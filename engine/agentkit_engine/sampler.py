"""From logits to one sampled token: temperature, top-p, and a draw that depends on nothing but seed and position.

The draw is counter-based: the uniform number used for the token at position `p` is a hash of `(seed, p)`. There is
no generator state, so a result cannot depend on how sessions interleave or on how `generate` calls are split.

Dimension key: V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agentkit_engine.errors import NonFiniteLogitsError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are chosen and when to stop. The defaults are those of the V4 model card.

    Attributes:
        temperature: divides the logits; 0 is greedy (the lowest id among equal maxima), which ignores `top_p`.
        top_p: sample among the fewest most likely ids whose probability (after temperature) reaches this mass.
        seed: the same seed on the same ids gives the same tokens; `None` draws a fresh one for each `generate` call.
        max_tokens: stop after this many sampled ids; `None` goes on until a stop id or the end of the context.
        stop_ids: sampling one of these ends the generation; the id itself is yielded and kept in the session.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_ids: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {self.max_tokens}")


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token the model chose.

    Attributes:
        id: the token id, already the last entry of the session's `token_ids`.
        logprob: log-softmax of the raw float32 logits at `id`, whatever temperature and top-p were in force: it is
            the model's own probability, and anyone can recompute it from the ids alone.
    """

    id: int
    logprob: float


def fresh_seed() -> int:
    """A seed from the operating system, for a generation whose caller gave none."""
    return secrets.randbits(63)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at `position`: the first 53 bits of blake2b("seed:position")."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def sample(logits_V: Tensor, params: SamplingParams, *, seed: int, position: int) -> SampledToken:
    """Choose the token at `position` from `logits_V` (float32, any device) by inverting the cumulative distribution.

    Ids are ordered by decreasing probability (equal ones by increasing id) when `top_p` < 1, by id otherwise. The
    sums run in float64, so that a large vocabulary's rounding favours no id.

    Raises:
        NonFiniteLogitsError: the logits hold NaN or infinity.
    """
    logits_V = logits_V.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(logits_V).all()):
        raise NonFiniteLogitsError(f"the logits for position {position} hold NaN or infinity; check weights and dtype")
    token_id = (
        int(logits_V.argmax())
        if params.temperature == 0
        else _invert(logits_V, params.temperature, params.top_p, uniform(seed, position))
    )
    return SampledToken(token_id, float(torch.log_softmax(logits_V, dim=0)[token_id]))


def _invert(logits_V: Tensor, temperature: float, top_p: float, u: float) -> int:
    """The first id at which the cumulative probability of the kept ids exceeds `u` of their total."""
    weights_V = torch.softmax((logits_V.double() - logits_V.max()) / temperature, dim=0)
    if top_p == 1:
        return _first_above(weights_V.cumsum(0), u)
    weights_V, ids_V = weights_V.sort(descending=True, stable=True)
    cumulative_V = weights_V.cumsum(0)
    kept = min(int((cumulative_V < top_p).sum()) + 1, len(ids_V))
    return int(ids_V[_first_above(cumulative_V[:kept], u)])


def _first_above(cumulative: Tensor, u: float) -> int:
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return min(index, len(cumulative) - 1)
