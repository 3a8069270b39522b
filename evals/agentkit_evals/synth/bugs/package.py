"""A package to make bugs in: its source distribution, fetched, unpacked and inspected without running any of its code.

A specification is one of

    NAME==VERSION           from the package index, with pip, or from `index`, a folder of source distributions
    NAME==OLD..VERSION      the same, with an earlier release, whose differences are also used
    debian:NAME[==VERSION]  the upstream source of a Debian package, with apt-get

or a folder (`local_package`). To get a source distribution's metadata, pip runs the build backend of the package on
this machine, outside any sandbox. With `index` nothing is run.
"""

from __future__ import annotations

import ast
import email.parser
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidSdistFilename, canonicalize_name, parse_sdist_filename
from packaging.version import InvalidVersion, Version

from agentkit_evals.errors import NoTestsError, NotPureError, PackageError, UnknownPackageError
from agentkit_evals.provenance import licence_of

FETCH_TIMEOUT_S = 300.0
MAX_SDIST_BYTES = 32 << 20
MAX_TREE_BYTES = 64 << 20
MAX_FILES = 5_000
NATIVE = frozenset(
    (".c", ".cc", ".cpp", ".cxx", ".pyx", ".pxd", ".rs", ".f", ".f90", ".go", ".so", ".pyd", ".dylib", ".dll", ".a")
)
"""Suffixes of compiled code and of source to compile."""
NOT_PACKAGES = frozenset(
    (
        *("test", "tests", "testing", "unittests", "doc", "docs", "example", "examples", "bench", "benchmark"),
        *("benchmarks", "script", "scripts", "tools", "build", "dist", "bin", "ci", "requirements", "tasks", "utils"),
    )
)
_TEST_FOLDERS = frozenset(("test", "tests", "testing", "unittests"))
_NOT_MODULES = re.compile(
    r"(setup|conftest|noxfile|tasks|fabfile|versioneer|manage|build|_?version|__main__|.*_test|tests?|test_.*)\.py"
)
_TEST_FILE = re.compile(r"(test_.*|.*_test|tests?)\.py")
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying|copyright)(\W.*)?", re.IGNORECASE)
_SPEC = re.compile(r"(debian:)?([A-Za-z0-9][A-Za-z0-9._+-]*?)(?:==(?:([^=.\s][^=\s]*?)\.\.)?([^=\s]+))?")


@dataclass(frozen=True, slots=True)
class PackageSpec:
    """A package to fetch."""

    name: str
    version: str | None
    previous: str | None = None
    """An earlier release, whose differences to `version` are used."""
    debian: bool = False

    @classmethod
    def parse(cls, text: str) -> PackageSpec:
        """Read `NAME==VERSION`, `NAME==OLD..VERSION` or `debian:NAME[==VERSION]`.

        Raises:
            UnknownPackageError: the text is none of these.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None or (match[4] is None and not match[1]) or (match[3] and match[1]):
            raise UnknownPackageError(
                f"{text!r} is not a package; expected NAME==VERSION, NAME==OLD..VERSION or debian:NAME"
            )
        return cls(match[2], match[4], match[3], bool(match[1]))

    def __str__(self) -> str:
        return self.name + (f"=={self.version}" if self.version else "")


@dataclass(frozen=True, slots=True)
class Package:
    """One release: the files of its source distribution, and the modules and tests found by their names."""

    name: str
    version: str
    licence: str | None
    sha256: str
    """Hash of the source distribution; of a folder, of its files."""
    files: Mapping[str, bytes] = field(repr=False)
    """Path -> content."""
    executable: frozenset[str] = field(repr=False)
    source: str
    """Folder of the importable packages: `src` or an empty string."""
    modules: tuple[str, ...]
    """Paths of the modules, without tests."""
    tests: tuple[str, ...]
    """Paths of the test files."""
    requires: tuple[str, ...]
    """Names of the packages that it needs at run time."""
    metadata: bytes = field(repr=False)

    def text(self, path: str) -> str | None:
        """Return a module's source, or None if it is not UTF-8 with plain line ends, or not a valid module."""
        try:
            text = self.files[path].decode()
            ast.parse(text)
        except (ValueError, SyntaxError, RecursionError):
            return None
        return None if "\r" in text else text


