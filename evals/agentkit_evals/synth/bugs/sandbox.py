"""A package's repository in one sandbox: change files, run tests, reset, without opening the sandbox again.

The layout is that of the exported tasks: the repository is the work directory, and the test runner is in `TOOLS`,
outside it. Tests run with `python3 -S`, so that packages installed on the machine are not imported. Python writes no
bytecode: a file that changes twice within a second would otherwise run in its old form.
"""

from __future__ import annotations

import ast
import functools
import gzip
import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from agentkit_environments import Environment, EnvironmentSpec, ResourceLimits, open_environment
from agentkit_evals.errors import PackageError
from agentkit_evals.repository import TestStatus, parse_log
from agentkit_evals.synth.bugs.package import Package
from agentkit_evals.verify import Backend

Runner = Literal["pytest", "unittest"]
WORKDIR = "/workspace"
TOOLS = "/tmp/agentkit-tools"
LIMITS = ResourceLimits(memory_mib=2048, disk_mib=512, processes=256)
MAX_OUTPUT_BYTES = 4 << 20
GIT_TIMEOUT_S = 60.0

IDENTITY = {
    "GIT_AUTHOR_NAME": "agentkit",
    "GIT_AUTHOR_EMAIL": "agentkit@localhost",
    "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "agentkit",
    "GIT_COMMITTER_EMAIL": "agentkit@localhost",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
}
"""Variables that make a commit's id depend on its files alone."""
COMMIT = "git init -q -b main && git add -A -f && git commit -q -m 'Start of the task'"
UNITTEST = (
    "import unittest; unittest.main(None, "
    "testRunner=unittest.TextTestRunner(verbosity=2, descriptions=False, buffer=True, failfast={}))"
)
PYTEST_DISTRIBUTIONS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
_NEEDED = re.compile(
    r"py\.py|(_pytest|pytest|pluggy|iniconfig)/.*\.py|.*\.dist-info/(METADATA|entry_points\.txt|licenses/.*)"
    r"|packaging/(__init__|_elffile|_manylinux|_musllinux|_parser|_ranges|_structures|_tokenizer|markers|ranges"
    r"|requirements|specifiers|tags|utils|version)\.py"
    r"|pygments/([^/]+\.py|(formatters|styles|lexers|filters)/(__init__|_mapping|terminal|default|python|diff)\.py)"
)
"""Files of these distributions that pytest needs to run, and their licences."""
_NAME = re.compile(r"\w+ \([\w.]+\)|[^\s\[]+::[^\s\[]+(\[\S*\])?")
"""Names of tests that both runners accept as an argument. pytest's names with spaces are cut off in some places."""


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of one run of tests."""

    __test__ = False  # not a test class of pytest

    statuses: Mapping[str, TestStatus]
    output: str
    timed_out: bool
    duration_s: float

    @property
    def failed(self) -> bool:
        """True if a test failed, or the run broke off."""
        return self.timed_out or any(status in ("FAILED", "ERROR") for status in self.statuses.values())


def runner_of(package: Package) -> Runner:
    """Return `unittest` if every test is a method of a `unittest.TestCase` and pytest is not imported, else `pytest`.

    pytest runs both kinds, but a task with `unittest` needs only the standard library.
    """
    for path in package.tests:
        text = package.text(path)
        if text is None or re.search(r"^\s*(import|from)\s+pytest\b|^(async )?def test", text, re.MULTILINE):
            return "pytest"
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.bases and node.name.startswith("Test"):
                return "pytest"
    return "pytest" if "conftest.py" in {path.rpartition("/")[2] for path in package.files} else "unittest"


def command_for(package: Package, runner: Runner, files: Sequence[str], *, stop_at_first: bool = False) -> str:
    """Return the shell command that runs test files in the repository, with the output that `parse_log` reads."""
    if runner == "unittest":
        names = [path.removesuffix(".py").removeprefix("src/").replace("/", ".") for path in files]
        return shlex.join(["python3", "-S", "-c", UNITTEST.format(stop_at_first), *names])
    options = ["-q", "-rA", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    options += ["-x"] if stop_at_first else ["--continue-on-collection-errors"]
    return shlex.join(["python3", "-S", "-m", "pytest", *options, *files])


def variables(package: Package, tools: str = TOOLS, workdir: str = WORKDIR) -> dict[str, str]:
    """Return the variables that tests need: the import path, with the package before the tools, and no bytecode."""
    source = f"{workdir}/{package.source}".rstrip("/")
    return {"PYTHONPATH": f"{source}:{tools}", "PYTHONDONTWRITEBYTECODE": "1"}


def tools_archive(package: Package, runner: Runner, cache: Path) -> bytes:
    """Return the content of `TOOLS` as a gzipped tar archive, the same bytes for the same versions.

    It has the package's metadata, the pure-Python packages that it requires (fetched as wheels, never built), and
    pytest if `runner` needs it.

    Raises:
        PackageError: a required package cannot be had as a pure-Python wheel, or pytest is not installed.
    """
    files = dict(_installed(PYTEST_DISTRIBUTIONS)) if runner == "pytest" else {}
    if package.requires:
        files |= _wheels(package, cache)
    folder = f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    files[f"{folder}/METADATA"] = package.metadata or (
        f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n".encode()
    )
    return archive(files)


def archive(files: Mapping[str, bytes], executable: Iterable[str] = ()) -> bytes:
    """Return files as a gzipped tar archive, the same bytes for the same files."""
    packed, marked = io.BytesIO(), frozenset(executable)
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(files[name]), 0o755 if name in marked else 0o644
            tar.addfile(entry, io.BytesIO(files[name]))
    return gzip.compress(packed.getvalue(), mtime=0)


@functools.cache
def _installed(names: tuple[str, ...]) -> Mapping[str, bytes]:
    """Return the files of installed distributions that pytest needs."""
    files: dict[str, bytes] = {}
    for name in names:
        try:
            listed = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError as exc:
            raise PackageError(f"{name} is not installed; run: pip install 'agentkit-harness[synth]'") from exc
        for file in listed:
            if _NEEDED.fullmatch(path := file.as_posix()):
                content = file.read_binary()
                files[path] = _without_comments(content) if path.endswith(".py") else content
    return files


def _without_comments(source: bytes) -> bytes:
    """Return a module without comments and docstrings, half of the text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if ast.get_docstring(node, clean=False) is not None:
                    node.body[0] = ast.Expr(ast.Constant(""))
    return ast.unparse(tree).encode()


