"""The user's own folder in a sandbox: under an overlay if possible, else as a copy.

An overlay starts at once and takes no space for unchanged files, but it needs the process backend, a
recent kernel, and files that all belong to the user (`agentkit_environments.overlay`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from agentkit.cli.listing import Listing, ignored_directories, list_folder
from agentkit.cli.overlay import compare_upper
from agentkit.cli.terminal import say, visible_line
from agentkit.cli.workdir import Change, File, compare, pack, read_files
from agentkit_environments import Environment, SandboxUnavailableError
from agentkit_environments.overlay import Overlay, mounts_in, owner_in_sandbox
from agentkit_environments.process import ProcessEnvironment
from agentkit_evals.verify import Backend, backend_for, opened

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.task import Task

PIECE_FILES, PIECE_BYTES = 2_000, 16 << 20
SECRETS = (".env", ".netrc", ".npmrc", ".pypirc", ".git-credentials", "id_rsa", "id_ecdsa", "id_ed25519")
EXAMPLES = (".example", ".sample", ".template", ".dist")


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder in an open sandbox."""

    folder: Path
    environment: Environment
    listing: Listing
    copied: Mapping[str, File] | None
    """The copy that the agent got; None with an overlay."""
    left_out: list[str]
    """One line for each entry of the folder that the agent does not see, although git does not ignore it."""

    async def changes(self) -> tuple[list[Change], list[str], bytes | None]:
        """Return the agent's changes, one line for each entry that was left out, and the archive of a copy.

        Raises:
            UnsafeArchiveError: The agent's files, or its changes, are too many or too large.
            SandboxLostError: The sandbox is gone.
        """
        if self.copied is None:
            assert isinstance(self.environment, ProcessEnvironment)
            there = await self.environment.upper_directories()
            skip = await anyio.to_thread.run_sync(ignored_directories, self.folder, self.listing, there)
            upper = await self.environment.export_upper(skip)
            changed, left_out = await anyio.to_thread.run_sync(compare_upper, self.folder, self.listing, upper)
            skipped = [visible_line(f"{path}/: new, and ignored by git") for path in skip]
            return changed, [*self.left_out, *left_out, *skipped], None
        most = 2 * len(self.copied) + 50_000
        exported = await self.environment.export_dir(self.environment.spec.workdir, max_entries=most)
        changed, left_out = compare(self.folder, self.listing, self.copied, exported.data, exported.dropped)
        return changed, [*self.left_out, *left_out], exported.data


@asynccontextmanager
async def open_workspace(
    task: Task, backend: Backend | None, folder: Path, console: Console, *, include_ignored: bool, copy: bool
) -> AsyncIterator[Workspace]:
    """Open a sandbox of the task's specification with `folder` as its work directory; print how and how fast it opened.

    `folder` is an absolute path without links.

    Raises:
        typer.BadParameter: The folder cannot be listed, or is too large to copy.
        SandboxUnavailableError: No sandbox can be opened.
    """
    started = time.monotonic()
    where = backend_for(task, backend)
    # HOME is the work directory by default, and programs would leave their caches there.
    variables = {"HOME": "/tmp", **task.environment.env}
    task = task.model_copy(update={"environment": task.environment.model_copy(update={"env": variables})})
    listing = await anyio.to_thread.run_sync(lambda: list_folder(folder, include_ignored=include_ignored))
    why = "--include-ignored was given" if include_ignored else "git does not ignore it"
    for path in filter(_is_secret, listing.files):
        say(console, f"The agent can read {visible_line(path)}, because {why}.", "yellow")
    reason = "--copy was given" if copy else _no_overlay(task, where, folder, listing)
    async with AsyncExitStack() as stack:
        if reason is None:
            try:
                overlay = Overlay(str(folder), tuple(listing.hidden))
                layered = await ProcessEnvironment.open(task.environment.spec(), secrets.token_hex(6), overlay=overlay)
            except SandboxUnavailableError as error:
                reason = str(error).splitlines()[-1]
            else:
                stack.push_async_callback(_close, layered)
                text = (
                    f"{folder}: {len(listing.files):,} files through an overlay, {len(listing.hidden):,} entries hidden"
                )
                say(console, f"{text} ({time.monotonic() - started:.1f} s)", "dim")
                yield Workspace(folder, layered, listing, None, listing.left_out)
                return
        files, unread = await anyio.to_thread.run_sync(read_files, folder, listing, reason)
        environment = await stack.enter_async_context(opened(task, where))
        await _copy(environment, files, console)
        text = f"{folder}: {len(files):,} files ({-(-listing.size >> 20):,} MiB) copied, because {reason}"
        say(console, f"{text} ({time.monotonic() - started:.1f} s)", "dim")
        yield Workspace(folder, environment, listing, files, [*listing.left_out, *unread])


async def _close(environment: Environment) -> None:
    with suppress(Exception):  # keep the result of the block
        await environment.close()


def _is_secret(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name in SECRETS or (name.startswith(".env.") and not name.endswith(EXAMPLES))


def _no_overlay(task: Task, backend: Backend, folder: Path, listing: Listing) -> str | None:
    """Return the reason why no overlay is possible, or None if one can be tried."""
    if backend not in ("auto", "process"):
        return f"the {backend} backend has no overlay"
    if task.environment.image is not None or task.environment.spec().network.is_public:
        return "the task's image or network needs the docker backend"
    if task.verifier is not None:
        return "the task's verifier needs a copy"
    if listing.owners - {owner_in_sandbox(str(folder))}:
        return "some files belong to another user or group"
    if mounted := mounts_in(Overlay(str(folder), tuple(listing.hidden))):
        return f"something is mounted at {visible_line(mounted[0])}"
    return None


async def _copy(environment: Environment, files: Mapping[str, File], console: Console) -> None:
    """Copy files into the work directory, with a progress bar on a terminal."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("copying", total=len(files))
        for piece in _pieces(files):
            await environment.import_dir(environment.spec.workdir, await anyio.to_thread.run_sync(pack, piece))
            progress.advance(bar, len(piece))


def _pieces(files: Mapping[str, File]) -> Iterator[dict[str, File]]:
    """Split files into parts that are small enough for one archive. All links are in the last part, because an archive
    is checked with the links in it."""
    piece: dict[str, File] = {}
    size = 0
    for path, file in files.items():
        if file.link is not None:
            continue
        if len(piece) == PIECE_FILES or size + len(file.content) > PIECE_BYTES:
            yield piece
            piece, size = {}, 0
        piece[path] = file
        size += len(file.content)
    yield {**piece, **{path: file for path, file in files.items() if file.link is not None}}