def fetch(spec: PackageSpec, cache: Path, index: Path | None = None) -> Path:
    """Return the path of a package's source distribution, from `cache` if it is there.

    Args:
        spec: The package.
        cache: Folder that keeps what was fetched.
        index: A folder of source distributions, in place of the package index.

    Raises:
        UnknownPackageError: there is no such package or version, or it has no source distribution.
        PackageError: the client failed in another way; the message has its last lines.
    """
    if spec.version and (found := _in_folder(cache, spec)):
        return found
    if index is not None:
        if not index.is_dir():
            raise UnknownPackageError(f"{index} is not a folder; expected one with source distributions")
        if found := _in_folder(index, spec):
            return found
        raise UnknownPackageError(f"{index} has no source distribution of {spec}, such as {spec.name}-VERSION.tar.gz")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        if spec.debian:
            wanted = f"{spec.name}={spec.version}" if spec.version else spec.name
            _client(["apt-get", "source", "--download-only", "-qq", wanted], folder, spec)
            made = [path for path in folder.iterdir() if re.search(r"\.orig\.tar\.\w+$", path.name)]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            _client([*command, f"{spec.name}=={spec.version}"], folder, spec)
            made = [path for path in folder.iterdir() if path.name.endswith((".tar.gz", ".zip"))]
        if not made:
            raise UnknownPackageError(f"{spec} has no source distribution")
        return made[0].rename(cache / made[0].name)


def _in_folder(folder: Path, spec: PackageSpec) -> Path | None:
    for path in sorted(folder.glob("*")):
        if spec.debian:
            if spec.version and path.name.startswith(f"{spec.name}_{spec.version.partition('-')[0]}.orig.tar."):
                return path
            continue
        try:
            name, version = parse_sdist_filename(path.name)
            if name == canonicalize_name(spec.name) and version == Version(str(spec.version)):
                return path
        except (InvalidSdistFilename, InvalidVersion):
            continue
    return None


def _client(command: list[str], folder: Path, spec: PackageSpec) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise PackageError(f"{spec}: {command[0]} failed: {exc}") from exc
    if done.returncode != 0:
        said = done.stderr.strip()[-600:]
        if re.search(r"No matching distribution|Could not find a version|Unable to find a source|Can not find", said):
            raise UnknownPackageError(f"{spec} is not in the package index, or has no source distribution: {said}")
        raise PackageError(f"{spec} could not be fetched: {said}")


def read_package(path: Path, spec: PackageSpec | None = None) -> Package:
    """Read a source distribution (tar or zip).

    Raises:
        NotPureError: it has compiled code.
        NoTestsError: it has no test files.
        PackageError: it is no archive, breaks a rule (absolute names, `..`, too large), or has no modules.
    """
    label = path.name if spec is None or spec.debian else str(spec)
    if path.stat().st_size > MAX_SDIST_BYTES:
        raise PackageError(f"{label}: {path.stat().st_size:,} bytes, expected at most {MAX_SDIST_BYTES:,}")
    data = path.read_bytes()
    try:
        members = list(_unzipped(data) if path.suffix == ".zip" else _untarred(data))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as exc:
        raise PackageError(f"{label}: {path.name} is not a readable archive: {exc}") from exc
    files: dict[str, bytes] = {}
    executable: set[str] = set()
    size = 0
    for name, content, mode in members:
        parts = PurePosixPath(name).parts[1:]  # NAME-VERSION/
        size += len(content)
        if name.startswith("/") or ".." in parts or size > MAX_TREE_BYTES or len(files) >= MAX_FILES:
            raise PackageError(f"{label}: {path.name} has an unsafe name ({name[:80]!r}) or is too large")
        if parts and parts[0] != ".git":
            files["/".join(parts)] = content
            if mode & 0o100:
                executable.add("/".join(parts))
    return _inspect(files, frozenset(executable), hashlib.sha256(data).hexdigest(), label, spec)


