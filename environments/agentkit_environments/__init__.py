"""Sandboxes for commands: one contract (`environment.Environment`), several backends."""

from agentkit_environments.archive import ExportedDir, check_archive
from agentkit_environments.deferred import DeferredEnvironment
from agentkit_environments.environment import (
    MAX_ARCHIVE_BYTES,
    MAX_ARCHIVE_ENTRIES,
    MAX_STDIN_BYTES,
    Backend,
    Environment,
    EnvironmentSpec,
    ExecResult,
    ResourceLimits,
)
from agentkit_environments.errors import (
    FileTooLargeError,
    HostFailureError,
    ImageBuildError,
    ImageMissingError,
    SandboxError,
    SandboxLostError,
    SandboxUnavailableError,
    ServiceError,
    SnapshotError,
    UnsafeArchiveError,
    UnsafePathError,
)
from agentkit_environments.live_output import OnOutput, OutputStream
from agentkit_environments.network import Network, NetworkPolicy, Phase
from agentkit_environments.opening import available_backends, open_environment, reap
from agentkit_environments.pool import EnvironmentPool
from agentkit_environments.snapshot import Snapshot

__all__ = [
    "MAX_ARCHIVE_BYTES",
    "MAX_ARCHIVE_ENTRIES",
    "MAX_STDIN_BYTES",
    "Backend",
    "DeferredEnvironment",
    "Environment",
    "EnvironmentPool",
    "EnvironmentSpec",
    "ExecResult",
    "ExportedDir",
    "FileTooLargeError",
    "HostFailureError",
    "ImageBuildError",
    "ImageMissingError",
    "Network",
    "NetworkPolicy",
    "OnOutput",
    "OutputStream",
    "Phase",
    "ResourceLimits",
    "SandboxError",
    "SandboxLostError",
    "SandboxUnavailableError",
    "ServiceError",
    "Snapshot",
    "SnapshotError",
    "UnsafeArchiveError",
    "UnsafePathError",
    "available_backends",
    "check_archive",
    "open_environment",
    "reap",
]
