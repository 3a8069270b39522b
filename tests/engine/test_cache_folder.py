"""A cache folder that other users wrote to changes no results, costs no memory and never blocks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentkit_engine import CacheFolderError, Engine, ModelSpec, SamplingParams
from agentkit_engine.model import Decoder
from agentkit_engine.runtime import cache_folder, disk_cache
from agentkit_engine.runtime.cache_folder import DIGEST_BYTES, Seal, user_key
from agentkit_engine.runtime.disk_cache import MAGIC, prune, survey
from agentkit_engine.runtime.prefix_cache import IdChain
from agentkit_engine.runtime.state import SPAN

from .conftest import make_random_decoder, small_config, some_ids

IDS = some_ids(SPAN + 40, 0)
PROMPT = [*IDS, 1]
SEGMENT = "00000000000000000001-1-00000000.segment"
Said = list[tuple[int, float]]
Alter = Callable[[dict[str, Any], dict[str, Tensor]], Any]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_random_decoder(ModelSpec.from_config(small_config(0, 4, 128, sliding_window=48, index_topk=8)))


def open_engine(decoder: Decoder, folder: Path, **options: Any) -> Engine:
    options = {"backend": "reference"} | options
    return Engine(decoder, name="small", dialect="v4-preview", folder=Path("none"), cache_dir=folder, **options)


def say(engine: Engine, ids: list[int]) -> Said:
    with engine.session() as session:
        session.append(ids)
        session.checkpoint()
        said = [(token.id, token.logprob) for token in session.generate(SamplingParams(seed=1, max_tokens=4))]
    engine.flush()
    return said


def loaded(engine: Engine) -> int:
    assert engine.scheduler.disk is not None
    return engine.scheduler.disk.stats.loaded


@pytest.fixture(scope="module")
def expected(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Said:
    return say(open_engine(decoder, tmp_path_factory.mktemp("cold")), PROMPT)


@pytest.fixture(scope="module")
def written(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder in which a session of `IDS` left one segment."""
    folder = tmp_path_factory.mktemp("written")
    say(open_engine(decoder, folder), IDS)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Return a copy of it; the user's own copy is accepted, as `test_a_copy_by_the_same_user_is_accepted` shows."""
    copy = tmp_path / "cache"
    shutil.copytree(written, copy)
    return copy


def segment_in(folder: Path) -> Path:
    (path,) = folder.rglob("*.segment")
    return path


def test_a_copy_by_the_same_user_is_accepted(decoder: Decoder, folder: Path, expected: Said) -> None:
    engine = open_engine(decoder, folder)
    assert say(engine, PROMPT) == expected
    assert loaded(engine) == 1


# Write permission.


