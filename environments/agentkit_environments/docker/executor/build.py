"""Compile the executor for every architecture: `python -m agentkit_environments.docker.executor.build`.

Writes the programs and `programs.json`, by which a test notices a source that has changed without them.

Needs the compiler `zig cc` of exactly this version: `pip install ziglang==0.17.0`. It brings its own C library (musl)
and linker and uses nothing else of the machine, so that the same source gives the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ZIG_VERSION = "0.17.0"
TARGETS = {"amd64": "x86_64-linux-musl", "arm64": "aarch64-linux-musl"}
"""The compiler's name of each architecture; the keys are Docker's."""
FLAGS = ("-std=c11", "-mcpu=baseline", "-Os", "-static", "-s", "-g0", "-Wall", "-Wextra", "-Werror")
FOLDER = Path(__file__).parent


def compiler_failure() -> str | None:
    """Return the reason why the executor cannot be compiled here, or None."""
    try:
        found = version("ziglang")
    except PackageNotFoundError:
        return f"ziglang is not installed: pip install ziglang=={ZIG_VERSION}"
    return None if found == ZIG_VERSION else f"ziglang {found} is installed, but {ZIG_VERSION} is needed"


def compile_executor(architecture: str, program: Path) -> None:
    """Compile executor.c for one architecture to `program`. Raises CalledProcessError if the compiler fails."""
    command = [sys.executable, "-m", "ziglang", "cc", "-target", TARGETS[architecture], *FLAGS]
    subprocess.run([*command, "-o", str(program.absolute()), "executor.c"], cwd=FOLDER, check=True)


def record() -> dict[str, str]:
    """Return the hashes of the source, of this script and of the programs, by the names of the files."""
    names = ("executor.c", "build.py", *(f"executor-{architecture}" for architecture in TARGETS))
    return {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in names}


def main() -> None:
    if (failure := compiler_failure()) is not None:
        raise SystemExit(failure)
    for architecture in TARGETS:
        program = FOLDER / f"executor-{architecture}"
        compile_executor(architecture, program)
        print(f"{program}: {program.stat().st_size} bytes")
    (FOLDER / "programs.json").write_text(json.dumps(record(), indent=4) + "\n")


if __name__ == "__main__":
    main()
