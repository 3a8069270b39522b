"""Sampling: adjust the logits, then draw one token as a function of seed and position only.

The draw is counter-based: the uniform number for the token at position `p` is a hash of `(seed, p)`. There is no
generator state, so the result does not depend on how sessions interleave or how `generate` calls are split.

On a GPU one kernel samples all rows (`DeviceSampler`). Rows with penalties, biases, filters or `top_logprobs` are
sampled by torch's operations beside it. Nothing waits for the device but one copy of all results at the end.

Dimension key: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentkit_engine.errors import NonFiniteLogitsError
from agentkit_engine.sampling_params import SamplingParams
from agentkit_kernels.reference.sampler import Sampled

CACHED_LOGITS = 1 << 16
"""Logits sampled at once on a CPU, so that intermediate results stay in its cache."""


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


DeviceSampler = Callable[[Tensor, Tensor, Tensor, Tensor | None], Sampled]
"""Samples logits [B, V], given temperatures and uniform numbers, float64 [B], and packed masks, int32
[B, ceil(V / 32)]; see `agentkit_kernels.reference.sampler.sample`."""
Past = Callable[[], tuple[Sequence[int], Sequence[int]]]
"""Returns all ids of a session, and those of them that were sampled."""


@dataclass(frozen=True, slots=True)
class Draw:
    """The parameters for sampling from one row of logits.

    Attributes:
        position: the position of the token to sample.
        past: called only if `params` has penalties.
        mask_V: added to the logits after all other changes, float32: 0 for allowed ids and -inf for all others.
        bitmask: for a `DeviceSampler`, the same mask packed, uint8 [4 * ceil(V / 32)]: bit v mod 8 of byte v // 8 is 1
            if id v is allowed.
    """

    params: SamplingParams
    seed: int
    position: int
    past: Past = lambda: ((), ())
    mask_V: Tensor | None = None
    bitmask: NDArray[np.uint8] | None = None

    @property
    def plain(self) -> bool:
        """True if a `DeviceSampler` samples the row: temperature and mask are all that the logits need."""
        params = self.params
        filtered = params.temperature and params.filters
        return not (filtered or params.needs_past or params.logit_bias or params.top_logprobs)


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that decides the token at `position`: 53 bits of blake2b("seed:position")."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def sample(
    logits_BV: Tensor, draws: Sequence[Draw], on_device: DeviceSampler | None = None
) -> list[SampledToken | Exception]:
    """Sample a token from each row of `logits_BV` (any device) by inverting the row's cumulative distribution.

    The token of a row has the same bits in any batch. When `top_k`, `top_p` or `min_p` drop ids, the rest are ordered
    by decreasing probability (ties by increasing id); otherwise by id. Sums are float64, because float32 rounding over
    a large vocabulary would bias the draw.

    Args:
        logits_BV: [B, V].
        draws: How to sample each row.
        on_device: Samples plain rows, and all results come to the host in one copy. Masks are then `Draw.bitmask`, else
            `Draw.mask_V`. Both ways choose the same ids, but for a draw within about 1e-13 of a boundary.

    Returns:
        For each row its token, or what is wrong with it: a `NonFiniteLogitsError` if it contains NaN or infinity, a
        `ValueError` if `logit_bias` names an id outside the vocabulary or forbids every id that the mask allows.
    """
    logits_BV = logits_BV.detach()
    if on_device is not None:
        return _sample_on_device(logits_BV, draws, on_device)
    size = len(draws) if logits_BV.device.type != "cpu" else max(1, CACHED_LOGITS // logits_BV.shape[1])
    if len(draws) > size:
        starts = range(0, len(draws), size)
        return [token for at in starts for token in sample(logits_BV[at : at + size], draws[at : at + size])]
    logits_BV = logits_BV.float()
    logprobs_BV = torch.log_softmax(logits_BV, dim=1)
    changed_BV, errors = _change(logits_BV, draws)
    ids_B1 = _choose(changed_BV, draws)
    chosen = ids_B1.tolist(), logprobs_BV.gather(1, ids_B1).tolist(), logprobs_BV.amin(1).tolist()
    allowed = [True] * len(draws)
    if any(draw.params.logit_bias for draw in draws):
        allowed = (changed_BV.amax(1) > -math.inf).tolist()
    tokens: list[SampledToken | Exception] = []
    for row, (draw, (token_id,), (logprob,), least) in enumerate(zip(draws, *chosen, strict=True)):
        top = _likeliest(logprobs_BV[row], draw.params.top_logprobs)
        # the minimum shows NaN and either infinity of the logits
        finite = math.isfinite(least)
        tokens.append(_token(draw, token_id, logprob, finite, allowed[row], errors.get(row), top))
    return tokens


def _sample_on_device(
    logits_BV: Tensor, draws: Sequence[Draw], on_device: DeviceSampler
) -> list[SampledToken | Exception]:
    device, words_BW = logits_BV.device, _words(logits_BV, draws)
    numbers = [[draw.params.temperature for draw in draws], [uniform(draw.seed, draw.position) for draw in draws]]
    temperatures_B, uniforms_B = _to(device, torch.tensor(numbers, dtype=torch.float64))
    sampled = on_device(logits_BV, temperatures_B, uniforms_B, words_BW)
    # id, log-probability, whether all logits are finite, whether an id is allowed, and the likeliest ids with theirs
    most = min(max(draw.params.top_logprobs for draw in draws), logits_BV.shape[1])
    results_BC = torch.zeros(len(draws), 4 + 2 * most, dtype=torch.float64, device=device)
    results_BC[:, :4] = torch.stack((*(part.double() for part in sampled), (sampled.ids >= 0).double()), 1)
    others = [row for row, draw in enumerate(draws) if not draw.plain]
    errors: dict[int, ValueError] = {}
    if others:
        at_R, some = _to(device, torch.tensor(others)), [draws[row] for row in others]
        logits_RV = logits_BV[at_R].float()
        changed_RV, errors_R = _change(logits_RV, some, None if words_BW is None else words_BW[at_R])
        errors = {others[row]: error for row, error in errors_R.items()}
        results_BC[at_R] = _by_torch(logits_RV, changed_RV, some, most)
    tokens: list[SampledToken | Exception] = []
    for row, (draw, values) in enumerate(zip(draws, _read(results_BC), strict=True)):
        token_id, logprob, finite, allowed, *likeliest = values
        top = tuple(zip(map(int, likeliest[0::2]), likeliest[1::2], strict=True))[: draw.params.top_logprobs]
        tokens.append(_token(draw, int(token_id), logprob, bool(finite), bool(allowed), errors.get(row), top))
    return tokens


def _by_torch(logits_RV: Tensor, changed_RV: Tensor, draws: Sequence[Draw], most: int) -> Tensor:
    """Return a row of results for each draw; see `_sample_on_device`."""
    logprobs_RV = torch.log_softmax(logits_RV, dim=1)
    ids_R1 = _choose(changed_RV, draws)
    finite_R1, allowed_R1 = logprobs_RV.amin(1, keepdim=True).isfinite(), changed_RV.amax(1, keepdim=True) > -math.inf
    results = [ids_R1, logprobs_RV.gather(1, ids_R1), finite_R1, allowed_R1]
    if most:
        values_RV, ids_RV = logprobs_RV.sort(dim=1, descending=True, stable=True)
        results.append(torch.stack((ids_RV[:, :most].double(), values_RV[:, :most].double()), 2).flatten(1))
    return torch.cat([result.double() for result in results], 1)


def _token(
    draw: Draw,
    token_id: int,
    logprob: float,
    finite: bool,
    allowed: bool,
    error: ValueError | None,
    top: tuple[tuple[int, float], ...],
) -> SampledToken | Exception:
    if not finite:
        problem = f"the logits for position {draw.position} hold NaN or infinity; check weights and dtype"
        return NonFiniteLogitsError(problem)
    if error is None and not allowed:
        left = "of the vocabulary" if draw.mask_V is None and draw.bitmask is None else "that the grammar allows"
        error = ValueError(f"logit_bias forbids every id {left}")
    return SampledToken(token_id, logprob, top) if error is None else error


def _read(results_BC: Tensor) -> list[list[float]]:
    """Copy the results to the host: the only wait for the device between a step's plan and its ids."""
    rows: list[list[float]] = results_BC.tolist()
    return rows


