"""Sampling: adjust the logits, then draw one token as a function of seed and position only.

The draw is counter-based: the uniform number for the token at position `p` is a hash of `(seed, p)`. There is no
generator state, so the result does not depend on how sessions interleave or how `generate` calls are split.

Dimension key: V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agentkit_engine.errors import NonFiniteLogitsError
from agentkit_engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token that was sampled, or forced by a grammar.

    Attributes:
        id: the token id, which is also the last entry of the session's `token_ids`.
        logprob: log-softmax of the raw float32 logits at `id`, before temperature, penalties and grammar: the model's
            own probability, reproducible from the ids alone. NaN if forced.
        top: the `top_logprobs` most likely ids, each with its log-probability.
        text: the text to display for this token, see `Reader`: whole characters only. Text that may become a stop text
            comes with a later token, or never. Always empty if the model has no tokenizer.
        forced: True if the grammar allowed no other id; the token was appended without sampling and does not count
            towards `max_tokens`.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""
    forced: bool = False


Past = Callable[[], tuple[Sequence[int], Sequence[int]]]
"""Returns all ids of a session, and those of them that were sampled."""


def fresh_seed() -> int:
    """Return a seed from the operating system, for a generation without a seed."""
    return secrets.randbits(63)


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that decides the token at `position`: 53 bits of blake2b("seed:position")."""
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
    """Sample the token at `position` from `logits_V` (float32, any device) by inverting the cumulative distribution.

    When `top_k`, `top_p` or `min_p` drop ids, the rest are ordered by decreasing probability (ties by increasing id);
    otherwise by id. Sums are float64, because float32 rounding over a large vocabulary would bias the draw. `mask_V`
    (float32) is 0 for allowed ids and -inf for all others.

    Raises:
        NonFiniteLogitsError: the logits contain NaN or infinity.
        ValueError: `logit_bias` names an id outside the vocabulary, or forbids every id that the mask allows.
    """
    logits_V = logits_V.detach().to("cpu", torch.float32)
    if not np.isfinite(logits_V.numpy()).all():  # for this, numpy's reductions are ten times as fast as torch's
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
    """Return the logits with penalties, biases and the mask applied."""
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
    """Return the first id at which the cumulative probability of the kept ids exceeds `u` times their total."""
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
