"""Exceptions of evaluation. None of them counts against the model.

    EvalError
        SuiteError          a suite cannot be run: no tasks, a duplicate id, an unknown operation
        VerifierError       a task has no verifier, or its verifier does not start on the task's own solution
        RunDirectoryError   a folder is not a run, is damaged, or has another format version
        ComparisonError     two runs cannot be compared: no task in common, or tasks with different content
        ProvenanceError     a row has no usable provenance or accepted licence
        OverlapError        texts cannot be compared: a file is missing, is not text, or there is too much
        PackageError        a package cannot be used to make bugs
            UnknownPackageError     there is no such package, version or file
            NotPureError            it has compiled code
            NoTestsError            it has no tests
            FailingTestsError       its tests fail without any change
        SynthError          a run of `agentkit synth` cannot start or continue
        OutputError         an output file cannot be written

A task or suite file that cannot be read raises `agentkit.errors.TaskFileError`.
"""

from __future__ import annotations

import errno
from pathlib import Path


class EvalError(Exception):
    """Base class of the errors that this package raises."""


class SuiteError(EvalError):
    """A suite cannot be run. The message has what was requested and what is available."""


class VerifierError(EvalError):
    """A task has no verifier, or its verifier does not start. The message has the task and the output."""


class RunDirectoryError(EvalError):
    """A folder cannot be read as a run. The message has the folder, what was found and what was expected."""


class ComparisonError(EvalError):
    """Two runs cannot be compared. The message names both runs, the reason and a remedy."""


class ProvenanceError(EvalError):
    """A row has no usable provenance or no accepted licence."""


class OverlapError(EvalError):
    """Texts cannot be compared. The message names the file, or the size and the limit."""


class PackageError(EvalError):
    """A package cannot be used to make bugs. The message names the package and the reason."""


class UnknownPackageError(PackageError):
    """There is no such package, version or file."""


class NotPureError(PackageError):
    """A package has compiled code, which the sandbox cannot build."""


class NoTestsError(PackageError):
    """A package has no tests in its source distribution."""


class FailingTestsError(PackageError):
    """The tests of a package fail without any change to it. The message has the end of their output."""


class SynthError(EvalError):
    """A run of `agentkit synth` cannot start or continue. The message gives the reason and a remedy."""


class OutputError(EvalError):
    """An output file cannot be written, for example because the disk is full. A later run continues."""


def not_written(exc: OSError, path: Path) -> OutputError:
    """Return the error for a file that could not be written; `path` is used if `exc` names none."""
    full = exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room, then run again" if full else "give a path that can be written"
    return OutputError(f"{exc.filename or path} cannot be written: {exc.strerror}; {remedy}")
