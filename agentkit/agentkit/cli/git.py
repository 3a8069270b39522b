"""Run git on the user's folder, without hooks and without environment variables about another repository."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

QUIET = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
"""Options that disable hooks and file system monitors, which are programs that a repository can choose."""
ELSEWHERE = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE"),
    *("GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_PREFIX", "GIT_CEILING_DIRECTORIES", "GIT_LITERAL_PATHSPECS"),
)
"""Variables that are not passed on, because they point to another repository. Git sets them for its hooks."""


class GitError(Exception):
    """Git failed, or is not installed; the message is the first line of git's own message."""

    def __init__(self, message: str, status: int = 127) -> None:
        super().__init__(message)
        self.status = status


class NotACheckoutError(GitError):
    """The folder is not in a git checkout."""


def git(folder: Path, *arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> bytes:
    """Return the standard output of a git command.

    Args:
        folder: The folder to run it in.
        arguments: The command.
        stdin: Its standard input.
        env: Additional variables.

    Raises:
        NotACheckoutError: The folder is not in a git checkout.
        GitError: The command failed, or git is not installed.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    variables = {**inherited, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", **(env or {})}
    argv = ["git", *QUIET, "-C", str(folder), *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, input=stdin, env=variables)
    except OSError as error:
        raise GitError(f"git cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit status {done.returncode}"]
        kind = NotACheckoutError if "not a git repository" in said[0] else GitError
        raise kind(said[0].removeprefix("fatal: "), done.returncode)
    return done.stdout


def names(output: bytes) -> list[str]:
    """Return the NUL-terminated names in the output of a git command."""
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def listed(paths: Iterable[str]) -> bytes:
    """Return paths in the form that git reads with `-z --stdin`."""
    return b"".join(os.fsencode(path) + b"\0" for path in paths)
