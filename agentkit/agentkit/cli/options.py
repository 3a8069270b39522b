"""Flags that several commands share, and where runs go."""

from __future__ import annotations

import os
import re
import secrets
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Env(StrEnum):
    """Where tasks run; the same names as `agentkit_environments.open_environment` takes."""

    AUTO = "auto"
    DOCKER = "docker"
    PROCESS = "process"
    UNSAFE_LOCAL = "unsafe-local"


ModelFlag = Annotated[str, typer.Option("--model", "-m", help="`tiny`, or a folder in the official DeepSeek layout.")]
EnvFlag = Annotated[
    Env | None, typer.Option("--env", help="The backend: where commands run. By default what the task says.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]
SeedFlag = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="Makes it repeatable; random by default.")
]
TemperatureFlag = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0.0, help="Divides the logits; 0 takes the likeliest token. By default the model's own."
    ),
]
GrammarFlag = Annotated[
    bool | None,
    typer.Option(
        "--grammar/--no-grammar",
        help="Hold calls to the schemas of the tools. By default where a grammar can be built; --grammar insists.",
    ),
]
CacheFlag = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", envvar="AGENTKIT_CACHE_DIR", help="A folder for what the model computes, for later commands."
    ),
]
OutFlag = Annotated[Path | None, typer.Option("--out", help="The run directory; a new one below `runs` by default.")]


def seed_or_random(seed: int | None) -> int:
    """The seed that was given, or a fresh one, so that the record can name it."""
    return secrets.randbelow(2**31) if seed is None else seed


def run_directory(out: Path | None, name: str) -> Path:
    """`out`, or a name of its own below `runs`, in AGENTKIT_HOME when that is set, else here."""
    if out is not None:
        return out
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(os.environ.get("AGENTKIT_HOME", "."), "runs", f"{stamp}-{label}-{secrets.token_hex(2)}")
