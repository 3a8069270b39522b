"""`agentkit doctor`: report what works on this machine and what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from agentkit.cli.ending import ExitCode, run
from agentkit.cli.options import JsonFlag, packaged_models
from agentkit.cli.terminal import console, visible

CGROUPS = Path("/sys/fs/cgroup")


def command(
    reap: Annotated[bool, typer.Option("--reap", help="Also remove sandboxes left behind by dead runs.")] = False,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Report which sandboxes, kernels, libraries and models work here. Exits with 3 if no sandbox does."""
    import agentkit_environments
    from agentkit.models.remote.resolve import PROVIDERS, key_variable
    from agentkit.version import agentkit_version
    from agentkit_environments.process import LAUNCHERS, launcher_failure

    backends = agentkit_environments.available_backends()
    usable = any(reason is None for name, reason in backends.items() if name != "unsafe-local")
    found: dict[str, Any] = {
        "agentkit": agentkit_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": _torch(),
        "kernels": _kernels(),
        "llguidance": _version("llguidance"),
        "numba": _version("numba"),
        "triton": _version("triton"),
        "ripgrep": _program("rg"),
        "backends": backends,
        "launchers": {name: launcher_failure(name) for name in LAUNCHERS},
        "cgroup": _cgroup(),
        "apis": {name: _version(name) for name in ("openai", "anthropic")},
        "keys": {name: bool(os.environ.get(name)) for name in map(key_variable, PROVIDERS)},
        "models": {name: _missing(name) for name in packaged_models()},
    }
    if reap:
        found["reaped"] = run(agentkit_environments.reap)
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


def _kernels() -> str:
    """Return the state of the CPU kernels: "compiled", "not compiled yet", or the reason they are unavailable."""
    try:
        from agentkit_kernels.compiled import is_compiled
    except ImportError as exc:
        return f"none: {exc}"
    return "compiled" if is_compiled() else "not compiled yet"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _program(name: str) -> str | None:
    """Return the first line of `name --version`; None if the program is not installed."""
    if shutil.which(name) is None:
        return None
    try:
        said = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"failed: {exc}"
    return said.partition("\n")[0].strip() or "unknown version"


def _cgroup() -> str | None:
    """Return the cgroup version that limits memory here and whether this user can write to it; None if there is
    none."""
    for name, folder in (("v2", CGROUPS), ("v1", CGROUPS / "memory")):
        if (folder / ("cgroup.controllers" if name == "v2" else "memory.limit_in_bytes")).is_file():
            return f"{name}, {'writable' if os.access(folder, os.W_OK) else 'read-only'}"
    return None


def _missing(model: str) -> str | None:
    """Return the missing files of a packaged model; None if it is complete."""
    engine = importlib.util.find_spec("agentkit_engine")
    places = engine.submodule_search_locations if engine else None
    for place in places or ():
        folder = Path(place, model)
        lacking = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
        lacking += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
        return f"{', '.join(lacking)} missing" if lacking else None
    return "agentkit_engine is missing"


def _print(found: dict[str, Any]) -> None:
    from rich.text import Text

    terminal = console()

    def line(name: str, fine: bool | None, said: str) -> None:
        mark = {True: ("✓ ", "green"), False: ("✗ ", "red"), None: ("– ", "dim")}[fine]
        terminal.print(Text.assemble("  ", mark, name, (f"  {visible(said)}" if said else "", "dim")), soft_wrap=True)

    def title(text: str) -> None:
        terminal.print(f"\n[bold]{text}[/]")

    terminal.print(
        f"[bold]agentkit {found['agentkit']}[/]  Python {found['python']}, {found['platform']}", soft_wrap=True
    )
    title("engine")
    torch = found["torch"]
    gpus = ", ".join(torch["gpus"]) or "no GPU" if torch else ""
    line("torch", bool(torch), f"{torch['version']}, {torch['threads']} threads, {gpus}" if torch else "missing")
    kernels = found["kernels"]
    note = {
        "compiled": "compiled for this CPU",
        "not compiled yet": "not compiled for this CPU yet; the first run compiles them",
    }
    line("CPU kernels", not kernels.startswith("none"), note.get(kernels, f"{kernels}; the CPU uses plain torch"))
    line("GPU kernels", None, "none yet; a GPU uses plain torch")
    line(
        "llguidance",
        bool(found["llguidance"]),
        found["llguidance"] or "missing, grammars unavailable: pip install llguidance",
    )
    title("sandboxes")
    for name, reason in found["backends"].items():
        line(name, reason is None, reason or ("no isolation; used only on request" if name == "unsafe-local" else ""))
    for name, reason in found["launchers"].items():
        line(f"process, by {name}", True if reason is None else None, reason or "")
    cgroup = found["cgroup"]
    line("cgroup", True if cgroup else None, cgroup or "none")
    title("tools")
    line("ripgrep", True if found["ripgrep"] else None, found["ripgrep"] or "not installed; `search` uses Python")
    title("models behind an API")
    for name, installed in found["apis"].items():
        line(name, True if installed else None, installed or 'not installed: pip install "agentkit-harness[api]"')
    for name, is_set in found["keys"].items():
        line(name, True if is_set else None, "set" if is_set else "not set")
    title("models")
    for name, missing in found["models"].items():
        line(name, missing is None, missing or "")
    if "reaped" in found:
        terminal.print(f"\nremoved {found['reaped']} orphaned sandboxes")
