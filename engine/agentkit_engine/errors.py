"""Errors of the engine.

EngineError
├── ModelNotFoundError        no packaged model and no folder has that name
├── DeviceUnavailableError    the GPU does not exist on this machine, or Triton's kernels do not support it
├── BackendUnavailableError   a library that the requested backend needs is missing or broken
├── CheckpointError           a model folder does not match its layout; names file, tensor, found, expected
│   └── ModelTooLargeError    the weights need more memory than the machine has; names forms that would fit
├── TokenizerMissingError     the model folder has no tokenizer.json
├── EngineClosedError         an AsyncEngine was used outside its `async with` block
├── GrammarMissingError       a grammar was requested, and llguidance cannot be imported
├── GrammarError              a grammar cannot be built, or ids violate it
├── WorkerLostError           a process that computes for one of several devices ended, so nothing can be computed
├── OutOfMemoryError          there is no memory for sequences, or active sessions use all of it
├── SavedSessionError         a file is not a saved session, belongs to another model, or is damaged
├── CacheFolderError          other users could change a cache folder or its key, or the key is unusable
└── SessionError
    ├── SessionClosedError    used after close()
    ├── SessionBusyError      two tasks use one session at the same time
    ├── SessionEmptyError     generate() before any id was appended
    ├── TokenIdError          an id outside the vocabulary
    ├── ContextLengthError    more ids than the model has positions
    └── NonFiniteLogitsError  the model computed NaN or infinity, so nothing can be sampled

SamplingParamsError (ValueError, TypeError)  a field of SamplingParams has the wrong type or is out of range

Any other invalid argument is a `ValueError`.
"""

from __future__ import annotations

from pathlib import Path


class EngineError(Exception):
    """Base of all errors that the engine raises deliberately."""


class SamplingParamsError(ValueError, TypeError):
    """A field of `SamplingParams` has the wrong type or is out of range; names field, value and expectation."""


class ModelNotFoundError(EngineError):
    """Neither a packaged model nor a folder with that name exists."""


class DeviceUnavailableError(EngineError):
    """The requested device does not exist here, or the kernels do not support it; the message names what was found and
    a remedy."""


class BackendUnavailableError(EngineError):
    """A library that the requested backend needs is missing or broken."""


class CheckpointError(EngineError):
    """A model folder cannot be loaded.

    Attributes:
        path: the offending file.
        tensor: the offending tensor, or `None` if the whole file is wrong.
    """

    def __init__(self, path: Path, problem: str, *, tensor: str | None = None) -> None:
        self.path = path
        self.tensor = tensor
        # the name comes from an untrusted file
        shown = "" if tensor is None else f"tensor {tensor!r}: ".replace("'", "")[:200]
        super().__init__(f"{path}: {shown}{problem}")


class ModelTooLargeError(CheckpointError):
    """The weights need more memory than there is; names both, and the forms of the model that would fit."""


class TokenizerMissingError(EngineError):
    """The model folder has no tokenizer; the model still works on token ids."""


class EngineClosedError(EngineError):
    """The AsyncEngine is not running: its `async with` block has not been entered, or was left."""


class GrammarMissingError(EngineError):
    """A grammar was requested, and llguidance, which implements grammars, cannot be imported."""


class GrammarError(EngineError):
    """No grammar can be built from the tools or the schema, or the session's ids violate the grammar in force."""


class OutOfMemoryError(EngineError):
    """The memory for sequences has no free slot or not enough free spans, or the device has no room for that memory."""


class WorkerLostError(EngineError):
    """One of the processes of an engine on several devices failed; the engine must be loaded again."""


class SavedSessionError(EngineError):
    """A saved session cannot be opened; names the file, what was found and what was expected."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class CacheFolderError(EngineError):
    """A cache folder cannot be trusted, or its key is unusable; names the file, its owner and mode, and a remedy."""


class SessionError(EngineError):
    """Base of errors in one session; other sessions of the engine are not affected."""


class SessionClosedError(SessionError):
    """The session was closed."""


class SessionBusyError(SessionError):
    """Another task is already running a step of this session."""


class SessionEmptyError(SessionError):
    """The session has no ids; append at least one first."""


class TokenIdError(SessionError):
    """A token id lies outside the model's vocabulary."""


class ContextLengthError(SessionError):
    """The session would have more ids than the model has positions."""


class NonFiniteLogitsError(SessionError):
    """The logits contain NaN or infinity."""
