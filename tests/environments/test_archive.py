"""Checks on the content of archives."""

from __future__ import annotations

import io
import tarfile

import pytest

from agentkit_environments import UnsafeArchiveError, check_archive
from agentkit_environments.archive import rebase_archive


def tar(*entries: tuple[str, bytes, str] | tuple[str, bytes, str, bytes], mode: str = "w") -> bytes:
    """Return an archive of (name, type, link target[, content])."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, kind, target, *content in entries:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            data = content[0] if content else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


FILE, DIRECTORY, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def test_an_ordinary_archive_passes() -> None:
    data = tar(
        ("d", DIRECTORY, ""),
        ("d/f", FILE, "", b"text"),
        ("./g", FILE, ""),
        ("link", LINK, "d/f"),
        ("d/up", LINK, "../g"),
        ("d/there-and-back", LINK, "../d/../g"),
        ("dangling", LINK, "nowhere"),
        ("to-dir", LINK, "d"),
        ("hard", HARD, "d/f"),
    )
    assert [member.name for member in check_archive(data)][:3] == ["d", "d/f", "./g"]
    assert check_archive(tar()) == []


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([("/abs", FILE, "")], "/abs"),
        ([("../up", FILE, "")], r"\.\./up"),
        ([("a/../../up", FILE, "")], "without"),
        ([("a/..", DIRECTORY, "")], "without"),
        ([("dev", tarfile.CHRTYPE, "")], "neither"),
        ([("dev", tarfile.BLKTYPE, "")], "neither"),
        ([("pipe", tarfile.FIFOTYPE, "")], "neither"),
        ([("l", LINK, "/etc/passwd")], "absolute"),
        ([("l", LINK, "..")], "leads out"),
        ([("d/l", LINK, "../../x")], "leads out"),
        ([("l", LINK, "l")], "loop"),
        ([("a", LINK, "b"), ("b", LINK, "a")], "loop"),
        ([("d/dot", LINK, "."), ("d/l", LINK, "dot/../../x")], "leads out"),
        ([("deep/er/s", LINK, "../.."), ("l", LINK, "deep/er/s/../x")], "leads out"),
        ([("l", LINK, "d"), ("l/f", FILE, "")], "passes through"),
        ([("l", LINK, "d"), ("l/m/f", FILE, "")], "passes through"),
        ([("h", HARD, "/etc/passwd")], "hard link"),
        ([("h", HARD, "../x")], "hard link"),
        ([("h", HARD, "later"), ("l", LINK, "x")], "hard link"),
        ([("l", LINK, "x"), ("h", HARD, "l")], "hard link"),
    ],
)
def test_an_escape_is_refused(entries: list[tuple[str, bytes, str]], said: str) -> None:
    with pytest.raises(UnsafeArchiveError, match=said):
        check_archive(tar(*entries))


def test_bombs_are_refused_before_they_are_read() -> None:
    with pytest.raises(UnsafeArchiveError, match="more than 10 entries"):
        check_archive(tar(*[(f"f{number}", FILE, "") for number in range(11)]), max_entries=10)
    with pytest.raises(UnsafeArchiveError, match="more than 99 bytes"):
        check_archive(tar(("a", FILE, "", b"x" * 50), ("b", FILE, "", b"x" * 50)), max_bytes=99)
    claim = tarfile.TarInfo("huge")
    claim.size = 1 << 60
    with pytest.raises(UnsafeArchiveError, match="more than"):
        check_archive(claim.tobuf())
    sparse = tarfile.TarInfo("sparse")
    sparse.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(UnsafeArchiveError):
        check_archive(sparse.tobuf(format=tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UnsafeArchiveError, match="not an uncompressed tar"):
        check_archive(tar(("f", FILE, "", bytes(1 << 20)), mode="w:gz"))


@pytest.mark.parametrize("data", [b"x", b"x" * 4096, tar(("f", FILE, "", b"x" * 9000))[:5000]])
def test_data_that_is_not_an_archive_is_refused(data: bytes) -> None:
    with pytest.raises(UnsafeArchiveError):
        check_archive(data)


def test_rebase_lists_every_directory_once_and_before_its_content() -> None:
    data = tar(
        ("./a/b/f", FILE, ""), ("a", DIRECTORY, ""), ("a/g", FILE, ""), ("c/d", DIRECTORY, ""), ("c/d/f", FILE, "")
    )
    with tarfile.open(fileobj=io.BytesIO(rebase_archive(data))) as archive:
        assert archive.getnames() == ["a", "a/b", "a/b/f", "a/g", "c", "c/d", "c/d/f"]


def test_rebase_moves_names_and_hard_links() -> None:
    data = tar(("b", FILE, "", b"b"), ("a", HARD, "b"), ("l", LINK, "b"))
    rebased = rebase_archive(data, prefix="new/place", uid=7)
    with tarfile.open(fileobj=io.BytesIO(rebased)) as archive:
        members = {member.name: member for member in archive}
    assert list(members) == ["new", "new/place", "new/place/b", "new/place/l", "new/place/a"]
    assert members["new/place/a"].linkname == "new/place/b"
    assert members["new/place/l"].linkname == "b"
    assert {member.uid for member in members.values()} == {7}
