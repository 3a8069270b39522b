"""The rows a cache keeps, and logits that do not depend on the chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agentkit_engine.model.cache import RowBuffer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit_engine.model import Decoder
from agentkit_engine.spec import ModelSpec


@settings(deadline=None)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=12), keep=st.one_of(st.none(), st.integers(1, 6)))
def test_row_buffer_returns_kept_and_new_rows(chunks: list[int], keep: int | None) -> None:
    buffer, rows = RowBuffer(keep), torch.arange(float(sum(chunks))).view(1, -1, 1).repeat(2, 1, 3)
    end = 0
    for count in chunks:
        view = buffer.append(rows[:, end : end + count])
        older = view.shape[1] - count
        assert older >= (end if keep is None else min(end, keep))
        torch.testing.assert_close(view, rows[:, end - older : end + count])
        end += count
        assert buffer.end == end


def test_row_buffer_grows_by_doubling_and_forgets() -> None:
    growing, rolling = RowBuffer(), RowBuffer(keep=10)
    storages: set[int] = set()
    for _ in range(1000):
        storages.add(growing.append(torch.zeros(1, 1, 2)).untyped_storage().nbytes())
        assert rolling.append(torch.zeros(1, 1, 2)).untyped_storage().nbytes() <= 20 * 2 * 4
    assert len(storages) <= 12
    assert rolling.append(torch.zeros(1, 500, 2)).shape[1] >= 510
    assert rolling.rows(torch.zeros(1, 0, 2)).shape[1] <= 510


@torch.inference_mode()
def chunked(decoder: Decoder, token_ids: Tensor, chunks: list[int]) -> Tensor:
    """Return the logits of `token_ids` appended in chunks of the given lengths, and the rest at once."""
    cache, parts, start = decoder.new_cache(), [], 0
    for count in [*chunks, token_ids.shape[1]]:
        part = token_ids[:, start : start + count]
        if part.shape[1]:
            parts.append(decoder(part, cache))
        start += count
    assert cache.length == token_ids.shape[1]
    return torch.cat(parts, dim=1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(chunks=st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 31, 127, 128, 129]), max_size=12))
def test_logits_do_not_depend_on_the_chunks(
    chunks: list[int], make_config: Callable[..., dict[str, Any]], random_decoder: Callable[..., Decoder]
) -> None:
    decoder = random_decoder(ModelSpec.from_config(make_config(0, 4, 128)), seed=3)
    token_ids = torch.randint(96, (1, 300), generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(chunked(decoder, token_ids, chunks), chunked(decoder, token_ids, []), atol=5e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8])
def test_sequences_around_the_ratio(
    length: int, make_config: Callable[..., dict[str, Any]], random_decoder: Callable[..., Decoder]
) -> None:
    """A prefix has the same logits alone and inside the whole sequence, also before the first entry."""
    decoder = random_decoder(ModelSpec.from_config(make_config(4, 128)))
    token_ids = torch.randint(96, (1, 9), generator=torch.Generator().manual_seed(9))
    whole = chunked(decoder, token_ids, [])
    torch.testing.assert_close(chunked(decoder, token_ids[:, :length], []), whole[:, :length], atol=2e-5, rtol=0)
    torch.testing.assert_close(chunked(decoder, token_ids, [1] * length), whole, atol=2e-5, rtol=0)


@torch.inference_mode()
def test_last_only_and_invalid_shapes(
    make_config: Callable[..., dict[str, Any]], random_decoder: Callable[..., Decoder]
) -> None:
    decoder = random_decoder(ModelSpec.from_config(make_config(0, 4)))
    token_ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(decoder(token_ids, last_only=True), decoder(token_ids)[:, -1:], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\[B, T\] with T >= 1, got \[2, 0\]"):
        decoder(token_ids[:, :0])
    with pytest.raises(ValueError, match="2 sequences, the cache holds 3"):
        decoder(token_ids, decoder.new_cache(3))


@torch.inference_mode()
def test_bfloat16_runs_close_to_float32(
    make_config: Callable[..., dict[str, Any]], random_decoder: Callable[..., Decoder]
) -> None:
    decoder = random_decoder(ModelSpec.from_config(make_config(0, 128, index_topk=64)))
    token_ids = torch.randint(96, (1, 140), generator=torch.Generator().manual_seed(10))
    expected = decoder(token_ids)
    got = decoder.bfloat16()(token_ids)
    assert got.dtype == torch.float32
    assert float((got - expected).abs().mean()) < 0.05
