"""Exceptions of evaluation. None of them counts against the model.

    EvalError
        SuiteError          a suite cannot be run: no tasks, a duplicate id, an unknown family
        VerifierError       a task has no verifier, or its verifier does not start on the task's own solution
        RunDirectoryError   a folder is not a run, is damaged, or has another format version
        ComparisonError     two runs cannot be compared: no task in common, or tasks with different content

A task or suite file that cannot be read raises `agentkit.errors.TaskFileError`.
"""

from __future__ import annotations


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
