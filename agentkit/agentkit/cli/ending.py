"""How a command ends: an exit code that means the same everywhere, and an error a person can act on.

0   it ran, and met the threshold when one was given
1   it ran, and the mean reward is below the threshold, or no answer fits the schema that was given
2   usage: a flag, a file, a model or a family that is wrong
3   infrastructure: no sandbox, a verifier that cannot start, an engine or disk that failed
130 Ctrl-C
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from enum import IntEnum
from typing import ParamSpec

import typer

from agentkit.cli.terminal import visible

P = ParamSpec("P")


class ExitCode(IntEnum):
    """See the module's docstring."""

    OK = 0
    BELOW_THRESHOLD = 1
    USAGE = 2
    INFRASTRUCTURE = 3
    INTERRUPTED = 130


def ends_well(command: Callable[P, ExitCode | None]) -> Callable[P, None]:
    """Wrap a command: what it returns, or what it raises, becomes the exit code; an error of ours is one message.

    An exception that is nobody's on purpose is a defect, and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs) or ExitCode.OK
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            code = ExitCode.INTERRUPTED
        except typer.BadParameter as exc:
            exc.message = visible(exc.message)  # it may quote a file
            raise
        except Exception as exc:
            from agentkit.errors import first_cause

            cause = first_cause(exc)
            found = code_of(cause)
            if found is None:
                raise
            typer.secho("Error: ", fg="red", bold=True, nl=False, err=True)
            typer.echo(visible(str(cause)), err=True)
            code = found
        sys.stdout.flush()
        raise typer.Exit(code)

    return wrapper


def code_of(exc: BaseException) -> ExitCode | None:
    """The exit code of an error that is raised on purpose; None for a defect."""
    from agentkit.errors import AgentkitError, TaskFileError
    from agentkit_environments import SandboxError
    from agentkit_evals.errors import EvalError, RunDirectoryError, SuiteError

    if isinstance(exc, TaskFileError | SuiteError | RunDirectoryError):
        return ExitCode.USAGE
    if isinstance(exc, SandboxError | EvalError | AgentkitError | OSError):
        return ExitCode.INFRASTRUCTURE
    chat = sys.modules.get("agentkit_engine.chat.errors")
    if chat and isinstance(exc, chat.ChatError):  # an effort that the model's dialect does not have, for one
        return ExitCode.USAGE
    engine = sys.modules.get("agentkit_engine.errors")  # what never was imported, for it imports torch, raised nothing
    if engine and isinstance(exc, engine.ModelNotFoundError | engine.CheckpointError | engine.TokenizerMissingError):
        return ExitCode.USAGE
    if engine and isinstance(exc, engine.GrammarMissingError | engine.GrammarError | engine.CacheFolderError):
        return ExitCode.USAGE
    return ExitCode.INFRASTRUCTURE if engine and isinstance(exc, engine.EngineError) else None
