"""Command endings: exit codes with one meaning for all commands, and error messages instead of tracebacks.

0   success; `run` produced an answer, with reward 1 if the task has a verifier; `eval` met --threshold, if given
1   `run`: no answer, an answer that does not match the schema, a limit, or a reward below 1; `eval`: below
    --threshold, or stopped by --max-cost; `check`: an unsound task; `replay`: a difference; `export`: nothing to write;
    `synth`: fewer tasks than were asked for
2   usage: a wrong flag, file, model or operation; an API's key that is missing or wrong; --max-cost for a model without
    a known price
3   infrastructure: no sandbox, a verifier that cannot start, an engine or disk failure, an API that cannot be reached
    or refuses the request; a defect of agentkit, with its traceback
4   Ctrl-C or SIGTERM stopped `eval` or `demo`; `agentkit eval --resume RUN` continues
130 Ctrl-C elsewhere; 143 SIGTERM; 141 the reader of standard output closed the pipe
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
    """Exit codes of all commands; the module docstring explains them."""

    OK = 0
    UNSOLVED = 1
    USAGE = 2
    INFRASTRUCTURE = 3
    RESUMABLE = 4
    INTERRUPTED = 130
    PIPE_CLOSED = 141


EXIT_CODES = (
    "Exit codes: 0 success; 1 not solved (`run`), below --threshold or stopped by --max-cost (`eval`), unsound task "
    "(`check`), a difference (`replay`); 2 usage error; 3 infrastructure failure; 4 interrupted, and resumable "
    "(`eval`); 130 Ctrl-C; 143 SIGTERM."
)


def ends_well(command: Callable[P, int | None]) -> Callable[P, None]:
    """Wrap a command: map its return value or exception to an exit code, and print expected errors as one message.

    An unexpected exception is a defect and keeps its traceback.
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
            exc.message = visible(exc.message)  # may quote a file
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
                typer.echo(visible(described(cause)), err=True)
                code = found
        raise typer.Exit(code)

    return wrapper


def described(error: BaseException) -> str:
    """Return the message of an error; for one of the operating system, the file and the reason."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def run(function: Callable[[], Awaitable[T]]) -> T:
    """Run `function` with `anyio.run`; the first Ctrl-C or SIGTERM cancels it.

    Raises:
        KeyboardInterrupt: A signal was received and the function has ended.
    """
    result: list[T] = []

    async def cancellable() -> None:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            # The only safe way to call into a running loop from a signal handler.
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
    """Flush standard output and end the process with this status. Signals are ignored from here on."""
    signals.ignore()
    status = code if isinstance(code, int) else int(code is not None)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = status or ExitCode.PIPE_CLOSED
    except OSError as exc:
        status = status or ExitCode.INFRASTRUCTURE
        typer.echo(f"Error: cannot write to standard output: {exc.strerror}", err=True)
    else:
        if signals.received() is None:
            sys.exit(status)
    # a normal exit would flush again and print an error; after a signal, a library's thread might hang
    os._exit(status)


def code_of(exc: BaseException) -> ExitCode | None:
    """Return the exit code of an expected error; None for a defect."""
    from agentkit.errors import (
        AgentkitError,
        ApiKeyError,
        MissingDependencyError,
        ModelOptionError,
        PriceError,
        ReplayError,
        ResumeError,
        TaskFileError,
        TrajectoryCorruptError,
        TrajectoryFormatError,
        UnknownModelError,
    )
    from agentkit_environments import SandboxError
    from agentkit_evals.errors import (
        ComparisonError,
        EvalError,
        OverlapError,
        PackageError,
        ProvenanceError,
        RunDirectoryError,
        SuiteError,
    )
    from agentkit_tools.errors import MCPServerError

    if isinstance(exc, TaskFileError | SuiteError | RunDirectoryError | ComparisonError):
        return ExitCode.USAGE
    if isinstance(exc, OverlapError | PackageError | ProvenanceError):
        return ExitCode.USAGE
    if isinstance(exc, ReplayError | ResumeError | TrajectoryFormatError | TrajectoryCorruptError):
        return ExitCode.USAGE
    if isinstance(exc, ApiKeyError | MissingDependencyError | ModelOptionError | PriceError | UnknownModelError):
        return ExitCode.USAGE
    if isinstance(exc, SandboxError | MCPServerError | EvalError | AgentkitError | OSError):
        return ExitCode.INFRASTRUCTURE
    chat = sys.modules.get("agentkit_engine.chat.errors")
    # for example a reasoning effort that the model's dialect does not have
    if chat and isinstance(exc, chat.ChatError):
        return ExitCode.USAGE
    # importing it would import torch; if it was never imported, it raised nothing
    engine = sys.modules.get("agentkit_engine.errors")
    if engine and isinstance(exc, engine.ModelNotFoundError | engine.CheckpointError | engine.TokenizerMissingError):
        return ExitCode.USAGE
    if engine and isinstance(
        exc, engine.DeviceUnavailableError | engine.BackendUnavailableError | engine.CacheFolderError
    ):
        return ExitCode.USAGE
    if engine and isinstance(exc, engine.GrammarMissingError | engine.GrammarError):
        return ExitCode.USAGE
    return ExitCode.INFRASTRUCTURE if engine and isinstance(exc, engine.EngineError) else None
