"""Removal of the temporary directories of `unsafe-local` and of containers with an allowlist (`docker/handover.py`).

Every user of the machine can write there, and the harness may run as root, so nothing there is trusted. A name is
opened once without following a link, the directory must belong to this user, and every further step uses descriptors.
Replacing a name meanwhile has no effect, since no path is resolved twice.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from agentkit_environments import executor
from agentkit_environments.owner import is_orphan

PREFIX = "agentkit-local-"
OWNER_FILE = "owner"
MAX_OWNER_BYTES = 4096
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def reap_local(run_id: str | None) -> int:
    """Remove the directories and processes of `run_id`, or of every dead harness; return how many directories.

    Directories that belong to another user, have an unexpected form or cannot be removed are left alone.
    """
    count = 0
    with _directory(tempfile.gettempdir()) as temporary:
        for name in os.listdir(temporary):
            if name.startswith(PREFIX):
                with contextlib.suppress(OSError, ValueError), _directory(name, dir_fd=temporary) as root:
                    owner, run = _read_owner(root)
                    if run == run_id if run_id is not None else is_orphan(owner):
                        executor.kill_processes(cookie=name)
                        _empty(root)
                        os.rmdir(name, dir_fd=temporary)
                        count += 1
    return count


def remove_tree(root: Path) -> None:
    """Remove a tree of any depth, even if a command has removed permissions from its directories."""
    with contextlib.suppress(FileNotFoundError):  # reaped meanwhile by another process
        os.chmod(root, 0o700)
        with _directory(str(root)) as descriptor:
            _empty(descriptor)
        os.rmdir(root)


@contextlib.contextmanager
def _directory(name: str, dir_fd: int | None = None) -> Iterator[int]:
    descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_owner(root: int) -> list[str]:
    """Return the lines of a directory's owner file. Raises OSError or ValueError if this package did not make them."""
    _require_ours(root)
    descriptor = os.open(OWNER_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
    try:
        _require_ours(descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("the owner file is not a regular file")
        text = os.read(descriptor, MAX_OWNER_BYTES + 1)
        if len(text) > MAX_OWNER_BYTES:
            raise ValueError(f"the owner file has more than {MAX_OWNER_BYTES} bytes")
        return text.decode("utf-8").splitlines()
    finally:
        os.close(descriptor)


def _require_ours(descriptor: int) -> None:
    owner = os.fstat(descriptor).st_uid
    if owner != os.geteuid():
        raise PermissionError(f"belongs to user {owner}")


def _empty(root: int) -> None:
    """Remove everything in a directory.

    Subdirectories are moved up to `root` instead of being entered, so neither the stack nor a path grows with the
    depth.
    """
    pending = ["."]
    while pending:
        name = pending.pop()
        try:
            descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=root)
        except NotADirectoryError:  # replaced by a link meanwhile
            os.unlink(name, dir_fd=root)
            continue
        try:
            for entry in os.listdir(descriptor):
                try:
                    os.unlink(entry, dir_fd=descriptor)
                except IsADirectoryError:
                    _open_up(entry, descriptor)
                    pending.append(secrets.token_hex(8))
                    os.rename(entry, pending[-1], src_dir_fd=descriptor, dst_dir_fd=root)
        finally:
            os.close(descriptor)
        if name != ".":
            os.rmdir(name, dir_fd=root)


def _open_up(name: str, dir_fd: int) -> None:
    """Give the owner all permissions on a directory. No `chmod` refuses links, so it goes through `/proc`."""
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)
