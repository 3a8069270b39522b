"""The rule that decides how a trial that broke off is counted.

| what broke | phase | counts as |
|---|---|---|
| `SandboxUnavailableError`: no sandbox could be opened | any | infrastructure |
| `HostFailureError`: evidence from outside the sandbox blames the host | any | infrastructure |
| `MemoryError` in the harness | any | infrastructure |
| `VerifierError`: the verifier does not start on the task's own solution | scoring | infrastructure |
| a setup command, a task file, the sandbox | setup | task |
| anything else | setup | infrastructure |
| `SnapshotError`: the task's own files are too many for its `environment.snapshots` | agent | task |
| the sandbox | agent | a score of 0 |
| the model, the engine, the trajectory file | agent | infrastructure |
| anything else, such as an oversized workdir or a sandbox that dies | scoring | a score of 0 |

Once the agent has started, a sandbox fault counts against the agent unless there is evidence against the machine.
Otherwise an agent could remove a lost trial from the mean by breaking its sandbox.
"""

from __future__ import annotations

from typing import Literal

from agentkit.errors import TaskSetupError, first_cause
from agentkit_environments import HostFailureError, SandboxError, SandboxUnavailableError, SnapshotError
from agentkit_evals.errors import VerifierError

Phase = Literal["setup", "agent", "scoring"]
Blame = Literal["infrastructure", "task", "agent"]


def blame(exc: BaseException, phase: Phase) -> Blame:
    """Return what an exception counts as; "agent" means a score of 0. The module docstring has the rule."""
    cause = first_cause(exc)
    if isinstance(cause, SandboxUnavailableError | HostFailureError | VerifierError | MemoryError):
        return "infrastructure"
    if phase == "setup":
        return "task" if isinstance(cause, TaskSetupError | SandboxError | OSError | ValueError) else "infrastructure"
    if phase == "agent":
        if isinstance(cause, SnapshotError):
            return "task"
        return "agent" if isinstance(cause, SandboxError) else "infrastructure"
    return "agent"


def describe(exc: BaseException) -> str:
    """Return an exception's type and message; for a group, those of its first cause."""
    cause = first_cause(exc)
    return well_formed(f"{type(cause).__name__}: {cause}")


def well_formed(text: str) -> str:
    """Return `text` with each unpaired surrogate, which JSON allows and UTF-8 does not, replaced by a question mark."""
    return text.encode("utf-8", "replace").decode()
