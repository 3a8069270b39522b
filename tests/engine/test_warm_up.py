"""Kernels are compiled before the first token, once, with a log message."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from agentkit_engine import Engine, ModelSpec, SamplingParams
from agentkit_engine.runtime import warm_up
from agentkit_kernels.cpu import loops, panels

from .conftest import make_random_decoder, small_config, some_ids


def make_engine(*, kv_cache_bytes: int = 1 << 26) -> Engine:
    spec = ModelSpec.from_config(small_config(0, 4, 128, mtp=True, sliding_window=48, index_topk=200))
    decoder = make_random_decoder(spec)
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"), kv_cache_bytes=kv_cache_bytes)


def signatures() -> dict[str, int]:
    kernels = (vars(loops) | vars(panels)).items()
    return {name: len(kernel.signatures) for name, kernel in kernels if hasattr(kernel, "signatures")}


def test_no_forward_compiles_after_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loops, "cache_folder", lambda: tmp_path)
    engine = make_engine()
    engine.warm_up()
    assert "compiling kernels for this CPU (once)" in caplog.text
    compiled = signatures()
    with engine.session() as session:  # long enough for the indexer to choose
        session.append(some_ids(1500))
        list(session.generate(SamplingParams(temperature=0, max_tokens=30)))
    assert signatures() == compiled
    assert {"choose", "sort_by_expert", "mix_experts", "compress"} <= {
        name for name, count in compiled.items() if count
    }


def test_a_later_process_skips_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loops, "cache_folder", lambda: tmp_path)
    make_engine().warm_up()
    caplog.clear()
    again = make_engine()
    with caplog.at_level(logging.WARNING):
        again.warm_up()
    assert not caplog.records
    assert again.scheduler.steps == 0
    assert again.scheduler.pools.bytes_held == 0


def test_warm_up_leaves_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "cache_folder", lambda: tmp_path)
    engine, ids = make_engine(), some_ids(600)
    expected = make_engine().logits(ids)
    engine.warm_up()
    assert engine.scheduler.pools.bytes_held == 0
    assert engine.logits(ids).equal(expected)


@pytest.mark.parametrize("folder", [None, "memory"])
def test_warm_up_is_skipped_without_a_folder_or_memory(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "cache_folder", lambda: tmp_path if folder else None)
    make_engine(kv_cache_bytes=1).warm_up()
    assert not list(tmp_path.iterdir())


def test_changed_kernels_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "cache_folder", lambda: tmp_path)
    make_engine().warm_up()
    monkeypatch.setattr(warm_up, "machine", lambda device: ("another",))
    make_engine().warm_up()
    assert len(list(tmp_path.iterdir())) == 2
