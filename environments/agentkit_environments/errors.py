"""Everything that can go wrong with a sandbox, as opposed to with a command inside one.

A command that fails is a value (`ExecResult.exit_code`); a file that is not there is Python's own `OSError`
(`FileNotFoundError`, `IsADirectoryError`, ...). What is left is below, and none of it may be shown to a model as if
a command had printed it.

    SandboxError                    base of the tree
      SandboxUnavailableError       no sandbox can be opened here: what was tried, why it failed, what to do
      SandboxLostError              the sandbox died, was closed, or stopped answering
        HostFailureError            ... because the host or its engine failed, by evidence from outside the sandbox
      FileTooLargeError             a file is larger than the caller's bound
      UnsafePathError               a path that no sandbox should be asked for (empty, NUL byte, too deep in links)
      UnsafeArchiveError            an archive with absolute names, `..`, devices, escaping links, or too much in it
"""

from __future__ import annotations


class SandboxError(Exception):
    """Base of every error of this package."""


class SandboxUnavailableError(SandboxError):
    """No sandbox can be opened; the message says what was tried, why it failed and what to do."""


class SandboxLostError(SandboxError):
    """The sandbox died, was closed, or stopped answering; nothing it held can be had any more."""


class HostFailureError(SandboxLostError):
    """The sandbox is lost and evidence from outside it blames the host: the engine is gone, or memory ran out.

    A plain `SandboxLostError` carries no such evidence, so what ran inside may have caused it.
    """


class FileTooLargeError(SandboxError):
    """A file has more bytes than the caller's `max_bytes`."""


class UnsafePathError(SandboxError):
    """A path that cannot name a file in a sandbox: empty, with a NUL byte, or a loop of links."""


class UnsafeArchiveError(SandboxError):
    """An archive that must not be unpacked; the message names the entry and the rule it breaks."""
