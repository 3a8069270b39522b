"""`agentkit doctor`: what this machine can do, and what is in the way."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from importlib.metadata import version
from typing import Annotated, Any

import anyio
import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.options import JsonFlag


def command(
    reap: Annotated[bool, typer.Option("--reap", help="Also remove sandboxes that dead runs left behind.")] = False,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Say what this machine can do: sandboxes with reasons, Python, torch, models. Exits with 3 without a sandbox."""
    import agentkit_environments
    from agentkit_evals.record import agentkit_version

    backends = agentkit_environments.available_backends()
    usable = any(reason is None for name, reason in backends.items() if name != "unsafe-local")
    found: dict[str, Any] = {
        "agentkit": agentkit_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": _torch(),
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "backends": backends,
        "models": _models(),
    }
    if reap:
        found["reaped"] = anyio.run(agentkit_environments.reap)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    return ExitCode.OK if usable else ExitCode.INFRASTRUCTURE


def _torch() -> dict[str, Any] | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "gpus": devices}


def _models() -> dict[str, str | None]:
    """The packaged models: None where one is whole, else what is missing."""
    from agentkit_engine.engine import PACKAGED_MODELS

    needed = ("config.json", "tokenizer.json")
    missing = {name: [f for f in needed if not (folder / f).is_file()] for name, folder in PACKAGED_MODELS.items()}
    return {name: f"{', '.join(files)} missing" if files else None for name, files in missing.items()}


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(f"[bold]agentkit {found['agentkit']}[/]  Python {found['python']}, {found['platform']}")
    torch = found["torch"]
    gpus = ", ".join(torch["gpus"]) or "no GPU" if torch else ""
    console.print(f"torch {torch['version']}, {torch['threads']} threads, {gpus}" if torch else "[red]torch missing[/]")
    triton = f"triton {found['triton']}" if found["triton"] else "no triton"
    console.print(f"{triton}; the engine runs on plain torch and has no kernels of its own yet")
    for title, things in (("sandboxes", found["backends"]), ("models", found["models"])):
        console.print(f"\n[bold]{title}[/]")
        for name, reason in things.items():
            mark = ("✓ ", "green") if reason is None else ("✗ ", "red")
            console.print(Text.assemble("  ", mark, name, ("" if reason is None else f"  {reason}", "dim")))
    if "reaped" in found:
        console.print(f"\nremoved {found['reaped']} orphaned sandboxes")
