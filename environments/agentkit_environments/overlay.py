"""A folder of the host as the work directory of a process sandbox, without copying it.

    lower   the folder, read-only                                files that commands have not changed
    upper   a private layer in the sandbox's memory              changed files, new files, whiteouts
    merged  the work directory that commands see                 a whiteout hides an entry of the folder

`hidden` names are whiteouts from the beginning. `confine.py` mounts the overlay (Linux 6.6: `tmpfs` with extended
attributes); no command can unmount it, and no path leads to a layer. The executor reads the upper layer through a
descriptor (`ProcessEnvironment.export_upper`).

The kernel does not define what an overlay shows of an entry that is changed in the lower layer. Today, commands see
such a change unless they have changed the same file, and they see entries that appear in the folder later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Overlay:
    """The lower layer of an overlay.

    Attributes:
        folder: Absolute path of a directory of the host, without links.
        hidden: Relative paths that the sandbox does not see. No path is below another.
    """

    folder: str
    hidden: tuple[str, ...] = ()


def owner_in_sandbox(folder: str) -> tuple[int, int]:
    """Return the host's user and group that the commands of a sandbox on this folder are mapped to.

    A sandbox has one user and one group, so commands cannot change the files of other users in place.
    """
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    info = os.stat(folder)  # `enter.py` maps the folder's owner to the sandbox's throw-away uid
    return info.st_uid, info.st_gid


def mounts_in(overlay: Overlay) -> list[str]:
    """Return the relative paths of mounts in the folder, except hidden ones.

    An overlay would show the directory below a mount instead of its content.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        points = [re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), line.split()[4]) for line in file]
    inside = [os.path.relpath(point, overlay.folder) for point in map(os.fsdecode, points)]
    hidden = frozenset(overlay.hidden)
    return [path for path in inside if path.split("/")[0] not in (".", "..") and not _is_hidden(path, hidden)]


def _is_hidden(path: str, hidden: frozenset[str]) -> bool:
    while path and path not in hidden:
        path = path.rpartition("/")[0]
    return bool(path)


@contextmanager
def hidden_names(overlay: Overlay | None) -> Iterator[int | None]:
    """Yield a descriptor of a file with the hidden names, NUL-terminated, for `confine.py`."""
    if overlay is None:
        yield None
        return
    fd = os.memfd_create("hidden", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(b"".join(os.fsencode(name) + b"\0" for name in overlay.hidden))
        yield fd
    finally:
        os.close(fd)
