"""Training loop: next-token loss on the assistant's tokens, and the additional losses of V4.

*Indexers* get no gradient from the selection they make; they learn from `indexer_kl`. `index_topk` starts at all
entries and is lowered to its final value, so that attention learns before selection binds. *Router biases* are not
trained by gradient: each is nudged by the sign of its expert's load error. The *MTP block* learns the token after next
with a small weight. Sources: DeepSeek-V3 (arXiv:2412.19437) sections 2.1.2 and 2.2, DeepSeek-V3.2 (arXiv:2512.02556)
section 2.1.
Dimension key: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from agentkit_engine.model import Decoder, Trace, indexer_kl, initialize_
from agentkit_engine.training.data import Batch, Rows, batches
from agentkit_engine.training.optimizer import Muon

Practice = Literal["copy", "far-copy", "names", "majority"]
"""Short synthetic rows for skills that trajectories teach late or not at all.

copy: Random ids, each repeated once.
far-copy: The same with a sliding window so short that the first occurrence lies outside it, so that heads must copy
    through CSA's entries. With the full window the model never learned to find distant facts.
majority: Rows that ask which names are frequent, with a window of two and no CSA selection, so that only HCA's
    entries carry the answer.
"""
Dtype = Literal["float32", "bfloat16"]
FAR_COPY_WINDOW = 12
FORMED = 48
COPIED = (24, 72)
NAMES = (4, 24)
NAME_IDS = (2, 12)
PRINTABLE = 94
ALPHABETS = (8, 10, 16, 32, 64, 512)
FIRST_PRACTISED = 128
FORMING = 0.45
"""Share of the steps with practice only in which copying heads form on the first `FIRST_PRACTISED` ids."""


def practice_kinds(text: str) -> tuple[Practice, ...]:
    """Parse comma-separated kinds of practice. Raises ValueError for an unknown name."""
    kinds = get_args(Practice)
    for name in (names := text.split(",")):
        if name not in kinds:
            raise ValueError(
                f"unknown practice {name!r}; expected one or more of {', '.join(kinds)}, with commas and no spaces"
            )
    return tuple(kinds[kinds.index(name)] for name in names)


def dtype_of(text: str) -> Dtype:
    """Parse the name of a dtype. Raises ValueError for one that training does not support."""
    dtypes = get_args(Dtype)
    if text not in dtypes:
        raise ValueError(f"unknown dtype {text!r}; expected {' or '.join(dtypes)}")
    dtype: Dtype = dtypes[dtypes.index(text)]
    return dtype


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Settings of one run; the same rows and machine give the same model.

    Attributes:
        steps: Optimiser steps, practice included.
        practice: Kinds of practice batches, in rotation (see `Practice`).
        practice_steps: Initial steps with practice only.
        mixed_steps: Steps after these in which two batches of four are still practice.
        practice_every: Pairs of batches per pair of practice after that; 0 for no more practice.
        spread_steps: Steps in which CSA selects nothing in rows with spread facts, so that HCA learns to carry them.
            With CSA available, CSA learns them first and HCA never does.
        renew_hca: Whether to give a continued model new HCA compressors first, see `renew_hca_`.
        batches: Batches per step and process. A batch holds rows of one length, and so of few families. With one
            batch per step, the model forgets one family while it learns another.
        batch_tokens: Maximum padded tokens of a batch.
        learning_rate: Peak, shared by Muon and AdamW; warmed up, then constant.
        decay_steps: Last steps, in which the learning rate falls linearly to a hundredth; 0 for a run that another one
            continues.
        prompt_weight: Loss weight of tokens the assistant did not write (1 for the assistant's).
        mtp_weight: Loss weight of the MTP block.
        mtp_every: Steps between updates of the MTP block.
        index_every: Steps between indexer updates (they cost a second softmax).
        topk_steps: The step at which `index_topk` reaches its final value.
        bias_rate: Size of a router bias nudge, decayed with the learning rate.
        save_steps: Steps between saved states.
        dtype: Dtype of the factors of matrix products, `float32` or `bfloat16`. Weights, gradients, router and logits
            stay float32.
    """

    steps: int = 3000
    practice: tuple[Practice, ...] = ("copy", "far-copy", "names", "majority")
    practice_steps: int = 150
    mixed_steps: int = 500
    practice_every: int = 10
    spread_steps: int = 2000
    renew_hca: bool = False
    batches: int = 3
    batch_tokens: int = 896
    learning_rate: float = 4e-3
    decay_steps: int = 1000
    warmup_steps: int = 40
    weight_decay: float = 0.02
    prompt_weight: float = 0.02
    mtp_weight: float = 0.1
    mtp_every: int = 8
    index_every: int = 3
    topk_steps: int = 500
    bias_rate: float = 2e-3
    clip: float = 1.0
    save_steps: int = 250
    dtype: Dtype = "float32"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """The state of a run beside its weights: it continues from there, bit for bit."""

    step: int
    optimizers: list[dict[str, Any]]


