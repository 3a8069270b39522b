"""The process sandbox: Linux namespaces on this machine's kernel, for machines without a container engine.

    harness ── enter.py ── bubblewrap, or unshare + build_root.py ── executor.py (PID 1) ── commands
               drops root; dies with the harness                        no capabilities, no new privileges

Needs bubblewrap 0.8, or util-linux 2.36 with Linux 5.12, and a kernel that lets ordinary users make user namespaces.
The sandbox sees /usr and its aliases and the interpreter's own prefix, read-only; a few files in /etc; its own /proc
and /dev; an empty work directory and /tmp, in memory. It does not see the host's files, home directories, processes,
network or IPC. It has one user, uid 1000, who has no capabilities and cannot gain privileges or make user namespaces.

System calls that no command needs are forbidden (`seccomp.py`). Memory, processes and CPU time are bounded in total
where a control group can be made (`cgroups.py`): as root nearly everywhere, as another user in a delegated subtree.
Elsewhere memory is bounded for each process, files and System V IPC in total, and CPU time not at all.

The kernel is not isolated: it is the host's.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import json
import marshal
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tarfile import TarInfo
from typing import IO, Any, Literal, Self

import anyio
import anyio.to_thread

from agentkit_environments.archive import ExportedDir, pieces
from agentkit_environments.cgroups import CommandGroup
from agentkit_environments.connection import FILE_TIMEOUT_S, START_TIMEOUT_S, Connection, ProcessPeer
from agentkit_environments.environment import (
    MAX_ARCHIVE_BYTES,
    MAX_ARCHIVE_ENTRIES,
    Environment,
    EnvironmentSpec,
    ExecRequest,
    ExecResult,
    FileOperation,
    ResourceLimits,
)
from agentkit_environments.errors import SandboxLostError, SandboxUnavailableError, SnapshotError, UnsafeArchiveError
from agentkit_environments.overlay import Overlay, hidden_names
from agentkit_environments.proxy import PORT, receive_listener
from agentkit_environments.seccomp import AUDIT_ARCH, INOTIFY, SYSV_IPC, UNACCOUNTED, seccomp_program
from agentkit_environments.snapshot import Snapshot
from agentkit_environments.tree import TMP, WORK

Launcher = Literal["bwrap", "unshare", "bwrap-plain"]

LAUNCHERS: tuple[Launcher, ...] = ("bwrap", "unshare", "bwrap-plain")
"""Launchers in order of preference. `bwrap-plain` is for machines with a policy (some AppArmor policies) that
removes all capabilities from the programs that bubblewrap starts. There, numbers of files are not bounded, and
inotify is missing."""
KILLED = 128 + signal.SIGKILL
USER_ID = 1000
SHM_BYTES = 64 << 20
INODES_PER_MIB = 256
"""Files and directories for each MiB of a writable directory; each takes about 1 KiB of kernel memory."""
EXECUTOR_BYTES = 1 << 30
MACHINE = platform.machine()
HOST_UIDS = range(0x6000_0000, 0x7000_0000)
"""Range of the throw-away uid of a sandbox when the harness is root: far from users and subuid ranges."""

BIN = "/opt/agentkit/bin"
CONFINE = "/opt/agentkit/confine.py"
SETTINGS = "/opt/agentkit/settings.json"
RUNTIME_ALIASES = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC = (
    *("alternatives", "ca-certificates", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "magic"),
    *("mime.types", "protocols", "services", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone"),
)
"""Files and directories of the host's /etc that programs need; all are world-readable, and each is optional."""
FILES = {
    "/etc/passwd": f"agent:x:{USER_ID}:{USER_ID}:agent:{{workdir}}:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "/etc/group": f"agent:x:{USER_ID}:\nnogroup:x:65534:\n",
    "/etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
}
HIDDEN = ("/proc/keys", "/proc/key-users")
"""These list every key of the same host user."""
NAMESPACE_LIMITS: dict[str, int | str] = {
    **{f"user/max_{kind}_namespaces": 0 for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")},
    "user/max_inotify_instances": 16,
    "user/max_inotify_watches": 16384,
    "user/max_fanotify_groups": 0,
    "user/max_fanotify_marks": 0,
}
"""Limits on other resources that all sandboxes of one user share; files of /proc/sys."""
IPC_LIMITS: dict[str, int | str] = {
    "kernel/shm_rmid_forced": 1,  # a segment ends with the last process that uses it
    "kernel/shmmax": SHM_BYTES,
    "kernel/shmall": SHM_BYTES >> 12,
    "kernel/shmmni": 256,
    "kernel/msgmax": 8192,
    "kernel/msgmnb": 16384,
    "kernel/msgmni": 32,
    "kernel/sem": "250 4000 32 128",
    "fs/mqueue/queues_max": 16,
}
"""Limits on System V IPC and message queues, in pages of 4 KiB, bytes and numbers; files of /proc/sys."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The root directory of a sandbox as data. Both launchers build the same one, and `confine.py` completes it."""

    binds: list[tuple[str, str]]
    """(path on the host, path in the sandbox) of directories and files, read-only."""
    symlinks: list[tuple[str, str]]
    """(path, target)."""
    files: list[tuple[str, str]]
    """(path, text) of generated files, which are read-only in the sandbox."""
    tmpfs: list[tuple[str, str, int]]
    """(path, mode, bytes) of the writable directories."""
    prefix: str
    python: str
    folder: str | None
    """The lower layer of an overlay."""

    @classmethod
    def of(
        cls,
        spec: EnvironmentSpec,
        launcher: Launcher,
        group: CommandGroup,
        overlay: Overlay | None = None,
        hidden_fd: int | None = None,
        snapshot_fd: int | None = None,
        proxy_fd: int | None = None,
    ) -> Self:
        prefix = os.path.realpath(sys.base_prefix)
        python = os.path.realpath(f"{prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}")
        if prefix in ("/", "/home", "/root") or not python.startswith(prefix + "/"):
            raise SandboxUnavailableError(f"the interpreter's prefix {prefix!r} cannot be mounted in a sandbox")
        binds, symlinks = ["/usr"], [(f"{BIN}/python3", python), (f"{BIN}/python", python), ("/var/tmp", "/tmp")]
        for alias in RUNTIME_ALIASES:
            if os.path.islink(alias):
                symlinks.append((alias, os.readlink(alias)))
            elif os.path.isdir(alias):
                binds.append(alias)
        if not prefix.startswith("/usr"):
            binds.append(prefix)
        binds += [path for path in (f"/etc/{name}" for name in ETC) if os.path.exists(path)]
        disk_bytes = spec.limits.disk_mib << 20
        tmpfs = [("/dev/shm", "1777", SHM_BYTES), ("/tmp", "1777", disk_bytes)]
        settings = _settings(spec, launcher, group)
        pairs = [(path, path) for path in binds]
        if overlay is None:
            tmpfs.append((spec.workdir, "0755", disk_bytes))
        else:
            pairs.append((overlay.folder, spec.workdir))
            options = _tmpfs_options("0700", disk_bytes)
            settings["overlay"] = {"path": spec.workdir, "options": options, "hidden_fd": hidden_fd}
        settings["snapshot_fd"] = snapshot_fd
        settings["proxy"] = None if proxy_fd is None else {"fd": proxy_fd, "port": PORT}
        settings["tmpfs"] = [(path, _tmpfs_options(mode, size)) for path, mode, size in tmpfs]
        return cls(
            binds=pairs,
            symlinks=symlinks,
            files=[
                (CONFINE, _source("confine.py")),
                (SETTINGS, json.dumps(settings)),
                *((path, text.format(workdir=spec.workdir)) for path, text in FILES.items()),
            ],
            tmpfs=tmpfs,
            prefix=prefix,
            python=python,
            folder=None if overlay is None else overlay.folder,
        )


def launch_argv(layout: Layout, launcher: Launcher, file_fds: Mapping[str, int]) -> list[str]:
    """Return the command that becomes a sandbox with an executor in it.

    Args:
        layout: The content of its root directory.
        launcher: The program that builds it.
        file_fds: For bubblewrap, a descriptor with the text of each of `Layout.files`.
    """
    executor = [layout.python, "-I", "-S", CONFINE]
    build = {"bwrap": _bwrap_argv, "bwrap-plain": _bwrap_plain_argv, "unshare": _unshare_argv}[launcher]
    uid = str(secrets.choice(HOST_UIDS)) if os.geteuid() == 0 else "-"
    enter = [layout.python, "-I", "-S", str(Path(__file__).with_name("enter.py"))]
    return [*enter, str(os.getpid()), uid, layout.prefix, layout.folder or "-", *build(layout, executor, file_fds)]


def _bwrap_argv(layout: Layout, executor: list[str], file_fds: Mapping[str, int]) -> list[str]:
    # `confine.py` drops the capabilities again, and forbids further user namespaces, before the first command runs.
    writable = [argument for path, _, _ in layout.tmpfs for argument in ("--dir", path)]
    return _bwrap_with(["--cap-add", "ALL"], writable, layout, executor, file_fds)


def _bwrap_plain_argv(layout: Layout, executor: list[str], file_fds: Mapping[str, int]) -> list[str]:
    writable = [
        argument
        for path, mode, size_bytes in layout.tmpfs
        for argument in ("--perms", mode, "--size", str(size_bytes), "--tmpfs", path)
    ]
    for path in filter(os.path.exists, HIDDEN):
        writable += ["--ro-bind", "/dev/null", path]
    return _bwrap_with(["--cap-drop", "ALL", "--disable-userns"], writable, layout, executor, file_fds)


def _bwrap_with(
    privileges: list[str], writable: list[str], layout: Layout, executor: list[str], file_fds: Mapping[str, int]
) -> list[str]:
    argv = ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--as-pid-1"]
    argv += ["--new-session", "--clearenv", "--hostname", "sandbox", *privileges]
    argv += ["--uid", str(USER_ID), "--gid", str(USER_ID)]
    for source, target in layout.binds:
        argv += ["--ro-bind", source, target]
    argv += ["--proc", "/proc", "--dev", "/dev", *writable]
    for path, _ in layout.files:
        argv += ["--perms", "0644", "--file", str(file_fds[path]), path]
    for path, target in layout.symlinks:
        argv += ["--symlink", target, path]
    return [*argv, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--", *executor]


def _unshare_argv(layout: Layout, executor: list[str], file_fds: Mapping[str, int]) -> list[str]:
    argv = ["unshare", "--user", "--map-user", str(USER_ID), "--map-group", str(USER_ID), "--keep-caps", "--mount"]
    argv += ["--pid", "--fork", "--kill-child=SIGKILL", "--net", "--ipc", "--uts", "--cgroup", "--"]
    root = {
        "binds": layout.binds,
        "symlinks": layout.symlinks,
        "files": layout.files,
        "directories": [path for path, _, _ in layout.tmpfs],
        "hostname": "sandbox",
        "argv": executor,
    }
    return [*argv, layout.python, "-I", "-S", "-c", _source("build_root.py"), json.dumps(root)]


def _tmpfs_options(mode: str, size_bytes: int) -> str:
    return f"mode={mode},size={size_bytes},nr_inodes={(size_bytes >> 20) * INODES_PER_MIB}"


def _settings(spec: EnvironmentSpec, launcher: Launcher, group: CommandGroup) -> dict[str, Any]:
    """Return the settings for `confine.py` and the executor, without the mounts."""
    limits = spec.limits
    memory = () if group.bounds_memory else tuple(UNACCOUNTED)
    ipc = () if group.bounds_memory else tuple(SYSV_IPC)
    return {
        "workdir": spec.workdir,
        "has_capabilities": launcher != "bwrap-plain",
        "overlay": None,
        "hidden": HIDDEN,
        "modules": {name: _compiled(f"{name}.py") for name in ("executor", "tree")},
        "trees": {WORK: spec.workdir, TMP: "/tmp"},
        "namespace_limits": NAMESPACE_LIMITS,
        "ipc_limits": IPC_LIMITS,
        "filters": {
            "": _filter(memory),
            "ipc": _filter((*memory, *ipc)),
            "ipc inotify": _filter((*memory, *ipc, *INOTIFY)),
        },
        "rlimits": _rlimits(limits),
        "executor_rlimits": {
            **_rlimits(limits),
            "RLIMIT_AS": 4 * EXECUTOR_BYTES,
            "RLIMIT_DATA": EXECUTOR_BYTES,
            "RLIMIT_NPROC": limits.processes + 1,
            "RLIMIT_NOFILE": 4096,
        },
        "cgroup_fds": group.procs_fds,
    }


@functools.cache
def _filter(missing: tuple[str, ...]) -> str:
    if MACHINE not in AUDIT_ARCH:
        raise SandboxUnavailableError(
            f"the process sandbox has a system call filter for {' and '.join(AUDIT_ARCH)} only, not for {MACHINE}"
        )
    return seccomp_program(MACHINE, missing).hex()


def _rlimits(limits: ResourceLimits) -> dict[str, int]:
    mib = 1 << 20
    return {
        "RLIMIT_AS": 4 * limits.memory_mib * mib,
        "RLIMIT_DATA": limits.memory_mib * mib,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_FSIZE": limits.file_size_mib * mib,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 64 << 10,
        "RLIMIT_MSGQUEUE": 800 << 10,
        "RLIMIT_SIGPENDING": 4096,
    }


@functools.cache
def _compiled(name: str) -> str:
    # Compressed, because `unshare` gets it as part of one argument, of which the kernel takes 128 KiB.
    return base64.b64encode(zlib.compress(marshal.dumps(compile(_source(name), name, "exec")))).decode()


@functools.cache
def _source(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


def launcher_failure(launcher: Launcher) -> str | None:
    """Return the reason why `launcher` cannot make a sandbox here, or None if a trial run succeeds.

    Blocks for about 50 ms the first time.
    """
    if sys.platform != "linux":
        return "namespaces are a Linux feature"
    program = "unshare" if launcher == "unshare" else "bwrap"
    return _trial_failure(launcher) if shutil.which(program) else f"{program} is not installed"


@functools.cache
def _trial_failure(launcher: Launcher) -> str | None:
    try:
        layout = Layout.of(EnvironmentSpec(), launcher, CommandGroup())
    except SandboxUnavailableError as error:
        return f"{launcher}: {error}"
    with _Files(layout) as files:
        argv = launch_argv(layout, launcher, files.fds)
        try:
            tried = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=START_TIMEOUT_S,
                pass_fds=list(files.fds.values()),
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{launcher}: {error}"
    if tried.returncode != 0 or not tried.stdout:
        said = tried.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        return f"{launcher} exited with {tried.returncode}: {said[0]}"
    return None


def process_failure() -> str | None:
    """Return the reason why no process sandbox can be opened here, or None if one can."""
    failures = [launcher_failure(launcher) for launcher in LAUNCHERS]
    if None in failures:
        return None
    reasons = "; ".join(dict.fromkeys(filter(None, failures)))  # two launchers may use the same program
    return f"{reasons}. Install bubblewrap, and allow user namespaces to ordinary users"


class _Files:
    """The generated files of a sandbox's /etc, as descriptors for bubblewrap to read."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.fds: dict[str, int] = {}
        for path, text in layout.files:
            fd = os.memfd_create(path, os.MFD_CLOEXEC)
            with open(fd, "wb", closefd=False) as file:
                file.write(text.encode())
            os.lseek(fd, 0, os.SEEK_SET)
            self.fds[path] = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds.values():
            os.close(fd)


class ProcessEnvironment(Environment):
    """One sandbox made of namespaces, with one executor in it. The module's docstring lists what is isolated."""

    backend = "process"

    def __init__(
        self,
        spec: EnvironmentSpec,
        run_id: str,
        connection: Connection,
        group: CommandGroup,
        *,
        launcher: Launcher,
        has_overlay: bool,
    ) -> None:
        self.spec, self.run_id = spec, run_id
        self._connection, self._group, self._launcher, self._has_overlay = connection, group, launcher, has_overlay
        self._handles = count()
        self._env = {"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin", "HOME": spec.workdir, "LANG": "C.UTF-8"}

    @classmethod
    async def open(
        cls,
        spec: EnvironmentSpec,
        run_id: str,
        *,
        launcher: Launcher | None = None,
        overlay: Overlay | None = None,
        snapshot: Snapshot | None = None,
    ) -> Self:
        """Open a sandbox with the given launcher, or with the first one that works here.

        Args:
            spec: The specification of the environment.
            run_id: Label of everything that the environment creates.
            launcher: The program that builds the sandbox.
            overlay: The folder that the work directory shows. Default: an empty work directory.
            snapshot: The files to start with; not with an overlay.

        Raises:
            SnapshotError: If the snapshot cannot be restored.
            SandboxUnavailableError: If no launcher works, `spec` requests an image or a public network, or the kernel,
                the file system or a policy permits no overlay.
        """
        if spec.image is not None or spec.network.is_public:
            wanted = "a public network" if spec.image is None else f"image {spec.image!r}"
            raise SandboxUnavailableError(
                f"{wanted} needs the docker backend: the process sandbox has no images and no public network"
            )
        for candidate in (launcher,) if launcher else LAUNCHERS:
            if await anyio.to_thread.run_sync(launcher_failure, candidate) is None:
                if overlay is not None and candidate == "bwrap-plain":
                    raise SandboxUnavailableError("a policy of this machine permits no mounts in a sandbox")
                group = CommandGroup.create(spec.limits)
                connection, listener = await _launch(spec, candidate, group, overlay, snapshot)
                environment = cls(spec, run_id, connection, group, launcher=candidate, has_overlay=overlay is not None)
                await environment._serve_proxy(listener)
                return environment
        reason = launcher_failure(launcher) if launcher else process_failure()
        raise SandboxUnavailableError(f"no process sandbox can be opened here: {reason}")

    async def _exec(self, request: ExecRequest) -> ExecResult:
        if request.user is not None:
            raise ValueError(f"a process sandbox has one user; user={request.user!r} needs the docker backend")
        kills_before = self._group.kills()
        result = await self._connection.exec(request, {**self._env, **self._proxy_variables, **request.env})
        if result.exit_code == KILLED and not result.timed_out and self._group.kills() > kills_before:
            memory_mib = self.spec.limits.memory_mib
            reason = f"killed: the sandbox's {memory_mib} MiB of memory, which its files share, were used up\n"
            return replace(result, stderr=result.stderr + reason)
        return result

    async def _file(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        fields = {"path": path, **bounds}
        return (await self._connection.request(operation, fields, body, FILE_TIMEOUT_S))[1]

    async def upper_directories(self) -> list[str]:
        """Return the directories in the overlay's upper layer: new directories, and directories with changes in them.

        Raises:
            ValueError: If the environment was opened without an overlay.
            SandboxLostError: If the sandbox is gone.
        """
        self._require_overlay()
        _, body = await self._connection.request("upper_directories", {}, b"", FILE_TIMEOUT_S)
        return [os.fsdecode(name) for name in body.split(b"\0")[:-1]]

    async def export_upper(self, skip: Sequence[str] = ()) -> ExportedDir:
        """Return the upper layer of the overlay, which holds what commands have changed, as a tar archive.

        As in any archive of an overlay's layer, a whiteout (a deleted entry of the folder) is a character device 0/0,
        and an opaque directory (which replaces one of the folder) has the attribute `user.overlay.opaque`. New entries
        at hidden names are left out. Kill all processes first.

        Args:
            skip: Directories of the layer to leave out without reporting them.

        Raises:
            ValueError: If the environment was opened without an overlay.
            UnsafeArchiveError: If the layer has more than `MAX_ARCHIVE_ENTRIES` entries or more than
                `MAX_ARCHIVE_BYTES` bytes of files and names.
            SandboxLostError: If the sandbox is gone.
        """
        self._require_overlay()
        try:
            bounds = {"max_entries": MAX_ARCHIVE_ENTRIES, "max_bytes": MAX_ARCHIVE_BYTES}
            return await self._export_archive({"path": "", "skip": list(skip), **bounds})
        except OSError as error:
            if error.errno in (errno.EFBIG, errno.ENOMEM):
                raise UnsafeArchiveError(f"the changes are too large: {error.strerror}") from error
            raise

    def _require_overlay(self) -> None:
        if not self._has_overlay:
            raise ValueError("the environment has no overlay; use export_dir")

    async def reopen(self, snapshot: Snapshot) -> ProcessEnvironment:
        return await self._in_this_phase(
            type(self).open(self.spec, self.run_id, launcher=self._launcher, snapshot=snapshot)
        )

    async def _pack(self, file: IO[bytes], *, max_entries: int, max_bytes: int) -> None:
        if self._has_overlay:
            raise SnapshotError("the work directory is an overlay of a folder, which a snapshot cannot hold")
        await self._export({"path": None, "max_entries": max_entries, "max_bytes": max_bytes}, file.write)

    async def _export_dir(self, path: str, *, max_entries: int, max_bytes: int) -> ExportedDir:
        return await self._export_archive({"path": path, "max_entries": max_entries, "max_bytes": max_bytes})

    async def _export_archive(self, what: Mapping[str, Any]) -> ExportedDir:
        data = bytearray()
        dropped = await self._export(what, data.extend)
        return ExportedDir(bytes(data), dropped)

    async def _export(self, what: Mapping[str, Any], take: Callable[[bytes], object]) -> tuple[str, ...]:
        """Pass each piece of an export to `take`, and return the lines about what was left out."""
        request, export = self._connection.request, {"handle": next(self._handles)}
        await request("export_open", {**export, **what}, b"", FILE_TIMEOUT_S)
        try:
            while True:
                header, piece = await request("export_next", export, b"", FILE_TIMEOUT_S)
                if not piece:
                    return tuple(header["dropped"])
                take(piece)
        finally:
            with anyio.CancelScope(shield=True), contextlib.suppress(SandboxLostError):
                await request("export_close", export, b"", FILE_TIMEOUT_S)

    async def _import_dir(self, path: str, archive: bytes, members: Sequence[TarInfo]) -> None:
        for entries, content in pieces(archive, members):
            await self._connection.request("import_dir", {"path": path, "entries": entries}, content, FILE_TIMEOUT_S)

    async def kill_all(self) -> None:
        await self._connection.kill_all()

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._connection.close()
            await anyio.to_thread.run_sync(self._group.remove)
            await self._close_proxy()


async def _launch(
    spec: EnvironmentSpec,
    launcher: Launcher,
    group: CommandGroup,
    overlay: Overlay | None = None,
    snapshot: Snapshot | None = None,
) -> tuple[Connection, socket.socket | None]:
    """Start a sandbox. Returns the connection to its executor and, with an allowlist, the proxy's listening socket."""
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 (the connection closes it)
    connection: Connection | None = None
    channel, far_channel = socket.socketpair() if spec.network.has_allowlist else (None, None)
    proxy_fd = None if far_channel is None else far_channel.fileno()
    try:
        with (
            far_channel or contextlib.nullcontext(),
            hidden_names(overlay) as hidden_fd,
            contextlib.nullcontext() if snapshot is None else snapshot.descriptor() as snapshot_fd,
            _Files(Layout.of(spec, launcher, group, overlay, hidden_fd, snapshot_fd, proxy_fd)) as files,
        ):
            optional = (fd for fd in (hidden_fd, snapshot_fd, proxy_fd) if fd is not None)
            passed = [*files.fds.values(), *group.procs_fds, *optional]
            process = await anyio.open_process(
                launch_argv(files.layout, launcher, files.fds),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={"PATH": os.environ.get("PATH", os.defpath)},
                start_new_session=True,
                pass_fds=passed,
            )
        connection = Connection(ProcessPeer(process, stderr, group.host_failure))
        with anyio.fail_after(START_TIMEOUT_S):
            await connection.ready()
        group.close_descriptors()
        return connection, None if channel is None else receive_listener(channel)
    except BaseException as error:
        if connection is not None:
            await connection.close()
        stderr.close()
        group.remove()
        if isinstance(error, TimeoutError | SandboxLostError):
            raise SandboxUnavailableError(f"the sandbox did not start with {launcher}: {error}") from error
        raise
    finally:
        if channel is not None:
            channel.close()
