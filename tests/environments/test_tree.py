"""The format of snapshots: any tree comes back as it was, and a crafted file is refused."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit_environments import Snapshot, SnapshotError
from agentkit_environments.docker.snapshot import _archive
from agentkit_environments.tree import MAGIC, TRAILER, TreePacker, index_bytes, read_index, unpack

NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20),
    st.binary(min_size=1, max_size=20).filter(lambda raw: not {0, 47} & {*raw}).map(os.fsdecode),
).filter(lambda name: name not in (".", ".."))
FILES = st.tuples(
    st.lists(st.tuples(st.integers(0, 50), st.binary(min_size=1, max_size=300)), max_size=3),  # (4 KiB block, content)
    st.integers(0, 0o7777),
    st.integers(0, 2**33 * 10**9),
)
TREES = st.recursive(
    st.one_of(FILES, st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)),
    lambda below: st.dictionaries(NAMES, below, max_size=4),
    max_leaves=12,
)


def build(path: Path, node: Any) -> None:
    """Make a directory (dict), a link (text) or a file (blocks, mode, time)."""
    if isinstance(node, dict):
        path.mkdir()
        for name, below in node.items():
            build(path / name, below)
        path.chmod(0o700 if len(node) % 2 else 0o511)
    elif isinstance(node, str):
        path.symlink_to(node)
    else:
        blocks, mode, time_ns = node
        with path.open("wb") as file:
            for block, content in blocks:
                file.seek(4096 * block)
                file.write(content)
        os.utime(path, ns=(time_ns, time_ns))
        path.chmod(mode)


def look(root: Path) -> dict[str, tuple[object, ...]]:
    """Return the mode, time and content of every entry; as root, or with readable files."""
    found: dict[str, tuple[object, ...]] = {}
    for parent, directories, files in os.walk(root):
        for name in [*directories, *files, "."]:
            path = Path(parent, name)
            info = path.lstat()
            kind = stat.S_IFMT(info.st_mode)
            content = path.readlink() if kind == stat.S_IFLNK else path.read_bytes() if kind == stat.S_IFREG else None
            found[str(path.relative_to(root))] = (info.st_mode, info.st_mtime_ns, content)
    return found


def pack(root: Path, max_entries: int = 1000, max_bytes: int = 1 << 24) -> tuple[bytes, tuple[str, ...]]:
    packer = TreePacker({"work": str(root / "work"), "tmp": str(root / "tmp")}, max_entries, max_bytes)
    try:
        return b"".join(iter(packer.piece, b"")), packer.drops.lines
    finally:
        packer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads files without permissions")
@settings(deadline=None, max_examples=50)
@given(work=st.dictionaries(NAMES, TREES, max_size=4), tmp=st.dictionaries(NAMES, TREES, max_size=2))
def test_any_tree_comes_back_as_it_was(work: dict[str, Any], tmp: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file:
        source, copy = Path(folder, "source"), Path(folder, "copy")
        for root in (source, copy):
            root.mkdir()
            (root / "work").mkdir()
            (root / "tmp").mkdir()
        for label, nodes in (("work", work), ("tmp", tmp)):
            for name, node in nodes.items():
                build(source / label / name, node)
        data, dropped = pack(source)
        assert dropped == ()
        file.write(data)
        file.flush()
        unpack(file.fileno(), {"work": str(copy / "work"), "tmp": str(copy / "tmp")})
        assert look(copy / "work") == look(source / "work")
        assert look(copy / "tmp") == look(source / "tmp")


def test_holes_are_not_stored(tmp_path: Path) -> None:
    build(tmp_path / "work", {"holes": ([(0, b"a"), (40, b"b")], 0o644, 0)})
    (tmp_path / "tmp").mkdir()
    data, _ = pack(tmp_path)
    assert len(data) < 2 * 4096 + 1000


def test_too_much_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "work", {"a": ([(0, b"12345")], 0o644, 0), "b": ([], 0o644, 0)})
    (tmp_path / "tmp").mkdir()
    assert pack(tmp_path, max_entries=4)
    for bounds in ({"max_entries": 3}, {"max_bytes": 700}):
        with pytest.raises(OSError, match="more than") as caught:
            pack(tmp_path, **bounds)
        assert caught.value.errno == errno.EFBIG


def directory(name: str, **fields: object) -> dict[str, object]:
    return {"name": name, "kind": "dir", "mode": 0o755, "mtime_ns": 0, **fields}


def file(name: str, size: int = 0, offset: int = 0, **fields: object) -> dict[str, object]:
    return directory(name, kind="file", size=size, offset=offset, **fields)


ROOTS = [directory("work"), directory("tmp")]
CRAFTED: dict[str, tuple[list[dict[str, object]], str]] = {
    "no work": ([directory("tmp")], "is missing"),
    "another root": ([*ROOTS, directory("etc")], "not a path in a tree"),
    "an absolute name": ([*ROOTS, directory("/etc")], "not a path in a tree"),
    "a way out": ([*ROOTS, directory("work/..")], "not a path in a tree"),
    "an empty part": ([*ROOTS, directory("work//a")], "not a path in a tree"),
    "a NUL": ([*ROOTS, directory("work/a\0")], "has a NUL byte"),
    "a NUL in a target": ([*ROOTS, directory("work/a", kind="link", target="a\0")], "has a NUL byte"),
    "half of a character": ([*ROOTS, directory("work/\ud800")], "surrogates not allowed"),
    "through a link": (
        [*ROOTS, directory("work/a", kind="link", target="/etc"), file("work/a/passwd")],
        "does not follow its directory",
    ),
    "twice": ([*ROOTS, file("work/a"), directory("work/a")], "not the only one"),
    "the root twice": ([*ROOTS, directory("work")], "not the only one"),
    "a file as root": ([file("work"), directory("tmp")], "does not follow its directory"),
    "without a parent": ([*ROOTS, file("work/a/b")], "does not follow its directory"),
    "a hard link out": ([*ROOTS, directory("work/a", kind="hard", target="/etc/passwd")], "which is no file"),
    "a hard link to a link": (
        [*ROOTS, directory("work/l", kind="link", target="/etc"), directory("work/a", kind="hard", target="work/l")],
        "which is no file",
    ),
    "content outside": ([*ROOTS, file("work/a", size=11)], "outside the snapshot"),
    "content behind": ([*ROOTS, file("work/a", size=1, offset=10)], "outside the snapshot"),
    "overlapping extents": ([*ROOTS, file("work/a", size=9, extents=[(0, 4), (2, 4)])], "outside the snapshot"),
    "an extent after the end": ([*ROOTS, file("work/a", size=3, extents=[(2, 4)])], "outside the snapshot"),
    "a negative size": ([*ROOTS, file("work/a", size=-1)], "greater than or equal to 0"),
    "a device": ([*ROOTS, directory("work/a", kind="device")], "does not match any of the expected tags"),
    "a mode": ([*ROOTS, directory("work/a", mode=0o100644)], "less than or equal to"),
    "an owner that would wrap": ([*ROOTS, directory("work/a", owner=(1000, 1 << 32))], "less than 4294967295"),
    "nobody as owner": ([*ROOTS, directory("work/a", owner=((1 << 32) - 1, 0))], "less than 4294967295"),
    "a text as mode": ([*ROOTS, directory("work/a", mode="0")], "valid integer"),
    "another field": ([*ROOTS, directory("work/a", run="x")], "Extra inputs"),
    "no target": ([*ROOTS, directory("work/a", kind="link", target="")], "at least 1 character"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_index_is_refused(name: str, tmp_path: Path) -> None:
    entries, reason = CRAFTED[name]
    path = tmp_path / "crafted"
    path.write_bytes(bytes(10) + b"".join(index_bytes([json.dumps(entry).encode() for entry in entries], [])))
    with pytest.raises(SnapshotError, match=f"cannot be used as a snapshot: .*{reason}"):
        Snapshot.load(path)


IMAGE = "sha256:" + 64 * "a"
ROOT = [directory("root")]
CRAFTED_OF_IMAGE: dict[str, tuple[list[dict[str, object]], list[str], str | None, str]] = {
    "no root": ([], [], IMAGE, "the directory root is missing"),
    "a root without an image": (ROOT, [], None, "not a path in a tree"),
    "another root": ([*ROOT, *ROOTS], [], IMAGE, "not a path in a tree"),
    "an image by name": (ROOT, [], "agentkit-base:latest", "String should match pattern"),
    "an absolute path": (ROOT, ["/etc"], IMAGE, "which was removed, is not a path in a tree"),
    "the whole root": (ROOT, [""], IMAGE, "which was removed, is not a path in a tree"),
    "a removed way out": (ROOT, ["etc/.."], IMAGE, "which was removed, is not a path in a tree"),
    "a removed NUL": (ROOT, ["etc\0"], IMAGE, "which was removed, is not a path in a tree"),
    "half of a character": (ROOT, ["\ud800"], IMAGE, "surrogates not allowed"),
    "a capability": ([*ROOT, file("root/a", capability="CAP_SYS_ADMIN")], [], IMAGE, "String should match pattern"),
    "a long capability": ([*ROOT, file("root/a", capability=200 * "0")], [], IMAGE, "String should match pattern"),
}


@pytest.mark.parametrize("name", CRAFTED_OF_IMAGE)
def test_a_crafted_index_of_an_image_is_refused(name: str, tmp_path: Path) -> None:
    entries, removed, image, reason = CRAFTED_OF_IMAGE[name]
    path = tmp_path / "crafted"
    encoded = [json.dumps(entry).encode() for entry in entries]
    path.write_bytes(b"".join(index_bytes(encoded, [], image=image, removed=removed)))
    with pytest.raises(SnapshotError, match=f"cannot be used as a snapshot: .*{reason}"):
        Snapshot.load(path)


def test_paths_that_were_removed_need_an_image(tmp_path: Path) -> None:
    path = tmp_path / "crafted"
    data = b"".join(index_bytes([json.dumps(entry).encode() for entry in ROOTS], [], image=IMAGE, removed=["a"]))
    path.write_bytes(data.replace(f'"{IMAGE}"'.encode(), b"null".ljust(len(IMAGE) + 2)))
    with pytest.raises(SnapshotError, match="files were removed from an image, but the image is missing"):
        Snapshot.load(path)


def saved(tmp_path: Path) -> bytes:
    build(tmp_path / "work", {"a": ([(0, b"12345")], 0o644, 0)})
    (tmp_path / "tmp").mkdir()
    return pack(tmp_path)[0]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "short": lambda data: data[-10:],
    "torn": lambda data: data[:-1],
    "cut in front": lambda data: data[-20:],
    "another version": lambda data: data.replace(b'"version": 1', b'"version": 2'),
    "another format": lambda data: data.replace(b"agentkit.snapshot", b"agentkit.snapshop"),
    "no JSON": lambda data: data.replace(b'"entries"', b'"entries'),
    "a list": lambda data: b"[]" + TRAILER.pack(MAGIC, 2),
    "deep JSON": lambda data: b"[" * 100_000 + TRAILER.pack(MAGIC, 100_000),
    "not UTF-8": lambda data: b"\xff\xff" + TRAILER.pack(MAGIC, 2),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    data = saved(tmp_path)
    path = tmp_path / "saved"
    path.write_bytes(data)
    assert Snapshot.load(path).entries == 3
    path.write_bytes(DAMAGES[name](data))
    with pytest.raises(SnapshotError, match="cannot be used as a snapshot"):
        Snapshot.load(path)


def test_a_large_index_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "saved"
    path.write_bytes(saved(tmp_path))
    monkeypatch.setattr("agentkit_environments.snapshot.MAX_INDEX_BYTES", 100)
    with pytest.raises(SnapshotError, match=r"its index has \d+ bytes, more than 100"):
        Snapshot.load(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2**63)
    | st.sampled_from(["work", "work/a", "tmp", "/etc", "dir", "file"]),
    lambda below: (
        st.lists(below, max_size=4) | st.dictionaries(st.sampled_from(["name", "kind", "size"]), below, max_size=4)
    ),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["work", "tmp", "work/a", "work/a/b", "work/../../a", "tmp/b", "work/b"]) | JSON,
        "kind": st.sampled_from(["dir", "file", "link", "hard", "fifo"]) | JSON,
        "mode": st.integers(0, 0o7777) | JSON,
        "mtime_ns": st.integers(0, 1 << 60) | JSON,
    },
    optional={
        "size": st.integers(0, 20) | JSON,
        "offset": st.integers(0, 20) | JSON,
        "target": st.sampled_from(["/etc", "work/a", "../x", ""]) | JSON,
        "extents": st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=3) | JSON,
        "owner": st.tuples(st.integers(0, 9), st.integers(0, 9)) | JSON,
    },
)
PLAIN = st.sampled_from(
    [
        {"name": "work", "kind": "dir", "mode": 493, "mtime_ns": 0},
        {"name": "tmp", "kind": "dir", "mode": 493, "mtime_ns": 0},
    ]
)


@settings(deadline=None)
@given(entries=st.lists(PLAIN | ENTRIES | JSON, max_size=6), content=st.binary(max_size=20), cut=st.integers(0, 12))
def test_any_bytes_are_a_snapshot_or_a_snapshot_error(entries: list[Any], content: bytes, cut: int) -> None:
    """And what is accepted stays inside the directories that it is unpacked into."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "snapshot")
        data = content + b"".join(index_bytes([json.dumps(entry).encode() for entry in entries], []))
        path.write_bytes(data[: len(data) - cut] if cut % 4 == 0 else data)
        try:
            snapshot = Snapshot.load(path)
        except SnapshotError:
            return
        path.unlink()
        for name in ("work", "tmp"):
            Path(folder, name).mkdir()
        with snapshot.descriptor() as fd, contextlib.suppress(OSError):
            unpack(fd, {"work": f"{folder}/work", "tmp": f"{folder}/tmp"})
        assert set(os.listdir(folder)) == {"work", "tmp"}


