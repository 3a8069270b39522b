"""Who is to blame when a trial breaks off: the one place where that is decided.

| what broke | while | counts as |
|---|---|---|
| `SandboxUnavailableError`: no sandbox could be opened | always | infrastructure |
| `HostFailureError`: evidence from outside the sandbox blames the host | always | infrastructure |
| `VerifierError`: the verifier does not start on the task's own solution | scoring | infrastructure |
| memory of the harness | always | infrastructure |
| a setup command, or anything else in the sandbox before the agent starts | setup | task |
| the model, the engine, the trajectory's file | the agent runs | infrastructure |
| the sandbox | the agent runs | a score of 0 |
| anything else: files that cannot be carried, a sandbox that dies | scoring | a score of 0 |

Once the agent has started, a fault without evidence against the machine is taken for the agent's: otherwise whoever is
about to lose could break its trial and leave the mean.
"""

from __future__ import annotations

from typing import Literal

from agentkit.errors import TaskSetupError, first_cause
from agentkit_environments import HostFailureError, SandboxError, SandboxUnavailableError
from agentkit_evals.errors import VerifierError

Phase = Literal["setup", "agent", "scoring"]
Blame = Literal["infrastructure", "task", "agent"]


def blame(exc: BaseException, phase: Phase) -> Blame:
    """Return whose fault an exception is; "agent" means a score of 0. See the table in this module's docstring."""
    cause = first_cause(exc)
    if isinstance(cause, SandboxUnavailableError | HostFailureError | VerifierError | MemoryError):
        return "infrastructure"
    if phase == "setup":
        return "task" if isinstance(cause, TaskSetupError | SandboxError | OSError | ValueError) else "infrastructure"
    if phase == "agent":
        return "agent" if isinstance(cause, SandboxError) else "infrastructure"
    return "agent"


def describe(exc: BaseException) -> str:
    """An exception with its type; of a group, its first cause."""
    cause = first_cause(exc)
    return well_formed(f"{type(cause).__name__}: {cause}")


def well_formed(text: str) -> str:
    """`text` with each half of a surrogate pair, which JSON can spell and no file can hold, as a question mark."""
    return text.encode("utf-8", "replace").decode()