def local_package(folder: Path) -> Package:
    """Read a package from a folder on this machine: a checkout or an unpacked distribution.

    Raises:
        PackageError: see `read_package`; also if the folder does not exist.
    """
    if not folder.is_dir():
        raise UnknownPackageError(f"{folder} is not a folder; expected one with a package and its tests")
    files: dict[str, bytes] = {}
    executable: set[str] = set()
    size = 0
    skipped = {".git", "__pycache__", ".venv", "venv", ".tox", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if skipped & set(relative.parts) or path.is_symlink() or not path.is_file():
            continue
        size += path.stat().st_size
        if size > MAX_TREE_BYTES or len(files) >= MAX_FILES:
            raise PackageError(f"{folder}: more than {MAX_TREE_BYTES:,} bytes or {MAX_FILES:,} files")
        files[relative.as_posix()] = path.read_bytes()
        if path.stat().st_mode & 0o100:
            executable.add(relative.as_posix())
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return _inspect(files, frozenset(executable), digest.hexdigest(), str(folder), None)


def _untarred(data: bytes) -> Iterator[tuple[str, bytes, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            if member.isfile() and member.size <= MAX_TREE_BYTES and (file := archive.extractfile(member)):
                yield member.name, file.read(), member.mode


def _unzipped(data: bytes) -> Iterator[tuple[str, bytes, int]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            if not entry.is_dir() and entry.file_size <= MAX_TREE_BYTES:
                yield entry.filename, archive.read(entry), entry.external_attr >> 16


def _inspect(
    files: dict[str, bytes], executable: frozenset[str], sha256: str, label: str, spec: PackageSpec | None
) -> Package:
    native = [name for name in files if PurePosixPath(name).suffix in NATIVE and not _is_test_path(name)]
    if native:
        raise NotPureError(f"{label} is not pure Python: it has {', '.join(sorted(native)[:3])}")
    source = "src" if any(re.fullmatch(r"src/([^/]+/__init__|[^/]+)\.py", name) for name in files) else ""
    modules = tuple(sorted(name for name in files if _is_module(name, source)))
    tests = tuple(sorted(name for name in files if _is_test_file(name) and b"test" in files[name]))
    if not modules:
        raise PackageError(f"{label} has no Python modules; expected NAME.py, NAME/__init__.py, or the same in src/")
    if not tests:
        raise NoTestsError(f"{label} has no tests in its source distribution; expected files such as tests/test_x.py")
    metadata = files.get("PKG-INFO") or next((files[n] for n in sorted(files) if n.endswith("/PKG-INFO")), b"")
    headers: dict[str, list[str]] = {}
    for key, value in email.parser.Parser().parsestr(metadata.decode(errors="replace"), headersonly=True).items():
        headers.setdefault(key, []).append(value)
    licence_text = "\n".join(
        content.decode(errors="replace") for name, content in files.items() if _LICENCE_FILE.fullmatch(name)
    )
    top = modules[0].removeprefix("src/").split("/")[0].removesuffix(".py")
    return Package(
        name=canonicalize_name(next(iter(headers.get("Name", ())), spec.name if spec else top)),
        version=next(iter(headers.get("Version", ())), (spec and spec.version) or _debian_version(label)),
        licence=licence_of(headers, licence_text),
        sha256=sha256,
        files=files,
        executable=executable,
        source=source,
        modules=modules,
        tests=tests,
        requires=tuple(_required(headers.get("Requires-Dist", []))),
        metadata=metadata,
    )


def _debian_version(name: str) -> str:
    """Return the version in the name of a Debian package's upstream source, such as `six_1.17.0.orig.tar.gz`."""
    match = re.search(r"_([^_]+)\.orig\.tar", name)
    return match[1] if match else "0"


def _required(lines: list[str]) -> Iterator[str]:
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield str(requirement)


def _is_test_path(name: str) -> bool:
    return bool(_TEST_FOLDERS & set(PurePosixPath(name).parent.parts))


def _is_test_file(name: str) -> bool:
    path = PurePosixPath(name)
    if not _TEST_FILE.fullmatch(path.name):
        return False
    return path.parent == PurePosixPath(".") or _is_test_path(name) or path.name not in ("test.py", "tests.py")


def _is_module(name: str, source: str) -> bool:
    if not name.endswith(".py") or _is_test_path(name) or (source and not name.startswith("src/")):
        return False
    parts = name.removeprefix("src/").split("/") if source else name.split("/")
    return parts[0] not in NOT_PACKAGES and not parts[0].startswith(".") and not _NOT_MODULES.fullmatch(parts[-1])
