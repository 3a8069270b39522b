"""The process sandbox: Linux namespaces on this machine's kernel, for machines without a container engine.

    harness ── enter.py ── bubblewrap, or unshare + build_root.py ── executor.py (PID 1) ── commands
               stops being root, if it was; dies with the harness       no capabilities, no new privileges

Needs either bubblewrap 0.8 or util-linux 2.36 (then also Linux 5.12), and a kernel that lets ordinary users make user
namespaces. What the sandbox sees: /usr and its aliases and the interpreter's own prefix, read-only; an /etc of a few
files; /proc and /dev of its own; an empty work directory and /tmp, in memory. What it does not see: the host's files,
home directories, processes, network, IPC. One user, uid 1000, without capabilities, who cannot gain privileges or make
user namespaces.

What it does not isolate: the kernel is the host's, without a system call filter; memory is bounded for each process
and processes are bounded in number, but there is no bound on CPU time nor on memory in total.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import anyio
import anyio.to_thread

from agentkit_environments.connection import Connection
from agentkit_environments.environment import (
    Environment,
    EnvironmentSpec,
    ExecRequest,
    ExecResult,
    FileOperation,
    Limits,
    input_bytes,
)
from agentkit_environments.errors import SandboxLostError, SandboxUnavailableError

Launcher = Literal["bwrap", "unshare"]

LAUNCHERS: tuple[Launcher, ...] = ("bwrap", "unshare")
START_TIMEOUT_S = 20.0
FILE_TIMEOUT_S = 60.0
HANG_TIMEOUT_S = 10.0
USER_ID = 1000
SHM_BYTES = 64 << 20
HOST_UIDS = range(0x6000_0000, 0x7000_0000)
"""Where the throw-away uid of a sandbox is taken from when the harness is root: far from users and subuid ranges."""

BIN = "/opt/agentkit/bin"
EXECUTOR = "/opt/agentkit/executor.py"
LIMITS = "/opt/agentkit/limits.json"
RUNTIME_ALIASES = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC = (
    *("alternatives", "ca-certificates", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "magic"),
    *("mime.types", "protocols", "services", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone"),
)
"""What programs need of the host's /etc, when it is there; each may be read by everyone."""
FILES = {
    "/etc/passwd": f"agent:x:{USER_ID}:{USER_ID}:agent:{{workdir}}:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "/etc/group": f"agent:x:{USER_ID}:\nnogroup:x:65534:\n",
    "/etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The root directory of a sandbox, as data: both launchers build the same one."""

    binds: list[str]
    """Directories and files of the host, read-only, each under its own name."""
    symlinks: list[tuple[str, str]]
    """(path, target)."""
    files: list[tuple[str, str]]
    """(path, text) of files that are written, read-only afterwards."""
    tmpfs: list[tuple[str, int]]
    """(path, bytes) of the directories that can be written."""
    prefix: str
    python: str

    @classmethod
    def of(cls, spec: EnvironmentSpec) -> Self:
        prefix = os.path.realpath(sys.base_prefix)
        python = os.path.realpath(f"{prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}")
        if prefix in ("/", "/home", "/root") or not python.startswith(prefix + "/"):
            raise SandboxUnavailableError(f"the interpreter's prefix {prefix!r} cannot be shown to a sandbox")
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
        return cls(
            binds=binds,
            symlinks=symlinks,
            files=[
                (EXECUTOR, _source("executor.py")),
                (LIMITS, json.dumps(_rlimits(spec.limits))),
                *((path, text.format(workdir=spec.workdir)) for path, text in FILES.items()),
            ],
            tmpfs=[("/dev/shm", SHM_BYTES), ("/tmp", disk_bytes), (spec.workdir, disk_bytes)],
            prefix=prefix,
            python=python,
        )


def launch_argv(spec: EnvironmentSpec, launcher: Launcher, file_fds: Mapping[str, int]) -> list[str]:
    """Return the command that becomes a sandbox with an executor in it.

    Args:
        spec: What to open.
        launcher: What builds it.
        file_fds: For bubblewrap, a descriptor for each of `Layout.files` that its text can be read from.
    """
    layout = Layout.of(spec)
    executor = [layout.python, "-I", "-S", EXECUTOR]
    build = _bwrap_argv if launcher == "bwrap" else _unshare_argv
    uid = str(secrets.choice(HOST_UIDS)) if os.geteuid() == 0 else "-"
    enter = [layout.python, "-I", "-S", str(Path(__file__).with_name("enter.py"))]
    return [*enter, str(os.getpid()), uid, layout.prefix, *build(spec, layout, executor, file_fds)]


def _bwrap_argv(spec: EnvironmentSpec, layout: Layout, executor: list[str], file_fds: Mapping[str, int]) -> list[str]:
    argv = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--as-pid-1"]
    argv += ["--new-session", "--clearenv", "--hostname", "sandbox", "--cap-drop", "ALL"]
    argv += ["--uid", str(USER_ID), "--gid", str(USER_ID)]
    for path in layout.binds:
        argv += ["--ro-bind", path, path]
    argv += ["--proc", "/proc", "--dev", "/dev"]
    for path, size_bytes in layout.tmpfs:
        mode = "0755" if path == spec.workdir else "1777"
        argv += ["--perms", mode, "--size", str(size_bytes), "--tmpfs", path]
    for path, _ in layout.files:
        argv += ["--perms", "0644", "--file", str(file_fds[path]), path]
    for path, target in layout.symlinks:
        argv += ["--symlink", target, path]
    return [*argv, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", spec.workdir, "--", *executor]


def _unshare_argv(spec: EnvironmentSpec, layout: Layout, executor: list[str], file_fds: Mapping[str, int]) -> list[str]:
    argv = ["unshare", "--user", "--map-user", str(USER_ID), "--map-group", str(USER_ID), "--keep-caps", "--mount"]
    argv += ["--pid", "--fork", "--kill-child=SIGKILL", "--net", "--ipc", "--uts", "--cgroup", "--"]
    root = {
        "binds": layout.binds,
        "symlinks": layout.symlinks,
        "files": layout.files,
        "tmpfs": layout.tmpfs,
        "workdir": spec.workdir,
        "hostname": "sandbox",
        "argv": executor,
    }
    return [*argv, layout.python, "-I", "-S", "-c", _source("build_root.py"), json.dumps(root)]


def _rlimits(limits: Limits) -> dict[str, int]:
    mib = 1 << 20
    return {
        "RLIMIT_AS": 4 * limits.memory_mib * mib,
        "RLIMIT_DATA": limits.memory_mib * mib,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_FSIZE": limits.file_size_mib * mib,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 64 << 10,
    }


@functools.cache
def _source(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


def launcher_failure(launcher: Launcher) -> str | None:
    """Return why `launcher` cannot make a sandbox here, or None when it can: it is tried once, for real.

    Blocks for some 50 ms the first time.
    """
    if sys.platform != "linux":
        return "namespaces are a Linux feature"
    return _trial_failure(launcher) if shutil.which(launcher) else f"{launcher} is not installed"


@functools.cache
def _trial_failure(launcher: Launcher) -> str | None:
    with _Files() as files:
        try:
            argv = launch_argv(EnvironmentSpec(), launcher, files.fds)
            tried = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=START_TIMEOUT_S,
                pass_fds=list(files.fds.values()),
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )
        except (SandboxUnavailableError, OSError, subprocess.TimeoutExpired) as error:
            return f"{launcher}: {error}"
    if tried.returncode != 0 or not tried.stdout:
        said = tried.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
        return f"{launcher} exited with {tried.returncode}: {said[0]}"
    return None


def process_failure() -> str | None:
    """Return why no process sandbox can be opened here, or None when one can."""
    failures = [launcher_failure(launcher) for launcher in LAUNCHERS]
    if None in failures:
        return None
    return f"{'; '.join(filter(None, failures))}. Install bubblewrap, and allow user namespaces to ordinary users"


class _Files:
    """The generated files of a sandbox's /etc, as descriptors for bubblewrap to read."""

    def __init__(self, spec: EnvironmentSpec | None = None) -> None:
        self.fds: dict[str, int] = {}
        for path, text in Layout.of(spec or EnvironmentSpec()).files:
            fd = os.memfd_create(path, os.MFD_CLOEXEC)
            os.write(fd, text.encode())
            os.lseek(fd, 0, os.SEEK_SET)
            self.fds[path] = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds.values():
            os.close(fd)


class ProcessEnvironment(Environment):
    """One sandbox of namespaces with one executor in it. See the module's docstring for what it isolates."""

    backend = "process"

    def __init__(self, spec: EnvironmentSpec, run_id: str, connection: Connection) -> None:
        self.spec, self.run_id = spec, run_id
        self._connection = connection
        self._env = {"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin", "HOME": spec.workdir, "LANG": "C.UTF-8"}

    @classmethod
    async def open(cls, spec: EnvironmentSpec, run_id: str, *, launcher: Launcher | None = None) -> Self:
        """Open a sandbox with the first launcher that works here, or with the one given.

        Raises:
            SandboxUnavailableError: If none works, or `spec` asks for an image or a network.
        """
        if spec.image is not None or spec.network != "none":
            raise SandboxUnavailableError(
                f"the process sandbox has no images and no network, got image={spec.image!r}, "
                f"network={spec.network!r}: use the docker backend"
            )
        for candidate in (launcher,) if launcher else LAUNCHERS:
            if await anyio.to_thread.run_sync(launcher_failure, candidate) is None:
                return cls(spec, run_id, await _launch(spec, candidate))
        reason = launcher_failure(launcher) if launcher else process_failure()
        raise SandboxUnavailableError(f"no process sandbox can be opened here: {reason}")

    async def _exec(self, request: ExecRequest) -> ExecResult:
        if request.user is not None:
            raise ValueError(f"a process sandbox has one user; user={request.user!r} needs the docker backend")
        fields = {
            "argv": request.argv,
            "cwd": request.cwd,
            "env": {**self._env, **request.env},
            "timeout_s": request.timeout_s,
            "max_output_bytes": request.max_output_bytes,
        }
        stdin = self._fitting(input_bytes(request.stdin))
        answer_s = None if request.timeout_s is None else request.timeout_s + HANG_TIMEOUT_S
        header, body = await self._connection.request("exec", fields, stdin, answer_s)
        return ExecResult(
            exit_code=header["exit_code"],
            stdout=body[: header["stdout"]].decode("utf-8", "replace"),
            stderr=body[header["stdout"] :].decode("utf-8", "replace"),
            truncated=header["truncated"],
            timed_out=header["timed_out"],
            duration_s=header["duration_s"],
        )

    async def _file(self, operation: FileOperation, path: str, body: bytes = b"", **bounds: int) -> bytes:
        fields = {"path": path, **bounds}
        return (await self._connection.request(operation, fields, self._fitting(body), FILE_TIMEOUT_S))[1]

    async def kill_all(self) -> None:
        try:
            await self._connection.request("kill_all", {}, b"", HANG_TIMEOUT_S)
        except TimeoutError as error:
            raise SandboxLostError(f"the sandbox is gone: {error.strerror}") from error

    async def close(self) -> None:
        await self._connection.close()

    def _fitting(self, data: bytes) -> bytes:
        """Refuse what the executor, which lives under the sandbox's own memory limit, could not hold."""
        if len(data) > self.spec.limits.memory_mib << 18:
            raise ValueError(
                f"{len(data)} bytes are more than a quarter of limits.memory_mib = {self.spec.limits.memory_mib}"
            )
        return data


async def _launch(spec: EnvironmentSpec, launcher: Launcher) -> Connection:
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 (the connection closes it)
    connection: Connection | None = None
    try:
        with _Files(spec) as files:
            process = await anyio.open_process(
                launch_argv(spec, launcher, files.fds),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={"PATH": os.environ.get("PATH", os.defpath)},
                start_new_session=True,
                pass_fds=list(files.fds.values()),
            )
        connection = Connection(process, stderr)
        with anyio.fail_after(START_TIMEOUT_S):
            await connection.ready()
        return connection
    except BaseException as error:
        if connection is not None:
            await connection.close()
        stderr.close()
        if isinstance(error, TimeoutError | SandboxLostError):
            raise SandboxUnavailableError(f"the sandbox did not start with {launcher}: {error}") from error
        raise
