"""The executor of a container: a static program, compiled by `build.py` from `executor.c`."""

from __future__ import annotations

from importlib.resources import files

ARCHITECTURES = ("amd64", "arm64")
"""The architectures that have a program, under Docker's names."""


def executor_program(architecture: str) -> bytes:
    """Return the program for one of `ARCHITECTURES`."""
    return files(__name__).joinpath(f"executor-{architecture}").read_bytes()
