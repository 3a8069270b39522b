"""Checkpoints on disk: later engines continue from them, and no change to the files changes a bit of the results."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agentkit_engine import Engine, ModelSpec, SamplingParams
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import Request, disk_cache
from agentkit_engine.runtime.disk_cache import DiskCache
from agentkit_engine.runtime.scheduler import SHORT_PROMPT
from agentkit_engine.runtime.state import SPAN

from .conftest import randomize_, small_config, some_ids

PARAMS = SamplingParams(seed=1, max_tokens=4)
LENGTH = SPAN + 40
SEGMENT = "00000000000000000001-1-00000000.segment"


def make_decoder(seed: int) -> Decoder:
    spec = ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8))
    return randomize_(Decoder(spec), torch.Generator().manual_seed(seed)).eval()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder(1)


def open_engine(decoder: Decoder, folder: Path, *, cache_bytes: int = 1 << 30) -> Engine:
    return Engine(
        decoder, name="small", dialect="v4-preview", folder=Path("none"), cache_dir=folder, cache_bytes=cache_bytes
    )


def disk(engine: Engine) -> DiskCache:
    assert engine.scheduler.disk is not None
    return engine.scheduler.disk


def say(engine: Engine, ids: list[int]) -> list[tuple[int, float]]:
    """Return the tokens a session generates from these ids; its state is stored then and when it closes."""
    with engine.session() as session:
        session.append(ids)
        session.checkpoint()
        said = [(token.id, token.logprob) for token in session.generate(PARAMS)]
    engine.flush()
    return said


@pytest.fixture(scope="module")
def expected(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    return say(open_engine(decoder, tmp_path_factory.mktemp("cold")), some_ids(LENGTH + 20, 0))


@pytest.fixture(scope="module")
def segment(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the only file that a session of `LENGTH` ids leaves."""
    folder = tmp_path_factory.mktemp("stored")
    say(open_engine(decoder, folder), some_ids(LENGTH, 0))
    (path,) = folder.rglob("*.segment")
    return path


def test_a_later_process_continues_from_an_earlier_one(
    decoder: Decoder, expected: list[tuple[int, float]], tmp_path: Path
) -> None:
    say(open_engine(decoder, tmp_path), some_ids(LENGTH, 0))
    later = open_engine(decoder, tmp_path)
    assert say(later, some_ids(LENGTH, 0) + some_ids(LENGTH + 20, 0)[LENGTH:]) == expected
    assert later.scheduler.prefilled == 20
    assert disk(later).stats.loaded == 1


def test_a_common_prefix_is_stored_once(decoder: Decoder, tmp_path: Path) -> None:
    head = some_ids(4 * SPAN, 3)
    engine = open_engine(decoder, tmp_path)
    say(engine, head + some_ids(10, 4))
    first = disk(engine).stats.written_bytes
    say(engine, head + some_ids(10, 5))
    second = disk(engine).stats.written_bytes - first
    pools = engine.scheduler.pools
    assert 4 * pools.bytes_per_span < first - second < 4 * pools.bytes_per_span + 8192
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.segment")) == first + second


def test_engines_over_one_folder_read_each_others_sessions(decoder: Decoder, tmp_path: Path) -> None:
    engines = [open_engine(decoder, tmp_path) for _ in range(2)]
    say(engines[0], some_ids(60, 1))
    say(engines[1], some_ids(60, 2))
    for engine, seed in zip(engines, (2, 1), strict=True):
        say(engine, [*some_ids(60, seed), 1, 2])
        assert (disk(engine).stats.loaded, engine.scheduler.prefilled) == (1, 62)


def test_another_model_finds_nothing(decoder: Decoder, tmp_path: Path) -> None:
    say(open_engine(decoder, tmp_path), some_ids(60, 1))
    other = open_engine(make_decoder(2), tmp_path)
    say(other, [*some_ids(60, 1), 1])
    assert disk(other).stats.loaded == 0


def test_evicted_state_is_restored_from_disk(decoder: Decoder, tmp_path: Path) -> None:
    engine = open_engine(decoder, tmp_path)
    ids = some_ids(300, 1)
    with engine.session() as session:
        session.append(ids)
        before = [(token.id, token.logprob) for token in session.generate(PARAMS)]
        session.park()
        engine.flush()
        assert not list(tmp_path.rglob("*.segment"))  # nothing is written while there is memory
        engine.scheduler.cache.clear()
        engine.flush()
        after = [(token.id, token.logprob) for token in session.generate(PARAMS)]
    assert engine.scheduler.prefilled == 300
    assert (before + after)[4:] == after and disk(engine).stats.loaded == 1


