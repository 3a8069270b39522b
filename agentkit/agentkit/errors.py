"""What can go wrong in the loop, as exceptions.

What the model did wrong is never one of these: it becomes a tool result that the model reads.

    AgentkitError
        ContextFullError            the next prompt does not fit; the loop ends the run with limit "context"
        TrajectoryError             a trajectory file cannot be used
            TrajectoryFormatError   not a trajectory, or one of another format version
            TrajectoryCorruptError  a record in the middle of the file is damaged
            TrajectoryWriteError    the disk refused a record; the run ends
        TaskError                   a task cannot be used as it stands
            TaskFileError           a task or suite file that is wrong, with file and line
            TaskSetupError          a setup command of the task failed
        RunningLoopError            a blocking call inside a running event loop, as in a notebook
"""

from __future__ import annotations


class AgentkitError(Exception):
    """Base of every error this package raises on purpose."""


class ContextFullError(AgentkitError):
    """What is to be said next does not fit into the model's context; nothing of it was fed."""


class TrajectoryError(AgentkitError):
    """A trajectory file cannot be read or written."""


class TrajectoryFormatError(TrajectoryError):
    """The file is not a trajectory of the format version this package reads; both are named."""


class TrajectoryCorruptError(TrajectoryError):
    """A record that later records follow fails its checksum or its schema; file and line are named."""


class TrajectoryWriteError(TrajectoryError):
    """A record could not be written; names the file, the reason and what to do."""


class TaskError(AgentkitError):
    """A task that cannot be used as it stands: never the model's fault."""


class TaskFileError(TaskError):
    """A task or suite file that cannot be used. The text has one `FILE:LINE: what is wrong` per problem."""


class TaskSetupError(TaskError):
    """A setup command of the task failed in a working sandbox; names the command and has its output."""


class RunningLoopError(AgentkitError, RuntimeError):
    """`run_sync` or `continue_sync` where an event loop is running; names what to await instead."""


def first_cause(exc: BaseException) -> BaseException:
    """The exception itself, or of a group, as task groups raise them, the first one inside."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