def train(
    model: Decoder,
    rows: Rows,
    config: TrainingConfig,
    *,
    pad_id: int,
    log: Callable[[dict[str, float]], None],
    start: State | None = None,
    save: Callable[[State], None] | None = None,
) -> None:
    """Train `model` in place; `log` receives one record per ten steps, and `save` the state every `save_steps`.

    A run that starts from a saved state gives the weights of the uninterrupted run, bit for bit.

    Inside a `torch.distributed` process group each process draws its own batches, and gradients are averaged. On a
    CPU two processes of one thread are much faster than one process of two threads. `log` then receives the numbers of
    this process only.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizers = build_optimizers(model, config)
    first = 0
    if start is not None:
        first = start.step
        for optimizer, state in zip(optimizers, start.optimizers, strict=True):
            optimizer.load_state_dict(state)
    device = model.embed.weight.device
    final_topk = model.spec.index_topk
    model.products = getattr(torch, config.dtype)
    skipped = first * config.batches * world
    stream = itertools.islice(_stream(rows, config, pad_id, world), skipped + rank, None, world)
    started, tokens, written = time.perf_counter(), 0, 0
    for step in range(first, config.steps):
        if save is not None and step > first and step % config.save_steps == 0:
            save(State(step, [optimizer.state_dict() for optimizer in optimizers]))
        fraction = _learning_rate(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * fraction * group.get("lr_scale", 1.0)
        loads: dict[int, Tensor] = {}
        named: dict[str, list[float]] = {}
        for batch in (each.to(device) for each in itertools.islice(stream, config.batches)):
            picks = not batch.spread or step >= config.spread_steps
            _set_topk(model, _topk(step, config, final_topk, batch.ids_BT.size(1)) if picks else 0)
            _set_window(model, batch.window or model.spec.sliding_window)
            trace = Trace(index_scores=picks and step % config.index_every == 0)
            losses = _losses(model, batch, config, trace, draft=step % config.mtp_every == 0)
            (sum(losses.values(), torch.zeros((), device=device)) / config.batches).backward()  # type: ignore[no-untyped-call]
            for name, loss in losses.items():
                named.setdefault("spread" if batch.spread and name == "loss" else name, []).append(float(loss.detach()))
            for layer, counts in trace.expert_counts.items():
                loads[layer] = loads.get(layer, torch.zeros_like(counts)) + counts
            tokens += int(batch.real_BT.sum())
            written += int(batch.mask_BT.sum())
        for parameter in model.parameters():
            # indexers and MTP block in steps without their loss: zero gradients, because their momentum still moves
            # them
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if world > 1:
            _average(model, loads)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        nudge_router_biases(model, loads, config.bias_rate * fraction)
        if step % 10 == 0 or step == config.steps - 1:
            seconds = time.perf_counter() - started
            means = {name: sum(losses) / len(losses) for name, losses in named.items()}
            log({"step": step, **means, "grad_norm": float(norm), "tokens": tokens, "written": written, "s": seconds})
        _set_window(model, model.spec.sliding_window)
    _set_topk(model, final_topk)
    model.products = torch.float32


@torch.no_grad()
def renew_hca_(model: Decoder, generator: torch.Generator) -> None:
    """Give every HCA layer a new compressor and a new last head, in place.

    In a model trained without need for HCA, queries ignore HCA's entries (7e-6 of the attention in the tiny model), so
    they get almost no gradient and cannot be learned any more.
    """
    fresh = initialize_(Decoder(model.spec), generator)
    for block, new in zip(model.blocks, fresh.blocks, strict=True):
        if block.attn.layer.attention == "hca":
            assert block.attn.compressor is not None and new.attn.compressor is not None
            block.attn.compressor.load_state_dict(new.attn.compressor.state_dict())
            block.attn.wq_b.weight[-block.attn.head_dim :] = new.attn.wq_b.weight[-block.attn.head_dim :]
            block.attn.attn_sink[-1] = 0.0


def build_optimizers(model: Decoder, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for embeddings, the head, gates, norms and vectors.

    The mHC maps get a tenth of the learning rate: they read all streams at once, so a step of AdamW changes their
    outputs more than those of other parameters.
    """
    muon, decayed, maps, plain = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("_fn"):
            maps.append(parameter)
        elif parameter.ndim < 2 or name.endswith(".ape"):
            plain.append(parameter)
        elif name.startswith(("embed.", "head.")) or ".gate." in name:
            decayed.append(parameter)
        else:
            muon.append(parameter)
    adam_groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": maps, "weight_decay": 0.0, "lr_scale": 0.1},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [
        Muon(muon, lr=config.learning_rate, weight_decay=config.weight_decay, dtype=getattr(torch, config.dtype)),
        torch.optim.AdamW(adam_groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]