def _wheels(package: Package, cache: Path) -> dict[str, bytes]:
    """Return the files of the packages that `package` requires, with what these require in turn."""
    folder = cache / f"wheels-{package.name}-{package.version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--dest", name]
            done = subprocess.run([*command, *package.requires], capture_output=True, text=True)
            if done.returncode != 0:
                raise PackageError(
                    f"{package.name} requires {', '.join(package.requires)}, which could not be fetched as wheels: "
                    f"{done.stderr.strip()[-400:]}"
                )
            Path(name).rename(folder)
            Path(name).mkdir()  # for the context manager to remove
    files: dict[str, bytes] = {}
    for wheel in sorted(folder.glob("*.whl")):
        if not wheel.name.endswith("-none-any.whl"):
            raise PackageError(f"{package.name} requires {wheel.name}, which is not pure Python")
        with zipfile.ZipFile(wheel) as content:
            files |= {entry: content.read(entry) for entry in content.namelist() if not entry.endswith("/")}
    return files


class PackageSandbox:
    """An open sandbox with the package's repository, committed as released. Use as an async context manager."""

    def __init__(self, environment: Environment, package: Package, runner: Runner, release: str) -> None:
        self.environment, self.package, self.runner = environment, package, runner
        self.release = release
        """Id of the commit with the package as released."""
        self._env = {**IDENTITY, **variables(package)}

    @classmethod
    async def open(cls, package: Package, *, cache: Path, backend: Backend = "process") -> Self:
        """Open a sandbox without a network, and commit the package in it.

        Raises:
            SandboxUnavailableError: no sandbox can be opened; there is no fallback to less isolation.
            PackageError: the test runner or a required package is missing.
        """
        runner = runner_of(package)
        tools = gzip.decompress(tools_archive(package, runner, cache))
        source = gzip.decompress(archive(package.files, package.executable))
        environment = await open_environment(EnvironmentSpec(workdir=WORKDIR, limits=LIMITS), backend=backend)
        try:
            await environment.import_dir(TOOLS, tools)
            await environment.import_dir(WORKDIR, source)
            sandbox = cls(environment, package, runner, "")
            await environment.exec(["python3", "-m", "compileall", "-q", TOOLS], timeout_s=120)  # read-only from here
            await sandbox.shell(COMMIT)
            sandbox.release = await sandbox.shell("git rev-parse HEAD")
        except BaseException:
            await environment.close()
            raise
        return sandbox

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.environment.close()

    async def shell(self, command: str, stdin: str = "") -> str:
        """Run a git command line in the repository and return its output.

        Raises:
            PackageError: it failed; the message has its output.
        """
        result = await self.environment.exec(
            command, stdin=stdin, env=self._env, timeout_s=GIT_TIMEOUT_S, max_output_bytes=MAX_OUTPUT_BYTES
        )
        if result.exit_code != 0:
            said = (result.stderr or result.stdout).strip()[-600:]
            raise PackageError(f"{self.package.name}: {command[:80]!r} failed: {said}")
        return result.stdout.strip("\n")

    async def reset(self, commit: str | None = None) -> None:
        """Return to a commit (the release by default): remove every other change, file and process."""
        await self.environment.kill_all()
        await self.shell(f"git reset -q --hard {commit or self.release} && git clean -fdxq")
        await self.shell("rm -rf /tmp/run && mkdir /tmp/run")

    async def apply(self, patch: str) -> None:
        """Apply a patch to the files of the repository. Raises PackageError if it does not apply."""
        await self.shell("git apply --whitespace=nowarn -", patch)

    async def write(self, path: str, text: str) -> None:
        """Write a file of the repository."""
        await self.environment.write_file(f"{WORKDIR}/{path}", text)

    async def diff(self) -> str:
        """Return all changes since the last commit as a patch."""
        changes = "git diff --cached --binary --no-renames --no-color --src-prefix=a/ --dst-prefix=b/"
        return await self.shell(f"git add -A -f && {changes}") + "\n"

    async def test(
        self, files: Sequence[str], *, timeout_s: float, hash_seed: int = 0, stop_at_first: bool = False
    ) -> TestRun:
        """Run test files for at most `timeout_s` seconds."""
        command = command_for(self.package, self.runner, files, stop_at_first=stop_at_first)
        result = await self.environment.exec(
            f"{command} 2>&1",
            env={**self._env, "PYTHONHASHSEED": str(hash_seed), "TMPDIR": "/tmp/run", "HOME": "/tmp/run"},
            timeout_s=timeout_s,
            max_output_bytes=MAX_OUTPUT_BYTES,
        )
        found = parse_log(result.stdout)
        statuses = {name: status for name, status in found.items() if _NAME.fullmatch(name)}
        return TestRun(statuses, result.stdout, result.timed_out, result.duration_s)
