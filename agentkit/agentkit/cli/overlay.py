"""Find the agent's changes to a folder under an overlay, from the overlay's upper layer alone."""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from agentkit.cli.listing import KINDS, Listing, above_all, signature
from agentkit.cli.terminal import visible_line
from agentkit.cli.workdir import Change, File, file_of, is_skipped, read_file, without_ignored
from agentkit_environments import ExportedDir, UnsafeArchiveError
from agentkit_environments.archive import link_problems
from agentkit_environments.environment import MAX_ARCHIVE_BYTES
from agentkit_environments.executor import OPAQUE


@dataclass(frozen=True, slots=True)
class UpperLayer:
    """The content of an upper layer."""

    files: dict[str, File] = field(default_factory=dict)
    """Changed and new files and links, and files that were only copied because their attributes changed."""
    replaced: set[str] = field(default_factory=set)
    """Paths at which the folder's entry, with everything below it, was deleted or replaced."""
    directories: set[str] = field(default_factory=set)


def unpack_upper(archive: bytes) -> UpperLayer:
    """Return the content of an archive from `ProcessEnvironment.export_upper`, without `.git`."""
    layer = UpperLayer()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for entry in tar:
            path = str(PurePosixPath(entry.name))
            if is_skipped(path):
                continue
            if entry.isdir():
                layer.directories.add(path)
                if OPAQUE in entry.pax_headers:
                    layer.replaced.add(path)
                continue
            layer.replaced.add(path)
            if not entry.ischr():
                layer.files[path] = file_of(tar, entry)
    return layer


def compare_upper(folder: Path, listing: Listing, exported: ExportedDir) -> tuple[list[Change], list[str]]:
    """Return the agent's changes to `folder`, and one line for each entry that was left out.

    Args:
        folder: The user's folder, which the agent saw through an overlay.
        listing: The listing of the folder from when the overlay was made.
        exported: The result of `ProcessEnvironment.export_upper`.

    Raises:
        UnsafeArchiveError: The agent changed or deleted more than can be compared.
    """
    layer = unpack_upper(exported.data)
    gone = [path for path in listing.files if path not in layer.files and _is_gone(path, layer)]
    left_out = [visible_line(line) for line in exported.dropped]
    for path, problem in _bad_links(folder, listing, layer, gone).items():
        left_out.append(visible_line(f"{path}: {problem}"))
        del layer.files[path]
    sizes = (listing.files[path][1] for path in {*gone, *layer.files} if path in listing.files)
    if sum(sizes) > MAX_ARCHIVE_BYTES:
        raise UnsafeArchiveError(
            f"the agent changed or deleted files of more than {MAX_ARCHIVE_BYTES >> 20} MiB, too much to compare"
        )
    wanted: list[Change] = []
    for path in sorted({*gone, *layer.files}):
        # the folder has nothing below a link: the agent has replaced the link with a directory
        is_below_link = any((folder / above).is_symlink() for above in above_all(path))
        before, after = None if is_below_link else read_file(folder / path), layer.files.get(path)
        is_stale = (None if is_below_link else _signature(folder / path)) != listing.files.get(path)
        if before == KINDS[stat.S_IFDIR] and path not in listing.files:
            before, is_stale = None, False  # a file replaces a directory, whose files are among `gone`
        if isinstance(before, str):
            left_out.append(visible_line(f"{path}: it is {before} in your folder"))
        elif before != after:
            wanted.append(Change(path, before, after, is_stale))
    wanted, ignored = without_ignored(folder, listing, wanted)
    return wanted, [*left_out, *ignored]


def _is_gone(path: str, layer: UpperLayer) -> bool:
    """Return whether a file of the folder that is not in the upper layer was deleted or replaced."""
    return (
        path in layer.directories or path in layer.replaced or any(above in layer.replaced for above in above_all(path))
    )


def _bad_links(folder: Path, listing: Listing, layer: UpperLayer, gone: Iterable[str]) -> Mapping[str, str]:
    """Return the changed links that lead out of the folder or form a loop, each with the reason."""
    ours = {path: file.link for path, file in layer.files.items() if file.link is not None}
    if not ours:
        return {}
    links = {path: _target(folder / path) for path, (mode, *_) in listing.files.items() if stat.S_ISLNK(mode)}
    for path in gone:
        links.pop(path, None)
    problems = link_problems({**links, **ours})
    return {path: problem for path, problem in problems.items() if path in ours and ours[path] != links.get(path)}


def _target(path: Path) -> str:
    found = read_file(path)
    return found.link or "" if isinstance(found, File) else ""


def _signature(path: Path) -> object:
    try:
        return signature(path.lstat())
    except OSError:
        return None