def test_only_the_user_can_read_written_files(decoder: Decoder, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        say(open_engine(decoder, tmp_path / "made" / "cache"), IDS)
    finally:
        os.umask(before)
    root = tmp_path / "made" / "cache"
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"), cache_folder.key_path())}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(decoder: Decoder, folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(CacheFolderError, match=rf"has mode {mode:04o}, expected 0700.*Run `chmod 700 {folder}`"):
        open_engine(decoder, folder)
    with pytest.raises(CacheFolderError, match="has mode"):
        survey(folder)


def test_a_folder_of_somebody_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with (
        pytest.raises(
            CacheFolderError, match=rf"belongs to user {os.getuid()}, expected {os.getuid() + 1}.*of your own"
        ),
        cache_folder.open_folder(folder),
    ):
        pass


def test_a_model_folder_that_others_may_write_to_is_not_read(decoder: Decoder, folder: Path, expected: Said) -> None:
    engine = open_engine(decoder, folder)
    segment_in(folder).parent.chmod(0o777)
    assert say(engine, PROMPT) == expected
    assert loaded(engine) == 0


def test_a_segment_that_others_may_write_to_is_not_read(decoder: Decoder, folder: Path, expected: Said) -> None:
    segment_in(folder).chmod(0o622)
    engine = open_engine(decoder, folder)
    assert say(engine, PROMPT) == expected
    assert loaded(engine) == 0


# Signatures.


def test_frames_signed_by_another_user_are_rejected(
    decoder: Decoder, expected: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as stranger:
        stranger.setenv("XDG_STATE_HOME", str(tmp_path / "stranger"))
        engine = open_engine(decoder, cache)
        with engine.session() as session:  # a state that makes the model generate something else
            session.append(IDS)
            next(session.generate())
            for tails in engine.scheduler.pools.tails:
                tails.mul_(-3.0)
        engine.flush()
    mine = open_engine(decoder, cache)
    assert say(mine, PROMPT) == expected
    assert loaded(mine) == 0
    assert survey(cache)[0].damaged == 1


def test_a_segment_moved_to_another_models_folder_is_rejected(decoder: Decoder, folder: Path, expected: Said) -> None:
    other = open_engine(decoder, folder, exact=False)
    assert other.scheduler.disk is not None
    segment_in(folder).parent.rename(other.scheduler.disk.folder)
    say(other, PROMPT)
    assert loaded(other) == 0


def test_a_frame_swapped_for_another_is_rejected(
    decoder: Decoder, folder: Path, expected: Said, tmp_path: Path
) -> None:
    """Both are signed with this user's key; the second is at the first one's offset in the index."""
    engine = open_engine(decoder, folder)
    assert engine.scheduler.disk is not None
    engine.scheduler.disk.find(PROMPT, IdChain(), above=0)  # reads the index
    other = open_engine(decoder, tmp_path / "other")
    say(other, some_ids(SPAN + 40, 5))
    segment_in(folder).write_bytes(segment_in(tmp_path / "other").read_bytes())
    assert say(engine, PROMPT) == expected
    assert loaded(engine) == 0 and engine.scheduler.disk.stats.damaged > 0


# Contents: the writer signs anything it is given, so these frames have valid signatures.


def _drop(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors.pop("tail.0", None)


def _narrow(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name][..., :1].clone()  # would be broadcast


def _widen(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name][None].clone()


def _double(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].double()


def _halve(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].to(torch.float16)


def _add(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["more"] = torch.zeros(1)


def _rename(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"x{name}"] = tensors.pop(name)


def _grow(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = torch.zeros(1 << 16)


ALTERED: list[Alter] = [_drop, _narrow, _widen, _double, _halve, _add, _rename, _grow]


@pytest.mark.parametrize("alter", ALTERED)
@pytest.mark.parametrize("kind", ["span", "tail"])
def test_frames_with_unexpected_tensors_are_not_used(
    decoder: Decoder, expected: Said, tmp_path: Path, kind: str, alter: Alter
) -> None:
    engine = open_engine(decoder, tmp_path)
    _alter_what_is_written(engine, kind, alter)
    say(engine, IDS)
    later = open_engine(decoder, tmp_path)
    assert say(later, PROMPT) == expected
    assert loaded(later) == (1 if (kind, alter) == ("span", _drop) else 0)  # a span has no such tensor


@pytest.mark.parametrize(
    "change",
    [
        {"length": 0},
        {"length": -1},
        {"length": 1 << 40},
        {"length": SPAN + 39},
        {"written": SPAN},
        {"written": 1 << 40},
        {"tail": []},
        {"tail": [-1] * 40},
        {"tail": [96] * 40},
    ],
)
def test_frames_out_of_bounds_are_not_used(
    decoder: Decoder, expected: Said, tmp_path: Path, change: dict[str, Any]
) -> None:
    engine = open_engine(decoder, tmp_path)
    _alter_what_is_written(engine, "tail", lambda header, _: header.update(change))
    say(engine, IDS)
    later = open_engine(decoder, tmp_path)
    assert say(later, PROMPT) == expected
    assert loaded(later) == 0


def _alter_what_is_written(engine: Engine, kind: str, alter: Alter) -> None:
    disk = engine.scheduler.disk
    assert disk is not None
    put = disk._put

    def altered(header: dict[str, Any], key: bytes, tensors: dict[str, Tensor]) -> None:
        if header["kind"] == kind:
            alter(header, tensors)
        put(header, key, tensors)

    disk._put = altered  # type: ignore[method-assign]


# Entries that are not regular files, and files that claim to be large.


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # socket paths must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def make_link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.write_bytes(b"elsewhere")
    path.symlink_to(target)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_folder(path: Path) -> None:
    path.mkdir()


ODD = [make_fifo, make_socket, make_link, make_loop, make_folder]


@pytest.mark.parametrize("make", ODD)
def test_entries_that_are_not_regular_files_are_skipped(
    decoder: Decoder, folder: Path, expected: Said, make: Callable[[Path], None]
) -> None:
    odd = segment_in(folder).parent / SEGMENT
    make(odd)
    engine = open_engine(decoder, folder, cache_bytes=1)  # enforcing the budget looks at every segment
    assert say(engine, PROMPT) == expected
    assert loaded(engine) == 1
    make(folder / f"{'0' * 16}-{'0' * 16}")
    assert sum(model.segments for model in survey(folder)) == 1
    prune(folder, 0)
    assert os.path.lexists(odd)
    assert (folder / "elsewhere").exists() is (make is make_link)


@pytest.mark.parametrize("make", ODD)
def test_a_segment_replaced_after_it_was_indexed_never_hangs(
    decoder: Decoder, folder: Path, expected: Said, make: Callable[[Path], None]
) -> None:
    engine = open_engine(decoder, folder)
    assert engine.scheduler.disk is not None
    path = segment_in(folder)
    path.unlink()
    make(path)
    assert say(engine, PROMPT) == expected
    assert loaded(engine) == 0


@pytest.mark.parametrize("make", [make_fifo, make_link, make_loop, make_folder])
def test_a_key_that_is_not_a_regular_file_is_an_error(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    cache_folder.key_path().parent.mkdir()
    make(cache_folder.key_path())
    with pytest.raises(CacheFolderError, match=r"cannot be used: .*set XDG_STATE_HOME"):
        user_key()


def test_a_key_that_is_readable_by_others_or_truncated_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    key = user_key()
    assert user_key() == key and len(key) == 32
    path = cache_folder.key_path()
    path.chmod(0o640)
    with pytest.raises(CacheFolderError, match=r"mode 0640; expected owner \d+ and mode 0600.*Remove it"):
        user_key()
    path.chmod(0o600)
    path.write_bytes(key[:-1])
    with pytest.raises(CacheFolderError, match="has 31 bytes, expected 32"):
        user_key()
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("no folder")
    with pytest.raises(CacheFolderError, match="cannot be used"):
        user_key()


def test_two_processes_that_create_a_key_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process creates its key between this one's check and its link."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    link = os.link
    others: list[bytes] = []

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        others.append(user_key())
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert [user_key()] == others
    assert [path.name for path in cache_folder.key_path().parent.iterdir()] == ["cache.key"]


@pytest.fixture
def peak_bytes() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_sparse_file_costs_no_memory(folder: Path, peak_bytes: Callable[[], int]) -> None:
    """One is unsigned, of 9 GiB. One is signed, of 64 MiB, so that all of it is read."""
    home = segment_in(folder).parent
    header = json.dumps({"kind": "span", "key": "00"}).encode()
    for number, (size, key) in enumerate([(9 << 30, bytes(32)), (64 << 20, user_key())]):
        seal = Seal(key, home.name.encode())
        fixed = disk_cache._FRAME.pack(MAGIC, len(header), size, bytes(DIGEST_BYTES), bytes(DIGEST_BYTES))
        fixed = fixed[:-DIGEST_BYTES] + seal.sign(fixed[:-DIGEST_BYTES] + header)
        path = home / f"{number:020d}-1-00000000.segment"
        path.write_bytes(fixed + header)
        os.truncate(path, len(fixed + header) + size)
    (model,) = survey(folder)
    assert (model.segments, model.damaged, model.checkpoints) == (3, 2, 2)
    assert peak_bytes() < 16 << 20


# Numerics.


def test_state_of_other_numerics_is_not_used(decoder: Decoder, tmp_path: Path) -> None:
    ways = [{"exact": exact, "backend": on} for exact in (True, False) for on in ("cpu", "reference")]
    for way in ways:
        others = tmp_path / f"{way}"
        say(open_engine(decoder, others, **way), IDS)
        for other in ways:
            engine = open_engine(decoder, others, **other)
            with engine.session() as session:
                session.append(PROMPT)
                next(session.generate())
            assert loaded(engine) == (other == way)
