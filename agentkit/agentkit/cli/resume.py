"""`agentkit run --resume TRAJECTORY`: the settings that a run records in the header of its trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import typer
from pydantic import Field, ValidationError

from agentkit.errors import ResumeError
from agentkit.task import Strict, Task
from agentkit.trajectory import Trajectory
from agentkit_engine.untrusted import describe

FREE = {
    *("resume", "as_json", "apply", "patch", "branch", "max_cost"),
    *("base_url", "device", "devices", "threads", "expert_cache_bytes", "kv_cache_dtype", "cache_dir"),
}
"""Parameters of `agentkit run` that may be given with `--resume`. The record has all others."""


class RunSettings(Strict):
    """Settings of `agentkit run` that are not in the other fields of a header; `metadata["run"]`."""

    task: Task
    load: dict[str, str | int]  # the model's name, and the options that load it
    fingerprint: str | None = None
    env: Literal["auto", "docker", "process", "unsafe-local"] | None = None
    workdir: str | None = None
    include_ignored: bool = False
    copied: bool = False
    mcp: str | None = None
    history: str | None = None
    approve: Literal["all", "ask", "read-only"] = "all"
    max_cost_usd: float | None = Field(default=None, gt=0)

    @classmethod
    def of(cls, trajectory: Trajectory) -> Self:
        """Return the settings of a recorded run.

        Raises:
            ResumeError: the record has none, or invalid ones.
        """
        found = trajectory.header.metadata.get("run")
        if found is None:
            raise ResumeError(
                f"{trajectory.path} was not recorded by `agentkit run --trajectory`, or is of a Harbor task with "
                "several steps, services or MCP servers; resume it in Python, with Agent.resume"
            )
        try:
            return cls.model_validate(found)
        except ValidationError as exc:
            raise ResumeError(f"{trajectory.path} has invalid settings of its run: {describe(exc)}") from exc

    def check_fingerprint(self, model: Any) -> None:
        """Raise ResumeError if a model has other weights or numerics than the recorded one."""
        if self.fingerprint != getattr(model, "fingerprint", None):
            raise ResumeError(
                f"the run was started with other weights of the model {model.name}, or with other options that change "
                "its results; start a new run"
            )


def refuse_fixed(given: set[str], path: Path) -> None:
    """Raise BadParameter for a parameter that a record has fixed."""
    for name in sorted(given - FREE):
        hint = "TASK" if name == "what" else f"--{name.replace('_', '-')}"
        raise typer.BadParameter(f"a resumed run keeps its settings, which {path} has; leave it out", param_hint=hint)
