"""From logits to one sampled token: what changes the odds, and a draw that depends on nothing but seed and position.

The draw is counter-based: the uniform number used for the token at position `p` is a hash of `(seed, p)`. There is
no generator state, so a result cannot depend on how sessions interleave or on how `generate` calls are split.

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
