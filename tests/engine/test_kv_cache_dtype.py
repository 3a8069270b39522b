"""Window rows, entries and index keys in FP8: an option of the engine, with the contract on bits of float32 rows.

The emulation here is written from the definition: per group, amax = max(|x|, 1e-4), s = 2^ceil(log2(amax / 448)), and
values E4M3(x / s) * s; rotary columns are bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentkit_engine import Engine, ModelSpec, SamplingParams, SavedSessionError
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Pools, ScheduledTokens
from agentkit_engine.runtime.runner import CpuLimits
from agentkit_engine.runtime.state import SPAN, ring_rows
from agentkit_engine.weights.export import export_checkpoint

from .conftest import make_random_decoder, small_config, some_ids

SIZES: dict[str, Any] = {"head_dim": 136, "sliding_window": 48}  # 128 plain columns, which are two groups, and 8 rotary
FLASH: dict[str, Any] = {
    "head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "sliding_window": 128, "hidden_size": 4096,
}  # fmt: skip
PARAMS = SamplingParams(temperature=0, max_tokens=5)
BACKENDS = ["reference", "cpu"]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_random_decoder(ModelSpec.from_config(small_config(0, 4, 128, mtp=True, **SIZES)))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


def engine(decoder: Decoder, backend: str, kv_cache_dtype: Any = "fp8", **options: Any) -> Engine:
    names: dict[str, Any] = {"name": "small", "dialect": "v4-preview", "folder": Path("none")}
    return Engine(decoder, backend=backend, kv_cache_dtype=kv_cache_dtype, **names, **options)


def emulated(x: Tensor, group: int) -> Tensor:
    groups = x.double().view(*x.shape[:-1], -1, group)
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    return ((groups / scale).float().to(torch.float8_e4m3fn).double() * scale).flatten(-2).float()


def decoded(pages: Tensor, plain: int, rotary: int) -> Tensor:
    """Return the rows of pages [P, T, X] of key-value rows."""
    rows = pages.shape[1]
    flat, data = pages.flatten(1), plain + 2 * rotary
    body, scales = flat[:, : rows * data].view(-1, rows, data), flat[:, rows * data :].view(-1, rows, 8)
    codes = body[..., :plain].contiguous().view(torch.float8_e4m3fn).double().view(-1, rows, plain // 64, 64)
    values = codes * torch.exp2(scales[..., : plain // 64, None].double() - 127)
    tail = body[..., plain:].contiguous().view(torch.bfloat16)
    return torch.cat((values.flatten(-2).float(), tail.float()), -1)


def test_pools_take_the_bytes_of_the_format() -> None:
    """V4-Flash has 21 CSA and 20 HCA layers."""
    spec = ModelSpec.from_config(small_config(0, 0, *[4, 128] * 20, 4, **FLASH))
    whole, fp8 = (
        Pools(spec, slots=1, spans=1, device=torch.device("meta"), kv_cache_dtype=dtype) for dtype in ("auto", "fp8")
    )
    assert fp8.bytes_per_span == 21 * 64 * (584 + 132) + 20 * 2 * 584
    assert fp8.bytes_per_span // SPAN == 3850
    assert whole.bytes_per_span == SPAN * 13_760 == 21 * 64 * 4 * (512 + 128) + 20 * 2 * 4 * 512
    assert whole.bytes_per_slot - fp8.bytes_per_slot == 43 * ring_rows(128) * (2048 - 584)


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_rows_are_stored_as_the_format_says(ratio: int, backend: str) -> None:
    """The rows of a first layer do not depend on how earlier ones are kept."""
    decoder, length = make_random_decoder(ModelSpec.from_config(small_config(ratio, **SIZES))), 300
    found: dict[str, dict[str, Tensor]] = {}
    for dtype in ("auto", "fp8"):
        scheduler = engine(decoder, backend, dtype).scheduler
        pools, [layer] = scheduler.pools, scheduler.pools.layers
        sequence = pools.open()
        pools.reserve(sequence, length)
        scheduler.runner.step([ScheduledTokens(sequence, some_ids(length))])
        places = {"slot": [sequence.slot], "span": sequence.spans}
        found[dtype] = {kind.name: layer[kind.name][places[kind.per]] for kind in pools.rows[0]}
    rows, stored = found["auto"], found["fp8"]
    written = torch.arange(length - min(length, ring_rows(48)), length) % ring_rows(48)
    kept = {"window": written} | ({"entries": torch.arange(SPAN // ratio)} if ratio else {})
    for name, some in kept.items():
        expected = torch.cat((emulated(rows[name][..., :128], 64), rows[name][..., 128:].bfloat16().float()), -1)
        assert torch.equal(decoded(stored[name], 128, 8)[0, some], expected[0, some]), name
        assert expected[0, some].any(-1).all()
    if ratio == 4:
        keys = stored["index_entries"].view(torch.float8_e4m3fn).float() * stored["index_scales"]
        assert torch.equal(keys[0], emulated(rows["index_entries"][0], 32))
        scales = stored["index_scales"][0, : length // ratio]
        assert torch.equal(scales, torch.exp2(scales.log2().round()))
    if ratio:
        assert torch.equal(stored["values"], rows["values"])  # open rows stay float32


def test_any_chunks_give_the_same_bits(decoder: Decoder, backend: str) -> None:
    """Within a forward, rows are rounded before they are read, as later forwards read them."""
    scheduler, ids = engine(decoder, backend).scheduler, some_ids(300)
    whole = scheduler.logits(ids)
    for chunk in (129, 37):
        assert torch.equal(scheduler.logits(ids, chunk=chunk), whole), chunk
    assert torch.equal(scheduler.logits(ids[:140], chunk=1), whole[:140])
    assert not torch.allclose(whole, engine(decoder, backend, "auto").logits(ids), atol=1e-3)


def test_a_batch_gives_each_sequence_its_own_bits(decoder: Decoder, backend: str) -> None:
    scheduler, texts = engine(decoder, backend).scheduler, [some_ids(length, length) for length in (140, 20, 140)]
    sequences = [scheduler.pools.open() for _ in texts]
    parts: list[list[Tensor]] = [[], [], []]
    for first in (0, 12):
        scheduled = [
            ScheduledTokens(s, ids[first : first + 12 * 99 ** bool(first)])
            for s, ids in zip(sequences, texts, strict=True)
        ]
        for part in scheduled:
            scheduler.pools.reserve(part.sequence, part.sequence.length + len(part))
        logits = scheduler.runner.step(scheduled, all_rows=True).logits_RV
        for own, some in zip(parts, torch.split(logits, [*map(len, scheduled)]), strict=True):
            own.append(some)
    for ids, own in zip(texts, parts, strict=True):
        assert torch.equal(torch.cat(own), scheduler.logits(ids))


def test_threads_that_store_and_read_the_same_rows_do_not_change_a_bit(decoder: Decoder) -> None:
    one, three = (engine(decoder, "cpu", limits=CpuLimits(threads)).scheduler for threads in (1, 3))
    whole = one.logits(some_ids(300))
    for _ in range(5):
        assert torch.equal(three.logits(some_ids(300)), whole)


def test_backends_agree(decoder: Decoder) -> None:
    reference, cpu = (engine(decoder, backend).logits(some_ids(300)) for backend in BACKENDS)
    torch.testing.assert_close(cpu, reference, atol=1e-3, rtol=0)


def test_forks_saved_sessions_and_cached_ones_continue_like_a_live_one(
    decoder: Decoder, backend: str, tmp_path: Path
) -> None:
    first = engine(decoder, backend, cache_dir=tmp_path / "cache")
    with first.session() as live:
        live.append(some_ids(300))
        [fork] = live.fork()
        live.save(tmp_path / "session")
        tokens = list(live.generate(PARAMS))
        assert list(fork.generate(PARAMS)) == tokens
        more = list(fork.generate(PARAMS))
        fork.close()
    first.flush()
    assert first.scheduler.mtp_drafted
    with engine(decoder, backend).open(tmp_path / "session") as restored:
        assert list(restored.generate(PARAMS)) == tokens
        assert restored.usage.hit_tokens == 300
    with engine(decoder, backend, cache_dir=tmp_path / "cache").session() as cached:
        cached.append([*some_ids(300), *(token.id for token in tokens)])
        assert list(cached.generate(PARAMS)) == more
        assert cached.usage.hit_tokens >= 300


def test_state_in_another_format_is_not_used(decoder: Decoder, backend: str, tmp_path: Path) -> None:
    with engine(decoder, backend, "auto", cache_dir=tmp_path / "cache").session() as session:
        session.append(some_ids(300))
        list(session.generate(PARAMS))
        session.save(tmp_path / "session")
    other = engine(decoder, backend, cache_dir=tmp_path / "cache")
    with pytest.raises(SavedSessionError, match="model is"):
        other.open(tmp_path / "session")
    with other.session() as again:
        again.append(session.token_ids)
        list(again.generate(PARAMS))
        assert not again.usage.hit_tokens


def test_load_passes_the_format_on(decoder: Decoder, tmp_path: Path) -> None:
    export_checkpoint(decoder, tmp_path, format="bf16")
    loaded = Engine.load(tmp_path, kv_cache_dtype="fp8", backend="reference")
    [window, *_] = loaded.scheduler.pools.rows[0]
    assert (window.dtype, window.width) == (torch.uint8, 128 + 2 * 8 + 8)


def test_several_devices_give_the_same_bits(decoder: Decoder, tmp_path: Path) -> None:
    export_checkpoint(decoder, tmp_path, format="bf16")
    ids = some_ids(20)
    alone = Engine.load(tmp_path, kv_cache_dtype="fp8", backend="reference").logits(ids)
    both = Engine.load(tmp_path, kv_cache_dtype="fp8", backend="reference", devices=2)
    try:
        sessions = [both.session(), both.session()]
        for session in sessions:
            session.append(ids)
            [token] = session.generate(SamplingParams(temperature=0, max_tokens=1))
            assert token.logprob == alone[-1].log_softmax(0)[token.id].item()
    finally:
        both.close()


@pytest.mark.parametrize(
    ("kv_cache_dtype", "error", "match"),
    [
        ("fp4", ValueError, 'no kv_cache_dtype "fp4"; choose one of auto, fp8'),
        (torch.float8_e4m3fn, TypeError, "kv_cache_dtype must be a str"),
        (None, TypeError, "kv_cache_dtype must be a str"),
    ],
)
def test_unknown_formats_are_refused(kv_cache_dtype: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Engine.load("tiny", kv_cache_dtype=kv_cache_dtype)


def test_a_head_size_that_does_not_fit_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_checkpoint(make_random_decoder(ModelSpec.from_config(small_config(4))), tmp_path, format="bf16")
    monkeypatch.setattr("agentkit_engine.engine.read_decoder", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r'head_dim - qk_rope_head_dim is 32 - 8: .* 64 .*kv_cache_dtype="auto"'):
        Engine.load(tmp_path, kv_cache_dtype="fp8")
