"""Build the base image of the Docker backend without a registry: a shell, the usual small programs, Python 3.11+.

    python3 -m agentkit_environments.images [--source auto|debian|host] [--tag agentkit-base:latest] [--output FILE]

`debian` runs debootstrap, which needs root and access to a Debian mirror. `host` copies this machine's own programs,
the libraries they link to and the interpreter that runs this script, and needs only read access. `auto` tries `debian`
and falls back to `host`. Both make a tar archive with sorted names, one time stamp and one owner, so that the same
input gives the same bytes; `docker import` makes the image. With `--output` the archive is written and no image is
made. This file needs only the standard library, so it can run before anything is installed.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TAG = "agentkit-base:latest"
DEBIAN_SUITE = "bookworm"
DEBIAN_PACKAGES = "python3-minimal,python3,procps,ripgrep,patch"
DEBIAN_LEFT_OUT = ("dev", "proc", "sys", "tmp", "run", "var/cache", "var/log", "var/lib/apt/lists", "usr/share/doc",
                   "usr/share/man", "usr/share/locale", "usr/share/info")  # fmt: skip
PROGRAMS = (
    *("sh", "bash", "env", "cat", "ls", "cp", "mv", "rm", "mkdir", "rmdir", "ln", "touch", "chmod", "pwd", "echo"),
    *("printf", "true", "false", "test", "expr", "seq", "sleep", "date", "head", "tail", "wc", "sort", "uniq", "cut"),
    *("tr", "tee", "tac", "nl", "od", "stat", "du", "df", "basename", "dirname", "readlink", "realpath", "mktemp"),
    *("timeout", "nohup", "setsid", "id", "whoami", "uname", "yes", "md5sum", "sha256sum", "base64", "dd", "grep"),
    *("egrep", "sed", "awk", "mawk", "find", "xargs", "diff", "cmp", "patch", "tar", "gzip", "ps", "kill", "which"),
    *("rg", "git", "mkfifo", "comm", "paste", "split", "shuf", "sha1sum", "nproc", "hostname", "pgrep", "mount"),
)
STDLIB_LEFT_OUT = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "ensurepip",
    "turtledemo",
}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000:agent:/workspace:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "var/tmp": "/tmp"}
DIRECTORIES = ("dev", "proc", "sys", "run", "tmp", "workspace", "usr/sbin")


class Archive:
    """Builder of a tar archive: each name once, parents first, one owner, one time."""

    def __init__(self, out: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (see close)
        self._names: set[str] = set()
        self._time = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))

    def add(self, name: str, kind: bytes, *, mode: int = 0o755, target: str = "", data: bytes = b"") -> None:
        if name in self._names:
            return
        parent = os.path.dirname(name)
        if parent:
            self.add(parent, tarfile.DIRTYPE)
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.linkname, member.size = kind, mode, target, len(data)
        member.mtime = self._time
        self._tar.addfile(member, io.BytesIO(data))
        self._names.add(name)

    def add_path(self, source: str, name: str) -> None:
        """Add one file, link or directory, without a directory's content."""
        info = os.lstat(source)
        mode = stat.S_IMODE(info.st_mode) & 0o777
        if stat.S_ISLNK(info.st_mode):
            self.add(name, tarfile.SYMTYPE, target=os.readlink(source))
        elif stat.S_ISDIR(info.st_mode):
            self.add(name, tarfile.DIRTYPE, mode=mode)
        elif stat.S_ISREG(info.st_mode):
            self.add(name, tarfile.REGTYPE, mode=mode, data=Path(source).read_bytes())

    def close(self) -> None:
        self._tar.close()


def walk(root: str, left_out: set[str]) -> Iterator[str]:
    """Yield every path below `root` in sorted order, except those whose name or path below `root` is in `left_out`."""
    for directory, names, files in os.walk(root):
        relative = os.path.relpath(directory, root)
        names[:] = sorted(name for name in names if not {name, os.path.normpath(f"{relative}/{name}")} & left_out)
        yield from (os.path.join(directory, name) for name in sorted([*names, *files]) if name not in left_out)


