"""The folder of a disk cache, and the key that signs its contents.

The state in a segment becomes the state of the model, so whoever can write a segment controls what the model generates.
Three rules keep other users out:

* The folder and every segment belong to the user of this process, and nobody else may write to them. Segments have mode
  0600, folders 0700, because token ids are text.
* Segments are regular files, opened relative to the folder's descriptor and never through a link.
* Each frame carries a keyed BLAKE2b hash. The key is 32 random bytes in the user's own state folder, outside the cache.
  A segment that was downloaded, unpacked or copied from another user is therefore not read, regardless of its mode.

None of this protects against somebody who can read the key or run code as this user.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agentkit_engine.errors import CacheFolderError
from agentkit_engine.untrusted import open_regular

KEY_BYTES = 32
DIGEST_BYTES = 16
SEGMENT_NAME = re.compile(r"\d{20}-\d+-[0-9a-f]{8}\.segment")
_NEW_KEY = "Remove it: a new one is made, and what was cached is computed again"
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Seal:
    """Signs the frames of one model folder. `context` is the folder's name, so a frame moved to another is invalid."""

    key: bytes
    context: bytes

    def sign(self, header: bytes) -> bytes:
        return hashlib.blake2b(self.context + b"\0" + header, key=self.key, digest_size=DIGEST_BYTES).digest()

    def signed(self, header: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(self.sign(header), signature)


def key_path() -> Path:
    """Return the path of this user's key: `$XDG_STATE_HOME/agentkit/cache.key`, by default in `~/.local/state`.

    Raises:
        CacheFolderError: the user has no home folder.
    """
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as exc:
        raise CacheFolderError(
            "the key of the disk cache has no place: this user has no home folder; set XDG_STATE_HOME to a folder "
            "of your own"
        ) from exc
    return Path(state) / "agentkit" / "cache.key"


def user_key() -> bytes:
    """Return this user's key, created on first use.

    Raises:
        CacheFolderError: it cannot be created or read, or others could read or change it.
    """
    path = key_path()
    try:
        with suppress(FileNotFoundError):
            return _read_key(path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            with suppress(FileExistsError):  # another process created one first; that one is used
                os.link(beside, path)
        finally:
            beside.unlink()
        return _read_key(path)
    except OSError as exc:
        raise CacheFolderError(
            f"the key of the disk cache, {path}, cannot be used: {exc.strerror}; set XDG_STATE_HOME to a writable "
            "folder of your own, or run without a cache folder"
        ) from exc


def _read_key(path: Path) -> bytes:
    with open_regular(path, follow=False) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise CacheFolderError(
                f"the key of the disk cache, {path}, has owner {status.st_uid} and mode {status.st_mode & 0o7777:04o}; "
                f"expected owner {os.geteuid()} and mode 0600, so that nobody else can read it. {_NEW_KEY}"
            )
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise CacheFolderError(
            f"the key of the disk cache, {path}, has {status.st_size} bytes, expected {KEY_BYTES}. {_NEW_KEY}"
        )
    return key


def check_usable(folder: Path) -> None:
    """Reject a cache folder that others may write to, and a key that cannot be used. A missing folder is fine.

    Raises:
        CacheFolderError: with what was found, what is expected and the command that fixes it.
    """
    user_key()
    with suppress(OSError), open_folder(folder):  # other problems are reported when the cache is written
        pass


@contextmanager
def open_folder(folder: Path, model: str | None = None, *, create: bool = False) -> Iterator[int]:
    """Yield a descriptor of a cache folder, or of the folder of `model` in it.

    Raises:
        CacheFolderError: it belongs to somebody else, or others may write to it.
        OSError: it does not exist and cannot be created, or is not a folder.
    """
    if create:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder, _FOLDER_FLAGS)
    try:
        _check_own(os.fstat(fd), folder)
        if model is not None:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(model, 0o700, dir_fd=fd)
            inner = os.open(model, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
            _check_own(os.fstat(fd), folder / model)
        yield fd
    finally:
        os.close(fd)


def _check_own(status: os.stat_result, folder: Path) -> None:
    uid = os.geteuid()
    if status.st_uid != uid:
        raise CacheFolderError(
            f"the cache folder {folder} belongs to user {status.st_uid}, expected {uid}, the user of this process: "
            "its owner could control what the model generates. Use a folder of your own"
        )
    if status.st_mode & 0o022:
        raise CacheFolderError(
            f"the cache folder {folder} has mode {status.st_mode & 0o7777:04o}, expected 0700: others could control "
            f"what the model generates. Run `chmod 700 {folder}` if you trust its contents, or use another folder"
        )


def segments(fd: int) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the segments in a folder: the user's own regular files, not writable by others, with the cache's names."""
    with os.scandir(fd) as entries:
        for entry in entries:
            if SEGMENT_NAME.fullmatch(entry.name):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process removed it
                    continue
                if is_own_file(status):
                    yield entry.name, status


def is_own_file(status: os.stat_result) -> bool:
    """Return whether a file is a regular one that only this user can have written."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
