"""A decoding step on the device, from its plan to the sampled ids: it waits once, and samples what a host samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from agentkit_engine import sampler
from agentkit_engine.generation import Generation, next_tokens
from agentkit_engine.model.decoder import Decoder
from agentkit_engine.runtime import Request, Scheduler
from agentkit_engine.sampler import Draw, SampledToken, sample
from agentkit_engine.sampling_params import SamplingParams
from agentkit_kernels.triton.sampler import SPLIT
from agentkit_kernels.triton.sampler import sample as on_device

META = torch.device("meta")
"""A device whose memory nobody can read: reading a value, or a number of elements that depends on values, raises."""


class Copies(TorchDispatchMode):
    """Counts copies from the host to META, and of those the ones that wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.waiting = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        devices = {each.device for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)}
        if len(devices) > 1:
            self.count += 1
            in_place = func is torch.ops.aten.copy_.default
            self.waiting += not (args[2] if in_place and len(args) > 2 else kwargs.get("non_blocking", False))
        return result


class Waits:
    """Stands for the copy of results to the host; every row's result is id 3."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, results: Tensor) -> list[list[float]]:
        assert results.device == META
        self.rows.append(len(results))
        return [[3.0, -1.5, 1.0, 1.0, *[3.0, -1.5] * ((results.shape[1] - 4) // 2)]] * len(results)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Let kernels do nothing, because META has no memory."""
    waits = Waits()
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **options: None)
    monkeypatch.setattr(sampler, "_read", waits)
    return waits


@pytest.fixture
def scheduler(small_decoder: Callable[..., Decoder], waits: Waits) -> Scheduler:
    return Scheduler(small_decoder(0, 4, 128).to(META), kv_cache_bytes=1 << 20, backend="triton")


PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(top_p=0.9, top_k=5, top_logprobs=2),
    SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={3: 1.0}),
]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("some", [PARAMS[:2], PARAMS], ids=["plain", "all"])
def test_a_step_waits_for_the_device_once(
    scheduler: Scheduler, waits: Waits, some: list[SamplingParams], captured: bool
) -> None:
    """As launched from Python, and as captured: nothing between the ids of one step and those of the next one reads a
    value but the copy of the results."""
    runner = scheduler.runner
    if captured:
        runner.graphs = runner.capture_with(lambda function: (lambda: None, function()))
    generations = [Generation(Request([5, 6, 7]), params) for params in some]
    for generation in generations:
        scheduler.step([generation.request])
    next_tokens(generations, scheduler)
    for expected in range(2, 5):
        with Copies() as copies:
            scheduler.step([generation.request for generation in generations])
            outcomes = next_tokens(generations, scheduler)
        assert [token.id for _, token in outcomes if isinstance(token, SampledToken)] == [3] * len(some)
        assert waits.rows == [len(some)] * expected
        assert copies.count and not copies.waiting


def test_reading_a_value_would_be_noticed() -> None:
    values = torch.ones(3, device=META)
    for read in (values.tolist, values.cpu, lambda: float(values[0]), values.nonzero, lambda: values[values > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with Copies() as copies:
        torch.tensor([1]).to(META)
        values.copy_(torch.ones(3), non_blocking=True)
    assert (copies.count, copies.waiting) == (2, 1)


# --- the same tokens on the host and on the device -------------------------------------------------------------------

CHOICES: dict[str, list[Any]] = {
    "temperature": [0, 0, 0.3, 0.7, 1],
    "top_p": [1, 1, 1, 0.9],
    "top_k": [None, None, None, 3],
    "repetition_penalty": [1, 1, 1.5],
    "frequency_penalty": [0, 0, 0.25],
    "logit_bias": [{}, {}, {1: 2.5, 2: -math.inf}, {0: -math.inf, 1: -math.inf, 2: -math.inf}, {999_999: 1.0}],
    "top_logprobs": [0, 0, 2, 5],
}
CHOSEN = st.builds(SamplingParams, **{name: st.sampled_from(values) for name, values in CHOICES.items()})


def on_both(draw: Draw, allowed: list[int] | None, size: int) -> tuple[Draw, Draw]:
    """Return the draw with a mask for the host, and with one for the device."""
    if allowed is None:
        return draw, draw
    bits, mask_V = np.zeros(32 * -(-size // 32), np.uint8), torch.full((size,), -math.inf)
    bits[allowed], mask_V[allowed] = 1, 0.0
    host = Draw(draw.params, draw.seed, draw.position, draw.past, mask_V=mask_V)
    packed = np.packbits(bits, bitorder="little")
    return host, Draw(draw.params, draw.seed, draw.position, draw.past, bitmask=packed)


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking under the interpreter takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_device_and_host_sample_the_same_tokens(data: st.DataObject) -> None:
    rows, size = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([3, 100, SPLIT + 9]))
    logits_BV = 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if data.draw(st.booleans()):
        logits_BV = logits_BV.round()  # many ids are equally likely
    if data.draw(st.booleans()):
        logits_BV[data.draw(st.integers(0, rows - 1)), 1] = data.draw(st.sampled_from([math.nan, math.inf]))
    ids = st.lists(st.integers(0, size - 1), max_size=6)
    hosts, devices = [], []
    for position in range(rows):
        past = data.draw(ids), data.draw(ids)
        allowed = data.draw(st.none() | st.lists(st.integers(0, size - 1), min_size=1, unique=True))
        draw = Draw(data.draw(CHOSEN), data.draw(st.integers(0, 2**63 - 1)), position, lambda past=past: past)  # type: ignore[misc]
        host, device = on_both(draw, allowed, size)
        hosts.append(host)
        devices.append(device)
    expected, found = sample(logits_BV, hosts), sample(logits_BV, devices, on_device)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, SampledToken) and isinstance(theirs, SampledToken):
            assert (ours.id, ours.top) == (theirs.id, theirs.top)
            assert math.isclose(ours.logprob, theirs.logprob, rel_tol=1e-5, abs_tol=1e-5)
        else:
            assert (type(ours), str(ours)) == (type(theirs), str(theirs))
    alone = [sample(row[None], [draw], on_device)[0] for row, draw in zip(logits_BV, devices, strict=True)]
    assert list(map(repr, alone)) == list(map(repr, found))  # a row's token does not depend on the batch
