"""What can go wrong while evaluating, as exceptions. None of these ever counts against the model.

    EvalError
        SuiteError          a suite cannot be made: no tasks, twice the same id, an unknown family
        VerifierError       a task has no verifier, or one that does not start on the task's own solution either
        RunDirectoryError   a folder that is no run, or one of another format version

A task or suite file that cannot be read is `agentkit.errors.TaskFileError`.
"""

from __future__ import annotations


class EvalError(Exception):
    """Base of every error this package raises on purpose."""


class SuiteError(EvalError):
    """A suite that cannot be run; names what was asked for and what there is."""


class VerifierError(EvalError):
    """A task whose verifier is missing, or does not start on the task's solution; names task, command and output."""


class RunDirectoryError(EvalError):
    """A folder that cannot be read as a run; names the folder, what was found and what was expected."""
