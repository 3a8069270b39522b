"""`reap` may run as root on a world-writable directory: it removes our leftovers and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentkit_environments import reap
from agentkit_environments.docker import docker_failure
from agentkit_environments.docker.engine import BASE_IMAGE, OWNER_LABEL, RUN_LABEL
from agentkit_environments.leftovers import PREFIX, reap_local, remove_tree
from agentkit_environments.owner import is_orphan, owner_token

DEAD = "/".join([owner_token().split("/")[0], str(os.getpid()), "1"])
"""The token of a dead process of this machine with this process's id."""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the system's temporary directory."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A directory that looks like one of ours and must stay as it is."""
    path = tmp_path / "precious"
    leftover(path)
    return path


def leftover(path: Path) -> Path:
    (path / "work" / "d").mkdir(parents=True)
    (path / "work" / "d" / "f").write_text("x")
    (path / "owner").write_text(f"{DEAD}\nrun\n")
    return path


def content(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


WHOLE = ["owner", "work", "work/d", "work/d/f"]


def test_leftovers_of_a_dead_harness_are_removed(shared: Path) -> None:
    leftover(shared / f"{PREFIX}dead")
    (leftover(shared / f"{PREFIX}alive") / "owner").write_text(f"{owner_token()}\nrun\n")
    leftover(shared / "of-somebody-else")
    assert reap_local(None) == 1
    assert sorted(os.listdir(shared)) == [f"{PREFIX}alive", "of-somebody-else"]
    assert reap_local("other") == 0
    assert reap_local("run") == 1
    assert os.listdir(shared) == ["of-somebody-else"]


@pytest.mark.parametrize(
    "token",
    [
        "",
        "/",
        "///",
        "a/b/c",
        "a/1/2/3",
        DEAD + "/x",
        DEAD.replace(f"/{os.getpid()}/", "/-1/"),
        DEAD.replace(f"/{os.getpid()}/", "/../"),
        DEAD.replace(f"/{os.getpid()}/", "/²/"),
        DEAD.replace(f"/{os.getpid()}/", f"/{'9' * 5000}/"),
        DEAD.replace(f"/{os.getpid()}/", "/1 /"),
        DEAD + "\n",
        "elsewhere" + DEAD,
    ],
    ids=map(str, range(13)),
)
def test_malformed_tokens_are_not_orphans(token: str) -> None:
    assert not is_orphan(token)
    assert is_orphan(DEAD)


def fifo(owner: Path) -> None:
    os.mkfifo(owner)


def chain(owner: Path) -> None:
    (owner.parent / "real").write_text(f"{DEAD}\nrun\n")
    owner.symlink_to("real")


@pytest.mark.parametrize(
    "make",
    [
        fifo,
        chain,
        lambda owner: owner.mkdir(),
        lambda owner: owner.symlink_to("owner"),
        lambda owner: owner.symlink_to("/dev/zero"),
        lambda owner: owner.write_text(""),
        lambda owner: owner.write_text("\n\n"),
        lambda owner: owner.write_text(DEAD),
        lambda owner: owner.write_text(f"{DEAD}\nrun\nmore\n"),
        lambda owner: owner.write_text("a/b/c\nrun\n"),
        lambda owner: owner.write_text(f"{DEAD}\n" + "x" * (1 << 20)),
        lambda owner: owner.write_bytes(b"\xff\xfe\nrun\n"),
        lambda owner: owner.write_bytes(b"\0" * 100),
        lambda owner: None,
    ],
)
def test_a_malformed_owner_file_is_left_alone(shared: Path, make: Callable[[Path], object]) -> None:
    bad = leftover(shared / f"{PREFIX}bad")
    (bad / "owner").unlink()
    make(bad / "owner")
    good = leftover(shared / f"{PREFIX}good")
    assert reap_local(None) == 1
    assert (bad / "work" / "d" / "f").read_text() == "x"
    assert not good.exists()


@pytest.mark.parametrize("kind", ["link", "file", "fifo", "dangling"])
def test_a_directory_with_only_the_name_is_left_alone(shared: Path, precious: Path, kind: str) -> None:
    path = shared / f"{PREFIX}x"
    if kind == "file":
        path.write_text("x")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(precious if kind == "link" else "gone")
    assert reap_local(None) == reap_local("run") == 0
    assert os.path.lexists(path)
    assert content(precious) == WHOLE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else_is_left_alone(shared: Path) -> None:
    theirs, mixed = leftover(shared / f"{PREFIX}theirs"), leftover(shared / f"{PREFIX}mixed")
    os.chown(theirs, 12345, 12345)
    os.chown(mixed / "owner", 12345, 12345)
    assert reap_local(None) == reap_local("run") == 0
    assert content(theirs) == content(mixed) == WHOLE


@contextlib.contextmanager
def flipping(path: Path, target: Path) -> Iterator[None]:
    """Alternate `path` between a directory and a link to `target` while the block runs."""
    done = threading.Event()
    aside = path.parent / "aside"

    def flip() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                os.rename(path, aside)
            with contextlib.suppress(OSError):
                os.symlink(target, path)
            with contextlib.suppress(OSError):
                os.unlink(path)
            with contextlib.suppress(OSError):
                os.rename(aside, path)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_flipped_link_in_place_of_the_directory_leads_nowhere(shared: Path, precious: Path) -> None:
    flipped = shared / f"{PREFIX}flipped"
    with flipping(flipped, precious):
        for _ in range(300):
            if not os.path.lexists(flipped) and not (shared / "aside").exists():
                if not (shared / "fresh").exists():
                    leftover(shared / "fresh")
                with contextlib.suppress(OSError):  # made elsewhere, or it could be made behind the link
                    os.rename(shared / "fresh", flipped)
            reap_local(None)
    assert content(precious) == WHOLE


def test_a_flipped_link_inside_the_directory_leads_nowhere(shared: Path, precious: Path) -> None:
    for _ in range(100):
        root = leftover(shared / f"{PREFIX}x")
        with flipping(root / "work", precious):
            reap_local("run")
        with contextlib.suppress(OSError):  # the flipper may have put something back at the last moment
            remove_tree(root)
        assert content(precious) == WHOLE


def test_links_and_permissions_inside_do_not_stop_removal(shared: Path, precious: Path) -> None:
    root = leftover(shared / f"{PREFIX}x")
    (root / "work" / "out").symlink_to(precious)
    (root / "work" / "up").symlink_to("../../..")
    os.mkfifo(root / "work" / "pipe")
    os.link(precious / "owner", root / "hard")
    (root / "work" / "d").chmod(0)
    (root / "work").chmod(0o500)
    assert reap_local(None) == 1
    assert os.listdir(shared) == []
    assert content(precious) == WHOLE
    assert (precious / "owner").read_text() == f"{DEAD}\nrun\n"


@pytest.mark.anyio
async def test_reap_survives_malformed_leftovers(shared: Path) -> None:
    bad = shared / f"{PREFIX}bad"
    bad.mkdir()
    os.mkfifo(bad / "owner")
    assert await reap("no-such-run") == 0


@pytest.mark.docker
def test_the_first_container_of_a_process_removes_those_of_dead_harnesses() -> None:
    if (reason := docker_failure()) is not None:
        pytest.skip(f"docker: {reason}")
    names = []
    for owner in (DEAD, owner_token()):
        labels = ["--label", f"{RUN_LABEL}=left-behind", "--label", f"{OWNER_LABEL}={owner}"]
        names.append(docker("create", *labels, BASE_IMAGE, "true"))
    try:
        opening = "import anyio, agentkit_environments as e; anyio.run(lambda: e.open_environment(backend='docker'))"
        subprocess.run([sys.executable, "-c", opening], check=True, capture_output=True)
        assert docker("ps", "-aq", "--no-trunc", "--filter", f"label={RUN_LABEL}=left-behind") == names[1]
    finally:
        docker("rm", "-f", *names)


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False).stdout.strip()