def test_a_session_that_fills_all_memory_is_still_restored_from_disk(decoder: Decoder, tmp_path: Path) -> None:
    """There is no memory for a second copy that other sessions could resume from."""
    ids = some_ids(LENGTH, 1)
    say(open_engine(decoder, tmp_path), ids)
    roomy = open_engine(decoder, tmp_path)
    expected = say(roomy, [*ids, 1])
    small = Engine(
        decoder, name="small", dialect="v4-preview", folder=Path("none"), cache_dir=tmp_path,
        kv_cache_bytes=2 * roomy.scheduler.pools.bytes_per_span,
    )  # fmt: skip
    with small.session() as session:
        session.append([*ids, 1])
        assert [(token.id, token.logprob) for token in session.generate(PARAMS)] == expected
    assert (disk(small).stats.loaded, small.scheduler.prefilled) == (1, 1)


@pytest.mark.parametrize(("stored", "found"), [(48 + SHORT_PROMPT, 48), (49 + SHORT_PROMPT, 49 + SHORT_PROMPT)])
def test_the_disk_is_read_where_it_saves_more_than_a_few_tokens(
    decoder: Decoder, tmp_path: Path, stored: int, found: int
) -> None:
    ids = some_ids(100, 1)
    for length in (stored, 48):  # the longer one on disk, the shorter one in memory
        engine = open_engine(decoder, tmp_path)
        request = Request(ids[:length])
        engine.scheduler.step([request])
        if length == stored:
            engine.scheduler.close(request)
            engine.flush()
    later = Request(ids)
    engine.scheduler.resume(later)
    assert later.computed == found


def check_survives(
    decoder: Decoder, folder: Path, segment: Path, content: bytes, expected: list[tuple[int, float]]
) -> Engine:
    path = folder / segment.parent.name / segment.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    engine = open_engine(decoder, folder)
    assert say(engine, some_ids(LENGTH, 0) + some_ids(LENGTH + 20, 0)[LENGTH:]) == expected
    return engine


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400) | st.integers(0, 1 << 32), flip=st.integers(0, 255))
@example(place=45, flip=1)  # the kind of the frame
def test_a_file_truncated_or_damaged_anywhere_is_never_trusted(
    decoder: Decoder,
    segment: Path,
    expected: list[tuple[int, float]],
    tmp_path_factory: pytest.TempPathFactory,
    place: int,
    flip: int,
) -> None:
    whole = segment.read_bytes()
    at = place % len(whole)
    # truncated there when `flip` is 0
    content = whole[:at] + (bytes([whole[at] ^ flip]) + whole[at + 1 :] if flip else b"")
    check_survives(decoder, tmp_path_factory.mktemp("damaged"), segment, content, expected)


def test_an_undamaged_copy_is_accepted(
    decoder: Decoder, segment: Path, expected: list[tuple[int, float]], tmp_path: Path
) -> None:
    engine = check_survives(decoder, tmp_path, segment, segment.read_bytes(), expected)
    assert (engine.scheduler.prefilled, disk(engine).stats.damaged) == (20, 0)


def test_a_foreign_file_is_named_and_skipped(
    decoder: Decoder, expected: list[tuple[int, float]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(decoder, tmp_path)
    disk(engine).folder.mkdir(parents=True)
    (disk(engine).folder / SEGMENT).write_text("nothing that was ever a frame, but long enough to look like one" * 2)
    (disk(engine).folder / "notes.segment").write_text("no name that the cache gives")
    with caplog.at_level(logging.WARNING):
        assert say(engine, some_ids(LENGTH + 20, 0)) == expected
        say(engine, some_ids(LENGTH + 20, 0))
    (record,) = caplog.records
    assert f"{SEGMENT} is damaged or not signed with this user's key from byte 0 on" in record.message


def test_a_failing_disk_is_one_warning(
    decoder: Decoder, expected: list[tuple[int, float]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    engine = open_engine(decoder, tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        assert say(engine, some_ids(LENGTH + 20, 0)) == expected
        say(engine, some_ids(50, 1))
    assert ["nothing more is stored" in record.message for record in caplog.records] == [True]
    assert disk(engine).stats.not_stored > 0


def test_the_budget_removes_the_least_recently_used_segments(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "SEGMENT_BYTES", 0)  # a file for each frame
    size = 1 + sum(tail[0].nbytes for tail in open_engine(decoder, tmp_path).scheduler.pools.tails)
    engine = open_engine(decoder, tmp_path, cache_bytes=int(4.5 * size))
    for seed in range(3):
        say(engine, some_ids(60, seed))
    engine.scheduler.cache.clear()
    say(engine, [*some_ids(60, 0), 1])  # used once more
    for seed in range(3, 5):
        say(engine, some_ids(60, seed))
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.segment"))
    assert 2 * size < held <= 4.5 * size
    later = open_engine(decoder, tmp_path)
    found = []
    for seed in range(5):
        before = disk(later).stats.loaded
        say(later, [*some_ids(60, seed), 2])
        found.append(disk(later).stats.loaded > before)
    assert found[1] is False and found[4] is True
