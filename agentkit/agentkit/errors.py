"""Exceptions of the agent loop.

Mistakes of the model are never exceptions: they become tool results that the model reads.

    AgentkitError
        ModelError                  a model could not be reached or refused to work; never the agent's fault
            UnknownModelError       no such model or provider
            ModelOptionError        the model does not have an effort or parameter that was asked for
            MissingDependencyError  a package that the model needs is not installed
            ApiError                a request to an API failed for good; has the HTTP status
                ApiKeyError         the key is missing, wrong or not allowed
            PriceError              a price table cannot be used, or a price is needed and unknown
        ContextFullError            the next prompt does not fit; the loop ends the run with limit "context"
        TrajectoryError             a trajectory file cannot be used
            TrajectoryFormatError   not a trajectory, or one of another format version
            TrajectoryCorruptError  a record in the middle of the file is damaged
            TrajectoryWriteError    a record could not be written; the run ends
            ResumeError             the record has no interrupted run, or one with other settings
            ReplayError             the record has no ids that a model in this process could replay
        TaskError                   a task cannot be used as it stands
            TaskFileError           a task or suite file is wrong; has file and line
            TaskSetupError          a setup command of the task failed
        RunningLoopError            a blocking call inside a running event loop, as in a notebook
"""

from __future__ import annotations


class AgentkitError(Exception):
    """Base class of the errors that this package raises."""


class ModelError(AgentkitError):
    """A model could not be reached, or refused to work. The message is one line that also says what to do."""


class UnknownModelError(ModelError, ValueError):
    """There is no such model or provider. The message has what was given and what exists."""


class ModelOptionError(ModelError, ValueError):
    """The model does not support the effort, the sampling parameter or the number of tools. The message says what it
    supports."""


class MissingDependencyError(ModelError, ImportError):
    """A package that the model needs is not installed. The message has the command that installs it."""


class ApiError(ModelError):
    """A request to an API failed, and a retry did not help or cannot help.

    Attributes:
        status: The HTTP status; None if there was no response.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ApiKeyError(ApiError):
    """The API's key is missing, wrong, or not allowed to use the model. The message never contains the key."""


class PriceError(ModelError, ValueError):
    """A price table cannot be used, or a cost limit needs a price that is unknown. The message says what to do."""


class ContextFullError(AgentkitError):
    """The next prompt does not fit into the model's context; none of it was fed."""


class TrajectoryError(AgentkitError):
    """A trajectory file cannot be read or written."""


class TrajectoryFormatError(TrajectoryError):
    """The file is not a trajectory in the format version that this package reads. The message names both versions."""


class TrajectoryCorruptError(TrajectoryError):
    """A record before the end of the file fails its checksum or schema. The message names the file and line."""


class TrajectoryWriteError(TrajectoryError):
    """A record could not be written. The message names the file, the reason and the remedy."""


class ResumeError(TrajectoryError, ValueError):
    """The record cannot be resumed: its run has ended or not begun, has other settings, or needs a lost sandbox."""


class ReplayError(TrajectoryError, ValueError):
    """The record cannot be replayed. The message has the reason."""


class TaskError(AgentkitError):
    """A task cannot be used as it stands. The model is never at fault."""


class TaskFileError(TaskError):
    """A task or suite file cannot be used. The message has one `FILE:LINE: problem` per problem."""


class TaskSetupError(TaskError):
    """A setup command of the task failed in a working sandbox. The message has the command and its output."""


class RunningLoopError(AgentkitError, RuntimeError):
    """`run_sync` or `continue_sync` was called while an event loop is running. The message has the code to await."""


def first_cause(exc: BaseException) -> BaseException:
    """Return the first exception inside (nested) exception groups, or the exception itself if it is not a group."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
