"""How a command ends: an exit code that means the same everywhere, and an error a person can act on.

0   it ran; `run` has an answer, with reward 1 where the task has a verifier; `eval` met --threshold if one was given
1   `run`: no answer, an answer that does not fit the schema, a limit, or a reward below 1; `eval`: below --threshold;
    `check`: a task that is not sound
2   usage: a flag, a file, a model or a family that is wrong
3   infrastructure: no sandbox, a verifier that cannot start, an engine or disk that failed
130 Ctrl-C; 143 SIGTERM; 141 standard output was closed by its reader
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import NoReturn, ParamSpec, TypeVar

import anyio
import typer

from agentkit.cli import signals
from agentkit.cli.terminal import visible

P = ParamSpec("P")
T = TypeVar("T")


class ExitCode(IntEnum):
    """See the module's docstring."""

    OK = 0
    UNSOLVED = 1
    USAGE = 2
    INFRASTRUCTURE = 3
    INTERRUPTED = 130
    PIPE_CLOSED = 141


EXIT_CODES = (
    "Exit codes: 0 solved (of `run`), ran (and met --threshold); 1 no answer, a limit, an invalid answer or a reward "
    "below 1 (of `run`), or below --threshold; 2 usage; 3 infrastructure; 130 Ctrl-C; 143 SIGTERM."
)


def ends_well(command: Callable[P, int | None]) -> Callable[P, None]:
    """Wrap a command: what it returns, or what it raises, becomes the exit code; an error of ours is one message.

    An exception that is nobody's on purpose is a defect, and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code: int = command(*args, **kwargs) or ExitCode.OK
            sys.stdout.flush()
        except KeyboardInterrupt:
            typer.echo(signals.words(), err=True)
            code = signals.status()
        except typer.BadParameter as exc:
            exc.message = visible(exc.message)  # it may quote a file
            raise
        except Exception as exc:
            from agentkit.errors import first_cause

            cause = first_cause(exc)
            if isinstance(cause, typer.Exit | typer.Abort) or type(cause).__module__.startswith("typer."):
                raise
            if isinstance(cause, BrokenPipeError):
                code = ExitCode.PIPE_CLOSED
            else:
                found = code_of(cause)
                if found is None:
                    raise
                typer.secho("Error: ", fg="red", bold=True, nl=False, err=True)
                typer.echo(visible(str(cause)), err=True)
                code = found
        raise typer.Exit(code)

    return wrapper


def run(function: Callable[[], Awaitable[T]]) -> T:
    """`anyio.run`, cancelled by the first Ctrl-C or SIGTERM.

    Raises:
        KeyboardInterrupt: a signal came, and what ran has ended.
    """
    result: list[T] = []

    async def cancellable() -> None:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            # A signal handler may call into a running loop in no other way.
            signals.cancel_with(lambda: loop.call_soon_threadsafe(scope.cancel))
            try:
                result.append(await function())
            finally:
                signals.cancel_with(None)

    anyio.run(cancellable)
    if signals.received() or not result:
        raise KeyboardInterrupt
    return result[0]


def leave(code: object) -> NoReturn:
    """End the process with this status: standard output is flushed, and a late signal no longer changes anything."""
    signals.ignore()
    status = code if isinstance(code, int) else int(code is not None)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = status or ExitCode.PIPE_CLOSED
    except OSError as exc:
        status = status or ExitCode.INFRASTRUCTURE
        typer.echo(f"Error: standard output cannot be written: {exc.strerror}", err=True)
    else:
        if signals.received() is None:
            sys.exit(status)
    os._exit(status)  # the interpreter would flush again and complain; after a signal a library's thread might hang


def code_of(exc: BaseException) -> ExitCode | None:
    """The exit code of an error that is raised on purpose; None for a defect."""
    from agentkit.errors import AgentkitError, TaskFileError, TrajectoryCorruptError, TrajectoryFormatError
    from agentkit_environments import SandboxError
    from agentkit_evals.errors import EvalError, RunDirectoryError, SuiteError

    if isinstance(exc, TaskFileError | SuiteError | RunDirectoryError | TrajectoryFormatError | TrajectoryCorruptError):
        return ExitCode.USAGE
    if isinstance(exc, SandboxError | EvalError | AgentkitError | OSError):
        return ExitCode.INFRASTRUCTURE
    chat = sys.modules.get("agentkit_engine.chat.errors")
    if chat and isinstance(exc, chat.ChatError):  # an effort that the model's dialect does not have, for one
        return ExitCode.USAGE
    engine = sys.modules.get("agentkit_engine.errors")  # what never was imported, for it imports torch, raised nothing
    if engine and isinstance(exc, engine.ModelNotFoundError | engine.CheckpointError | engine.TokenizerMissingError):
        return ExitCode.USAGE
    if engine and isinstance(exc, engine.DeviceUnavailableError | engine.CacheFolderError):
        return ExitCode.USAGE
    if engine and isinstance(exc, engine.GrammarMissingError | engine.GrammarError):
        return ExitCode.USAGE
    return ExitCode.INFRASTRUCTURE if engine and isinstance(exc, engine.EngineError) else None
