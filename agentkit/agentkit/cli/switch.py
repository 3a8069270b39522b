"""Change several files of a folder in one step: prepare them in a stage directory, move them in, undo on failure."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

STAGE_PREFIX = ".agentkit-apply-"
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors raised by file systems without hard links."""


class NotUndoneError(Exception):
    """A change failed and could not be undone completely; the message names where the originals are."""


class Switch:
    """A context manager of file operations that are undone in reverse order when the block raises.

    New files are created in `stage`, a directory inside the folder and so on the same file system; replaced files are
    moved there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undo: list[Callable[[], None]] = []
        self._old = self._new = 0

    def __enter__(self) -> Self:
        self.stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=self._folder))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is not None:
            failures = []
            for undo in reversed(self._undo):
                try:
                    undo()
                except OSError as error:
                    failures.append(f"{error.filename2 or error.filename}: {error.strerror}")
            if failures:
                raise NotUndoneError(
                    f"{exc}; not everything could be restored ({'; '.join(failures)}); the missing originals are in "
                    f"{self.stage}"
                ) from exc
        shutil.rmtree(self.stage, ignore_errors=True)

    def write(self, content: bytes) -> Path:
        """Write a regular file into the stage and return its path."""
        path = self._next()
        with open(path, "xb") as file:
            file.write(content)
        return path

    def link(self, target: str) -> Path:
        """Create a symbolic link in the stage and return its path."""
        path = self._next()
        path.symlink_to(target)
        return path

    def move_away(self, path: Path) -> Path:
        """Move a file or link into the stage and return its new path."""
        self._old += 1
        kept = self.stage / f"old-{self._old}"
        self._undo.append(lambda: place(kept, path) if os.path.lexists(kept) else None)
        os.rename(path, kept)
        return kept

    def place(self, prepared: Path, path: Path) -> None:
        """Move a prepared file to `path`, which must not exist."""
        ours = prepared.lstat()

        def undo() -> None:
            if os.path.lexists(path) and os.path.samestat(path.lstat(), ours):
                os.unlink(path)

        self._undo.append(undo)
        place(prepared, path)

    def make_parents(self, path: Path) -> None:
        """Create the missing parent directories of a path."""
        missing = []
        while not os.path.lexists(path := path.parent):
            missing.append(path)
        for directory in reversed(missing):
            os.mkdir(directory)
            self._undo.append(lambda directory=directory: os.rmdir(directory))  # type: ignore[misc]

    def remove_empty(self, directory: Path) -> None:
        """Remove an empty directory."""
        before = directory.lstat()
        os.rmdir(directory)

        def undo() -> None:
            os.mkdir(directory)
            with contextlib.suppress(PermissionError):
                os.chown(directory, before.st_uid, before.st_gid)
            os.chmod(directory, before.st_mode & 0o7777)

        self._undo.append(undo)

    def _next(self) -> Path:
        self._new += 1
        return self.stage / f"new-{self._new}"


def place(source: Path, target: Path) -> None:
    """Move a file or link from the stage to `target`. Raises FileExistsError if the target exists."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.rename(source, target)
