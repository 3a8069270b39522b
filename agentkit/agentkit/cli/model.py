"""Load a command's model on `--device` and compile its kernels before any timing starts, or connect to an API."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from agentkit.cli.options import KVCacheDtype

if TYPE_CHECKING:
    from agentkit.models.embedded import EmbeddedModel
    from agentkit.models.remote.session import RemoteModel


EMBEDDED_OPTIONS = ("device", "devices", "threads", "expert_cache_bytes", "kv_cache_dtype", "cache_dir")
REMOTE_OPTIONS = ("base_url", "max_connections")
"""The parameters that load a model of each kind. A record that can be resumed has those that were given."""


def load_model(
    name: str,
    *,
    device: str | None,
    cache_dir: Path | None,
    base_url: str | None,
    devices: int | None = None,
    threads: int | None = None,
    expert_cache_bytes: int | None = None,
    kv_cache_dtype: KVCacheDtype | None = None,
    max_connections: int | None = None,
) -> EmbeddedModel | RemoteModel:
    """Return the model given by `--model`: one behind an API, or one loaded on `--device` and warmed up. Kernels are
    compiled, and logged, once per machine.

    No event loop is running yet, so Ctrl-C ends the process at once, even inside the compiler.

    Raises:
        ModelError: The API cannot be used: there is no key, or its package is not installed.
        EngineError: The model cannot be loaded.
        BadParameter: An option has a wrong value, such as a missing device, or does not belong to this kind of model.
    """
    options: dict[str, object] = {
        "--device": device,
        "--devices": devices,
        "--threads": threads,
        "--expert-cache-bytes": expert_cache_bytes,
        "--kv-cache-dtype": kv_cache_dtype,
        "--cache-dir": cache_dir,
    }
    from agentkit.models.embedded import EmbeddedModel
    from agentkit.models.remote.resolve import is_remote
    from agentkit.models.remote.session import RemoteModel

    if is_remote(name):
        for option, value in options.items():
            if value is not None:
                raise typer.BadParameter(f"{name} runs behind an API; leave it out", param_hint=option)
        return RemoteModel(name, base_url=base_url, max_connections=max_connections)
    for option, given in (("--base-url", base_url), ("--max-connections", max_connections)):
        if given is not None:
            raise typer.BadParameter(
                f"{name} runs in this process; name a model behind the API, such as `-m openai:MODEL`",
                param_hint=option,
            )

    from agentkit_engine import Engine

    try:
        engine = Engine.load(
            name,
            device=device or "cpu",
            devices=devices or 1,
            threads=threads,
            expert_cache_bytes=expert_cache_bytes,
            kv_cache_dtype=(kv_cache_dtype or KVCacheDtype.AUTO).value,
            cache_dir=cache_dir,
        )
    except ValueError as exc:
        if all(value is None for option, value in options.items() if option != "--cache-dir"):
            raise
        # the engine's messages begin with the argument, such as "devices=4 is more than"
        named = "--" + str(exc).split(" ")[0].split("=")[0].replace("_", "-")
        raise typer.BadParameter(str(exc), param_hint=named if named in options else "--device") from exc
    engine.warm_up()
    return EmbeddedModel(engine)


def model_name(name: str) -> str:
    """Return the name that a model has once it is loaded: for a folder, the folder's own."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def model_options(name: str, options: Mapping[str, Any]) -> dict[str, str | int]:
    """Return the name of a model and those options that load a model of its kind, for a record that is resumed."""
    from agentkit.models.remote.resolve import is_remote

    kept: dict[str, str | int] = {"model": str(Path(name).resolve()) if Path(name).is_dir() else name}
    for key in REMOTE_OPTIONS if is_remote(name) else EMBEDDED_OPTIONS:
        value = options.get(key)
        if isinstance(value, Path):
            value = str(value.resolve())
        if value is not None:
            kept[key] = value.value if isinstance(value, StrEnum) else value
    return kept


def recorded_options(recorded: Mapping[str, str | int], ctx: typer.Context, given: Collection[str]) -> dict[str, Any]:
    """Return the keyword arguments of `load_model` from `model_options`. Those `given` to the command replace them."""
    options: dict[str, Any] = {
        key: ctx.params[key] if key in given else recorded.get(key) for key in (*EMBEDDED_OPTIONS, *REMOTE_OPTIONS)
    }
    options["cache_dir"] = options["cache_dir"] and Path(options["cache_dir"])
    options["kv_cache_dtype"] = options["kv_cache_dtype"] and KVCacheDtype(options["kv_cache_dtype"])
    return options