def linked_libraries(binaries: list[str]) -> set[str]:
    """Return the shared libraries that `ldd` lists for the binaries, including the dynamic loader."""
    found: set[str] = set()
    for start in range(0, len(binaries), 50):
        printed = subprocess.run(["ldd", *binaries[start : start + 50]], capture_output=True, text=True).stdout
        found.update(re.findall(r"(?:=> |^\s)(/\S+) \(0x", printed, re.MULTILINE))
    return found


def inside(path: str) -> str:
    """Return the image's name for a host path: in the image, /bin, /lib and so on are links into /usr."""
    name = path.lstrip("/")
    top = name.split("/")[0]
    return "usr/" + name if top in ("bin", "sbin", "lib", "lib64") else name


def write_host(archive: Archive) -> None:
    """Write an image of this machine's programs and this script's interpreter."""
    paths: dict[str, str] = {}
    binaries: list[str] = []
    for program in PROGRAMS:
        found = shutil.which(program, path="/usr/bin:/bin")
        if found is not None:
            paths["usr/bin/" + program] = os.path.realpath(found)
            binaries.append(os.path.realpath(found))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = os.path.realpath(f"{sys.base_prefix}/bin/{version}")
    stdlib = sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix})
    for path in (python, *walk(stdlib, STDLIB_LEFT_OUT)):
        paths[inside(path)] = path
        if path == python or path.endswith(".so"):
            binaries.append(path)
    for library in linked_libraries(binaries):
        paths[inside(library)] = os.path.realpath(library)
    for name in sorted(paths):
        archive.add_path(paths[name], name)
    for name in ("usr/bin/python3", "usr/bin/python"):
        archive.add(name, tarfile.SYMTYPE, target="/" + inside(python))


def write_debian(archive: Archive) -> None:
    """Write an image of Debian's minimal base system. Raises OSError or CalledProcessError if that fails."""
    with tempfile.TemporaryDirectory() as root:
        bootstrap = ["debootstrap", "--variant=minbase", f"--include={DEBIAN_PACKAGES}", DEBIAN_SUITE, root]
        subprocess.run(bootstrap, check=True, stdout=sys.stderr)
        volatile = {"etc/machine-id", "etc/hostname", "etc/resolv.conf", "var/cache/ldconfig/aux-cache", "__pycache__"}
        for path in walk(root, {*DEBIAN_LEFT_OUT, *volatile, *FILES}):
            name = os.path.relpath(path, root)
            if name not in volatile and name not in FILES:
                archive.add_path(path, name)
    archive.add("usr/bin/python", tarfile.SYMTYPE, target="python3")


def write(source: str, out: IO[bytes]) -> None:
    archive = Archive(out)
    {"host": write_host, "debian": write_debian}[source](archive)
    for name in DIRECTORIES:
        archive.add(name, tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
    for name, text in FILES.items():
        archive.add(name, tarfile.REGTYPE, mode=0o644, data=text.encode())
    for name, target in LINKS.items():
        archive.add(name, tarfile.SYMTYPE, target=target)
    archive.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("auto", "debian", "host"), default="auto")
    parser.add_argument("--tag", default=TAG)
    parser.add_argument("--output", type=Path, help="write the archive here instead of importing it")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (a host's python3 may be older than the package allows)
        parser.error(f"run this with Python 3.11 or newer, not {sys.version.split()[0]}")
    can_bootstrap = shutil.which("debootstrap") is not None and os.geteuid() == 0
    sources = {"auto": ["debian", "host"] if can_bootstrap else ["host"]}.get(arguments.source, [arguments.source])
    with tempfile.TemporaryFile() as out:
        for source in sources:
            out.seek(0)
            out.truncate()
            try:
                write(source, out)
                break
            except (OSError, subprocess.CalledProcessError) as error:
                if source == sources[-1]:
                    raise
                print(f"{source}: {error}; trying {sources[-1]}", file=sys.stderr)
        out.seek(0)
        if arguments.output is not None:
            with arguments.output.open("wb") as file:
                shutil.copyfileobj(out, file)
            return
        setup = ["--change", "ENV PATH=/usr/local/bin:/usr/bin:/bin", "--change", "WORKDIR /workspace"]
        labels = ["--change", f"LABEL agentkit.base={source}"]
        subprocess.run(["docker", "import", *setup, *labels, "-", arguments.tag], stdin=out, check=True)


if __name__ == "__main__":
    main()