def _to(device: torch.device, values: Tensor) -> Tensor:
    """Copy to a device without waiting for it."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def _words(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor | None:
    """Return the packed masks, int32 [B, ceil(V / 32)]; None if no draw has one."""
    if all(draw.bitmask is None for draw in draws):
        return None
    words_BW = np.full((len(draws), -(-logits_BV.shape[1] // 32)), -1, np.int32)
    for row, draw in enumerate(draws):
        if draw.bitmask is not None:
            words_BW[row] = draw.bitmask.view(np.int32)
    return _to(logits_BV.device, torch.from_numpy(words_BW))


def _change(
    logits_BV: Tensor, draws: Sequence[Draw], words_BW: Tensor | None = None
) -> tuple[Tensor, dict[int, ValueError]]:
    """Return the logits with penalties, biases and masks applied, and the error of each row that has one."""
    changed = [row for row, draw in enumerate(draws) if draw.params.needs_past or draw.params.logit_bias]
    errors: dict[int, ValueError] = {}
    if changed:
        logits_BV = logits_BV.clone()
    for row in changed:
        try:
            _penalise(logits_BV[row], draws[row])
        except ValueError as error:
            errors[row] = error
    if words_BW is not None:
        bit = torch.arange(32, dtype=torch.int32, device=logits_BV.device)
        allowed_BV = ((words_BW.unsqueeze(2) >> bit) & 1).flatten(1)[:, : logits_BV.shape[1]]
        logits_BV = logits_BV.masked_fill(allowed_BV == 0, -math.inf)
    elif any(draw.mask_V is not None for draw in draws):
        free_V = torch.zeros(logits_BV.shape[1])
        masks_BV = torch.stack([free_V if draw.mask_V is None else draw.mask_V for draw in draws])
        logits_BV = logits_BV + masks_BV.to(logits_BV.device)
    return logits_BV, errors


def _penalise(logits_V: Tensor, draw: Draw) -> None:
    """Apply penalties and biases in place."""
    params, device = draw.params, logits_V.device
    if params.needs_past:
        every, sampled = draw.past()
        seen = _to(device, torch.tensor(sorted(set(every)), dtype=torch.int64))
        old = logits_V[seen]
        logits_V[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        counts = torch.bincount(torch.tensor(sampled, dtype=torch.int64), minlength=len(logits_V))
        counts_V = _to(device, counts.float())
        logits_V -= params.frequency_penalty * counts_V + params.presence_penalty * (counts_V > 0)
    for token_id, bias in params.logit_bias.items():
        if token_id >= len(logits_V):
            raise ValueError(f"logit_bias names id {token_id}, outside the vocabulary 0..{len(logits_V) - 1}")
        logits_V[token_id] += bias


def _choose(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return the id chosen from each row, [B, 1]: the lowest most likely one if greedy, else one drawn."""
    if logits_BV.device.type == "cpu":  # numpy's argmax is eight times as fast as torch's
        ids_B1 = torch.from_numpy(logits_BV.numpy().argmax(1, keepdims=True))
    else:
        ids_B1 = logits_BV.argmax(1, keepdim=True)
    for filtered in (False, True):
        rows = [row for row, draw in enumerate(draws) if draw.params.temperature and draw.params.filters == filtered]
        if rows and len(rows) == len(draws):
            return _invert(logits_BV, draws, filtered=filtered)
        if rows:
            at = _to(logits_BV.device, torch.tensor(rows))
            ids_B1[at] = _invert(logits_BV[at], [draws[row] for row in rows], filtered=filtered)
    return ids_B1