def _average(model: Decoder, loads: dict[int, Tensor]) -> None:
    """Average the gradients and sum the expert counts over all processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    for counts in loads.values():
        dist.all_reduce(counts)


def _stream(rows: Rows, config: TrainingConfig, pad_id: int, world: int) -> Iterator[Batch]:
    """Yield practice batches, then alternating pairs of practice and trajectories, then mostly trajectories, epoch
    after epoch."""
    epochs = itertools.chain.from_iterable(
        batches(rows, tokens=config.batch_tokens, pad_id=pad_id, seed=config.seed + epoch)
        for epoch in itertools.count()
    )
    for index in itertools.count():
        step = index // (world * config.batches)
        period = 2 if step < config.practice_steps + config.mixed_steps else config.practice_every
        if step < config.practice_steps or (period and index // 2 % period == 1):
            yield _practice(rows.copied[: _practised(step, config, len(rows.copied))], config, index)
        else:
            yield next(epochs)


def _practised(step: int, config: TrainingConfig, count: int) -> int:
    """Return the number of ids to practise with, of `count`: few until copying heads have formed, then ever more.

    With thousands of ids from the start no copying head had formed after a hundred steps.
    """
    first = min(FIRST_PRACTISED, count)
    formed = FORMING * config.practice_steps
    grown = (step - formed) / max(1.0, config.practice_steps - formed)
    return round(first * math.pow(count / first, min(1.0, max(0.0, grown))))


def _practice(copied: Tensor, config: TrainingConfig, draw: int) -> Batch:
    """Return the practice batch number `draw`."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + draw)
    kind = config.practice[draw // 2 % len(config.practice)]
    if kind == "majority":
        return _majority_batch(copied, config, generator)
    if kind == "names":
        return _names_batch(copied.tolist(), config, random.Random(generator.initial_seed()))
    return _copy_batch(copied, config, generator, FAR_COPY_WINDOW if kind == "far-copy" else None)


def _copy_batch(copied: Tensor, config: TrainingConfig, generator: torch.Generator, window: int | None) -> Batch:
    """Return rows of random ids, each row repeated once.

    All rows have `FORMED` ids until heads that copy from this distance have formed on few ids. After that the number
    differs between batches, so that heads learn to find what they copy.
    """
    few = len(copied) <= FIRST_PRACTISED
    half = FORMED if few else int(torch.randint(*COPIED, (), generator=generator))
    picks_BT = torch.randint(len(copied), (max(1, config.batch_tokens // (2 * half)), half), generator=generator)
    ids_BT = copied.long()[picks_BT].repeat(1, 2)
    mask_BT = torch.ones(ids_BT.shape)
    mask_BT[:, :half] = 0.0
    return Batch(ids_BT, mask_BT, torch.ones(ids_BT.shape, dtype=torch.bool), window)


def _names_batch(copied: list[int], config: TrainingConfig, rng: random.Random) -> Batch:
    """Return rows of keys with their names, and then some of the keys with their names again, in any order.

    Every row has an alphabet of its own, and an id that ends names. Half of the alphabets are neighbours among the
    first ids, the printable ASCII characters: digits, or letters.
    """
    count = rng.randint(*NAMES)
    length = count * (NAME_IDS[1] + 2) * 2
    rows, masks = [], []
    for _ in range(max(1, config.batch_tokens // length)):
        end, *keys = drawn = rng.sample(copied, 1 + count)
        size, first = rng.choice(ALPHABETS), rng.randrange(PRINTABLE)
        near = copied[first : first + size] if rng.random() < 0.5 else rng.sample(copied, min(size, len(copied)))
        alphabet = [token for token in near if token not in drawn] or copied
        names = [[key, *rng.choices(alphabet, k=rng.randint(*NAME_IDS)), end] for key in keys]
        row = [token for name in names for token in name]
        mask = [0.0] * len(row)
        while len(row) < length:
            name = rng.choice(names)
            row += name
            mask += [0.0] + [1.0] * (len(name) - 1)
        rows.append(row[:length])
        masks.append(mask[:length])
    ids_BT = torch.tensor(rows)
    return Batch(ids_BT, torch.tensor(masks), torch.ones(ids_BT.shape, dtype=torch.bool))


def _majority_batch(copied: Tensor, config: TrainingConfig, generator: torch.Generator) -> Batch:
    """Return rows of 128 draws from eight names, followed by six more draws to predict.

    One of the names has a probability of 0.4. The first id of `copied` precedes each draw to predict. With a window of
    two, four layers reach back four tokens at most, so a query cannot see the previous draw, six tokens back; only the
    entry of the 128 draws tells it the distribution.
    """
    stretch, answers, every, names = 128, 6, 6, 8
    length = stretch + answers * every
    asks, pool = copied[0].long(), copied[1:].long()
    rows = max(1, config.batch_tokens // length)
    chosen_BN = torch.rand(rows, len(pool), generator=generator).argsort(-1)[:, :names]
    shares_N = torch.tensor([0.4] + [0.6 / (names - 1)] * (names - 1))
    draws_BT = torch.multinomial(shares_N.expand(rows, -1), length, replacement=True, generator=generator)
    drawn_BT = pool[chosen_BN.gather(1, draws_BT)]
    ids_BT = pool[torch.randint(len(pool), (rows, length), generator=generator)]
    mask_BT = torch.zeros(rows, length)
    ids_BT[:, :stretch] = drawn_BT[:, :stretch]
    ids_BT[:, stretch::every] = asks
    ids_BT[:, stretch + 1 :: every] = drawn_BT[:, stretch + 1 :: every]
    mask_BT[:, stretch + 1 :: every] = 1.0
    return Batch(ids_BT, mask_BT, torch.ones(ids_BT.shape, dtype=torch.bool), window=2, spread=True)


def _learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the share of the peak: a warm-up at the start and another after practice, and the decay at the end."""
    begun = step - config.practice_steps if step >= config.practice_steps else step
    left = (config.steps - step) / config.decay_steps if config.decay_steps else 1.0
    return min(1.0, (begun + 1) / config.warmup_steps) * (0.01 + 0.99 * min(1.0, left))


def _topk(step: int, config: TrainingConfig, final: int, length: int) -> int:
    """Return the top-k: all entries at first, then linearly down to the final value."""
    entries = max(final, length // 4)
    return final if step >= config.topk_steps else round(entries + (final - entries) * step / config.topk_steps)


def _set_topk(model: Decoder, topk: int) -> None:
    for block in model.blocks:
        block.attn.top_k = topk


def _set_window(model: Decoder, window: int) -> None:
    for block in model.blocks:
        block.attn.sliding_window = window


def _losses(model: Decoder, batch: Batch, config: TrainingConfig, trace: Trace, *, draft: bool) -> dict[str, Tensor]:
    """Return the weighted losses: `loss` (next token), `mtp` (token after next) with `draft`, `index` if traced."""
    weight_BT = (config.prompt_weight + (1 - config.prompt_weight) * batch.mask_BT) * batch.real_BT
    logits_BTV = model(batch.ids_BT, trace=trace)
    losses = {"loss": _cross_entropy(logits_BTV, batch.ids_BT, weight_BT, ahead=1)}
    if draft and model.mtp and trace.streams_BTMD is not None:
        drafts_BTV, _ = model.draft_logits(trace.streams_BTMD[:, :-1], batch.ids_BT[:, 1:], trace=trace)
        losses["mtp"] = config.mtp_weight * _cross_entropy(drafts_BTV, batch.ids_BT, weight_BT, ahead=2)
    if trace.index_scores:
        losses["index"] = indexer_kl(trace)
    return losses


def _cross_entropy(logits_BTV: Tensor, ids_BT: Tensor, weight_BT: Tensor, *, ahead: int) -> Tensor:
    """Return the mean loss of predicting `ids[t + ahead]` from row t, weighted by the weight of the predicted token."""
    count = ids_BT.size(1) - ahead
    target, weight = ids_BT[:, ahead:].flatten(), weight_BT[:, ahead:].flatten()
    losses = F.cross_entropy(logits_BTV[:, :count].flatten(0, 1), target, reduction="none")
    return (losses * weight).sum() / weight.sum()


def nudge_router_biases(model: Decoder, loads: dict[int, Tensor], rate: float) -> None:
    """Move each score router's selection bias against its expert's load (auxiliary-loss-free balancing)."""
    for block in model.blocks:
        counts = loads.get(block.ffn.layer.index)
        if block.ffn.gate.router == "score" and counts is not None:
            block.ffn.gate.bias.add_(torch.sign(counts.float().mean() - counts), alpha=rate)


@torch.no_grad()
def accuracy(model: Decoder, rows: Rows, *, pad_id: int, batch_tokens: int = 8192) -> dict[str, float]:
    """Return the accuracy of greedy prediction under teacher forcing on the assistant's tokens: per token and per
    row."""
    right = written = whole = 0
    device = model.embed.weight.device
    for batch in (each.to(device) for each in batches(rows, tokens=batch_tokens, pad_id=pad_id, seed=0)):
        mine_BT = batch.mask_BT[:, 1:].bool()
        right_BT = (model(batch.ids_BT)[:, :-1].argmax(-1) == batch.ids_BT[:, 1:]) & mine_BT
        right += int(right_BT.sum())
        written += int(mine_BT.sum())
        whole += int((right_BT == mine_BT).all(-1).sum())
    return {"token_accuracy": right / written, "row_accuracy": whole / len(rows)}
