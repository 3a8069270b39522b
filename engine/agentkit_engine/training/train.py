"""The training loop: next-token loss on what the assistant wrote, plus what a V4 needs beside it.

*Indexers* get no gradient from the selection they make; they learn from `indexer_kl`, while `index_topk` starts above
every entry and is lowered to its final value, so that attention learns before selection binds. *Router biases* are
not trained either: each is nudged by the sign of its expert's load error. The *MTP block* learns the token after
next with a small weight. Sources: DeepSeek-V3 (arXiv:2412.19437) sections 2.1.2 and 2.2, DeepSeek-V3.2
(arXiv:2512.02556) section 2.1.
Dimension key: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from agentkit_engine.model import Decoder, Trace, indexer_kl
from agentkit_engine.training.data import Batch, Rows, batches
from agentkit_engine.training.optimizer import Muon


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """One run; with the same rows and machine it is repeatable.

    Attributes:
        steps: Optimiser steps, copying included.
        copy_steps: First steps, on random names said twice: heads that copy form within sixty such steps (those that
            read compressed entries within two hundred), and much later, if at all, when trajectories alone have to
            bring them about.
        copy_window: The sliding window of every second batch for copying: so short that the first saying lies outside,
            and only heads that read compressed entries can copy. Within the full window there is no need for them, and
            without this they did not form at all: a fact from far back was never found.
        mixed_steps: Steps after these in which two batches of four are still for copying.
        batches: Batches of a step, per process. A batch holds rows of one length, and so of few families: a step
            needs several, or the model forgets one family while it learns another.
        batch_tokens: Padded tokens of a batch at most.
        learning_rate: Peak, shared by Muon and AdamW; warmed up, then cosine to a hundredth.
        prompt_weight: Loss weight of tokens the assistant did not write (1 for those it wrote).
        mtp_weight: Loss weight of the MTP block.
        mtp_every: Steps between updates of the MTP block.
        index_every: Steps between indexer updates (they cost a second softmax).
        topk_steps: The step at which `index_topk` reaches its final value.
        bias_rate: Size of a router bias nudge, decayed with the learning rate.
    """

    steps: int = 3000
    copy_steps: int = 150
    copy_window: int = 12
    mixed_steps: int = 500
    batches: int = 3
    batch_tokens: int = 896
    learning_rate: float = 4e-3
    warmup_steps: int = 40
    weight_decay: float = 0.02
    prompt_weight: float = 0.02
    mtp_weight: float = 0.1
    mtp_every: int = 4
    index_every: int = 3
    topk_steps: int = 500
    bias_rate: float = 2e-3
    clip: float = 1.0
    seed: int = 0


def train(
    model: Decoder, rows: Rows, config: TrainingConfig, *, pad_id: int, log: Callable[[dict[str, float]], None]
) -> None:
    """Train `model` in place; `log` gets one record per ten steps.

    Inside a `torch.distributed` process group each process takes its own batches, and gradients are averaged: on a
    CPU two processes of one thread are much faster than one process of two. `log` then sees this process's share.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizers = build_optimizers(model, config)
    final_topk = model.spec.index_topk
    stream = itertools.islice(_stream(rows, config, pad_id, world), rank, None, world)
    started, tokens, written = time.perf_counter(), 0, 0
    for step in range(config.steps):
        fraction = _learning_rate(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * fraction * group.get("lr_scale", 1.0)
        loads: dict[int, Tensor] = {}
        means: dict[str, float] = {}
        for batch in itertools.islice(stream, config.batches):
            _set_topk(model, _topk(step, config, final_topk, batch.ids_BT.size(1)))
            _set_window(model, batch.window or model.spec.sliding_window)
            trace = Trace(index_scores=step % config.index_every == 0)
            losses = _losses(model, batch, config, trace, draft=step % config.mtp_every == 0)
            (sum(losses.values(), torch.zeros(())) / config.batches).backward()  # type: ignore[no-untyped-call]
            for name, loss in losses.items():
                means[name] = means.get(name, 0.0) + float(loss.detach()) / config.batches
            for layer, counts in trace.expert_counts.items():
                loads[layer] = loads.get(layer, torch.zeros_like(counts)) + counts
            tokens += int(batch.real_BT.sum())
            written += int(batch.mask_BT.sum())
        for parameter in model.parameters():
            if parameter.grad is None:  # an indexer or MTP block in a step without its loss: momentum moves it
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
            log({"step": step, **means, "grad_norm": float(norm), "tokens": tokens, "written": written, "s": seconds})
        _set_window(model, model.spec.sliding_window)
    _set_topk(model, final_topk)


def build_optimizers(model: Decoder, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, the head, gates, norms and vectors.

    The mHC maps read all streams at once, so one step of AdamW moves their outputs further than others': they get a
    tenth of the learning rate.
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
        Muon(muon, lr=config.learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(adam_groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]


def _average(model: Decoder, loads: dict[int, Tensor]) -> None:
    """Make gradients and expert counts those of all processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    for counts in loads.values():
        dist.all_reduce(counts)


def _stream(rows: Rows, config: TrainingConfig, pad_id: int, world: int) -> Iterator[Batch]:
    """Batches for copying, then every second one of them, then epoch after epoch."""
    epochs = itertools.chain.from_iterable(
        batches(rows, tokens=config.batch_tokens, pad_id=pad_id, seed=config.seed + epoch)
        for epoch in itertools.count()
    )
    for index in itertools.count():
        step = index // (world * config.batches)
        copying = step < config.copy_steps or (step < config.copy_steps + config.mixed_steps and index // 2 % 2)
        yield _copy_batch(rows.copied, config, index) if copying else next(epochs)


def _copy_batch(copied: Tensor, config: TrainingConfig, draw: int) -> Batch:
    """Rows of 48 random names and digits, each said twice."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + draw)
    half = 48
    picks_BT = torch.randint(len(copied), (config.batch_tokens // (2 * half), half), generator=generator)
    ids_BT = copied.long()[picks_BT].repeat(1, 2)
    mask_BT = torch.ones(ids_BT.shape)
    mask_BT[:, :half] = 0.0
    window = config.copy_window if draw % 2 else None
    return Batch(ids_BT, mask_BT, torch.ones(ids_BT.shape, dtype=torch.bool), window)


def _learning_rate(step: int, config: TrainingConfig) -> float:
    """Cosine to a hundredth, warmed up at the start and again where the trajectories begin."""
    begun = step - config.copy_steps if step >= config.copy_steps else step
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return min(1.0, (begun + 1) / config.warmup_steps) * (0.01 + 0.99 * cosine)


def _topk(step: int, config: TrainingConfig, final: int, length: int) -> int:
    """All entries first, then linearly down to the final top-k."""
    entries = max(final, length // 4)
    return final if step >= config.topk_steps else round(entries + (final - entries) * step / config.topk_steps)


def _set_topk(model: Decoder, topk: int) -> None:
    for block in model.blocks:
        block.attn.top_k = topk


def _set_window(model: Decoder, window: int) -> None:
    for block in model.blocks:
        block.attn.sliding_window = window


def _losses(model: Decoder, batch: Batch, config: TrainingConfig, trace: Trace, *, draft: bool) -> dict[str, Tensor]:
    """The weighted terms: `loss` (next token), with `draft` `mtp` (the one after) and, when traced, `index`."""
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
    """Mean loss of predicting `ids[t + ahead]` from row t, weighted by the weight of the predicted token."""
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
    """Greedy agreement under teacher forcing with what the assistant wrote: share of tokens, share of whole rows."""
    right = written = whole = 0
    for batch in batches(rows, tokens=batch_tokens, pad_id=pad_id, seed=0):
        mine_BT = batch.mask_BT[:, 1:].bool()
        right_BT = (model(batch.ids_BT)[:, :-1].argmax(-1) == batch.ids_BT[:, 1:]) & mine_BT
        right += int(right_BT.sum())
        written += int(mine_BT.sum())
        whole += int((right_BT == mine_BT).all(-1).sum())
    return {"token_accuracy": right / written, "row_accuracy": whole / len(rows)}