def _invert(logits_BV: Tensor, draws: Sequence[Draw], *, filtered: bool) -> Tensor:
    """Return the first id of each row at which the cumulative probability of the kept ids exceeds the row's uniform
    number times their total, [B, 1]."""
    size = logits_BV.shape[1]
    numbers = [
        (uniform(draw.seed, draw.position), each.temperature, each.top_k or size, each.top_p, each.min_p)
        for draw in draws
        for each in (draw.params,)
    ]
    columns: Sequence[Any] = numbers[0]  # on a CPU the same bits as tensors of one row, and faster
    if len(draws) > 1 or logits_BV.device.type != "cpu":
        columns = _to(logits_BV.device, torch.tensor(numbers, dtype=torch.float64)).chunk(5, dim=1)
    u_B1, temperature_B1, top_k_B1, top_p_B1, min_p_B1 = columns
    shifted_BV = logits_BV.double() - logits_BV.amax(1, keepdim=True)
    weights_BV = torch.softmax(shifted_BV / temperature_B1, dim=1)
    if not filtered:
        cumulative_BV = weights_BV.cumsum(1)
        return torch.searchsorted(cumulative_BV, u_B1 * cumulative_BV[:, -1:], right=True).clamp(max=size - 1)
    weights_BV, ids_BV = weights_BV.sort(dim=1, descending=True, stable=True)
    weights_BV = weights_BV.masked_fill(torch.arange(size, device=logits_BV.device) >= top_k_B1, 0.0)
    cumulative_BV = weights_BV.cumsum(1)
    within_B1 = (cumulative_BV < top_p_B1 * cumulative_BV[:, -1:]).sum(1, keepdim=True)
    likely_B1 = (weights_BV >= min_p_B1 * weights_BV[:, :1]).sum(1, keepdim=True)
    last_B1 = within_B1.minimum(likely_B1 - 1).clamp(min=0)
    at_B1 = torch.searchsorted(cumulative_BV, u_B1 * cumulative_BV.gather(1, last_B1), right=True)
    return ids_BV.gather(1, at_B1.minimum(last_B1))


def _likeliest(logprobs_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, ids = logprobs_V.sort(descending=True, stable=True)
    return tuple(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
