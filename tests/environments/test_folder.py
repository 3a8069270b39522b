"""Folders of this machine on their way into a sandbox: the hash names the content, and the archive has all of it."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from agentkit_environments import UnsafeArchiveError, check_archive
from agentkit_environments.folder import folder_hash, image_tag, pack_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "folder"
    (place / "sub").mkdir(parents=True)
    (place / "a").write_text("1")
    (place / "sub" / "b").write_text("2")
    (place / "link").symlink_to("a")
    return place


def relink(folder: Path) -> None:
    (folder / "link").unlink()
    (folder / "link").symlink_to("b")


def unlink(folder: Path) -> None:
    (folder / "link").unlink()
    (folder / "link").write_text("a")


def write(path: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_text(text)


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": write("a", "2"),
    "name": lambda folder: (folder / "a").rename(folder / "c"),
    "executable bit": lambda folder: (folder / "a").chmod(0o755),
    "target of a link": relink,
    "file for a link": unlink,
    "empty folder": lambda folder: (folder / "new").mkdir(),
    "place": lambda folder: (folder / "a").rename(folder / "sub" / "a"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_has_another_hash(folder: Path, change: Callable[[Path], object]) -> None:
    before = folder_hash(folder)
    change(folder)
    assert folder_hash(folder) != before


def test_times_and_the_place_of_the_folder_do_not_matter(folder: Path) -> None:
    before = folder_hash(folder)
    os.utime(folder / "a", (0, 0))
    assert folder_hash(folder.rename(folder.with_name("elsewhere"))) == before
    assert image_tag(before) == f"agentkit-build:{before}"


def test_an_archive_has_everything(folder: Path) -> None:
    (folder / "a").chmod(0o755)
    data = pack_folder(folder)
    assert [member.name for member in check_archive(data)] == ["a", "link", "sub", "sub/b"]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getmember("a").mode == 0o755 and archive.getmember("link").linkname == "a"
        content = archive.extractfile("sub/b")
        assert content is not None and content.read() == b"2"


def test_what_cannot_be_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("agentkit_environments.folder.MAX_ARCHIVE_BYTES", 1)
        with pytest.raises(UnsafeArchiveError, match="more than 1 bytes"):
            pack_folder(folder)
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsafeArchiveError, match="pipe is not a file, a folder or a link"):
        pack_folder(folder)
    with pytest.raises(OSError, match="not a file, a folder or a link"):
        folder_hash(folder)
    with pytest.raises(FileNotFoundError):
        folder_hash(folder / "nowhere")
