"""Errors of a sandbox, as opposed to errors of a command inside one.

A failed command is a value (`ExecResult.exit_code`). A missing file is Python's own `OSError` (`FileNotFoundError`,
`IsADirectoryError`, ...). All other errors are listed below, and none of them may be shown to a model as command
output.

    SandboxError                    base of the tree
      SandboxUnavailableError       no sandbox can be opened here: what was tried, why it failed, what to do
        ImageBuildError             ... because the image cannot be built from its Dockerfile
        ImageMissingError           ... because the image that was asked for is not here and cannot be pulled
      ServiceError                  a service beside the sandbox did not start, or ended
      SandboxLostError              the sandbox died, was closed, or stopped answering
        HostFailureError            ... because the host or its engine failed, by evidence from outside the sandbox
      FileTooLargeError             a file is larger than the caller's bound
      UnsafePathError               a path that cannot name a file in a sandbox (empty, NUL byte, loop of links)
      SnapshotError                 an environment that cannot be captured, or a snapshot that cannot be used
      UnsafeArchiveError            an archive with absolute names, `..`, devices, escaping links, or too much content
"""

from __future__ import annotations


class SandboxError(Exception):
    """Base of every error of this package."""


class SandboxUnavailableError(SandboxError):
    """No sandbox can be opened; the message gives what was tried, why it failed and what to do."""


class ImageBuildError(SandboxUnavailableError):
    """An image cannot be built; the message names the Dockerfile and the step, and a base image that is missing."""


class ImageMissingError(SandboxUnavailableError):
    """The image that was asked for is missing and cannot be pulled; other images may still work."""


class ServiceError(SandboxError):
    """A service ended, became unhealthy, or was not ready in time; the message has its last output."""


class SandboxLostError(SandboxError):
    """The sandbox died, was closed, or stopped answering; its content is lost."""


class HostFailureError(SandboxLostError):
    """The sandbox is lost and evidence from outside it blames the host: the engine is gone, or memory ran out.

    A plain `SandboxLostError` has no such evidence, so the commands inside may have caused it.
    """


class FileTooLargeError(SandboxError):
    """A file has more bytes than the caller's `max_bytes`."""


class UnsafePathError(SandboxError):
    """A path that cannot name a file in a sandbox: empty, with a NUL byte, or a loop of links."""


class SnapshotError(SandboxError):
    """An environment that cannot be captured, or a snapshot that cannot be used; the message gives the reason."""


class UnsafeArchiveError(SandboxError):
    """An archive that must not be unpacked; the message names the entry and the rule it breaks."""