ENTRIES_OF_IMAGE = ENTRIES.map(
    lambda entry: {
        name: value.replace("work", "root", 1) if isinstance(value, str) else value for name, value in entry.items()
    }
)


@settings(deadline=None)
@given(
    entries=st.lists(ENTRIES_OF_IMAGE | JSON, max_size=6),
    removed=st.lists(st.sampled_from(["etc", "/etc", "..", "a/b", ""]) | st.text(max_size=5), max_size=3),
    content=st.binary(max_size=20),
)
def test_any_bytes_of_an_image_are_a_snapshot_or_a_snapshot_error(
    entries: list[Any], removed: list[str], content: bytes
) -> None:
    """And what is accepted is an archive whose names lead nowhere else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "snapshot")
        encoded = [json.dumps(entry).encode() for entry in [*ROOT, *entries]]
        path.write_bytes(content + b"".join(index_bytes(encoded, [], image=IMAGE, removed=removed)))
        try:
            snapshot = Snapshot.load(path)
        except SnapshotError:
            return
        assert snapshot.image == IMAGE
        with pytest.raises(SnapshotError, match="only such a sandbox can begin with it"), snapshot.descriptor():
            pass
        with snapshot.descriptor(IMAGE) as fd:
            index, _ = read_index(fd)
            data = b"".join(_archive("root", index["entries"], fd))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            names = archive.getnames()
        assert len(names) == len(index["entries"]) - 1
        for name in [*names, *index["removed"]]:
            assert name and not name.startswith("/") and not {"", ".", ".."} & {*name.split("/")}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SnapshotError, match="not a regular file"):
        Snapshot.load(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        Snapshot.load(tmp_path / "missing")
