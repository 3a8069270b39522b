"""What can go wrong in the engine room.

EngineError
├── ModelNotFoundError        no packaged model and no folder has that name
├── DeviceUnavailableError    a GPU is asked for that this machine or this torch does not have
├── CheckpointError           a model folder is not what its layout promises; names file, tensor, found, expected
├── TokenizerMissingError     the model folder holds no tokenizer.json
├── EngineClosedError         an AsyncEngine was used outside its `async with` block
├── GrammarMissingError       a grammar is asked for, and llguidance cannot be imported
├── GrammarError              a grammar cannot be made, or ids do not fit it
├── OutOfMemoryError          the memory for sequences is used up by those at work
├── SavedSessionError         a file is no saved session, or one of another model, or damaged
├── CacheFolderError          a cache folder or its key could be changed by others, or has no usable key
└── SessionError
    ├── SessionClosedError    used after close()
    ├── SessionBusyError      two tasks drive one session at the same moment
    ├── SessionEmptyError     generate() before any id was appended
    ├── TokenIdError          an id outside the vocabulary
    ├── ContextLengthError    more ids than the model has positions
    └── NonFiniteLogitsError  the model computed NaN or infinity, so nothing can be sampled

A wrong argument (a negative temperature, say) is a `ValueError`, as everywhere in Python.
"""

from __future__ import annotations

from pathlib import Path


class EngineError(Exception):
    """Base of every error this room raises on purpose."""


class ModelNotFoundError(EngineError):
    """Neither a packaged model nor a folder with that name exists."""


class DeviceUnavailableError(EngineError):
    """The device that a model is to be loaded on is not there; the message says what is, and what to do."""


class CheckpointError(EngineError):
    """A model folder cannot be loaded.

    Attributes:
        path: the offending file.
        tensor: the offending tensor, `None` when the file as a whole is wrong.
    """

    def __init__(self, path: Path, problem: str, *, tensor: str | None = None) -> None:
        self.path = path
        self.tensor = tensor
        shown = "" if tensor is None else f"tensor {tensor!r}: ".replace("'", "")[:200]  # the name is from the file
        super().__init__(f"{path}: {shown}{problem}")


class TokenizerMissingError(EngineError):
    """The model folder holds no tokenizer; the model itself still works on token ids."""


class EngineClosedError(EngineError):
    """The AsyncEngine is not running: its `async with` block was left, or not yet entered."""


class GrammarMissingError(EngineError):
    """A grammar is asked for, and llguidance, which reads grammars, cannot be imported."""


class GrammarError(EngineError):
    """Tools or a schema that no grammar can be made of, or ids in a session that the grammar in force forbids."""


class OutOfMemoryError(EngineError):
    """The engine's memory for sequences has no free slot or not enough free spans."""


class SavedSessionError(EngineError):
    """A saved session cannot be opened; names the file, what was found and what was expected."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class CacheFolderError(EngineError):
    """A cache folder cannot be trusted, or its key cannot be used; names the file, its owner and mode, and a remedy."""


class SessionError(EngineError):
    """Base of what goes wrong in one session; other sessions of the engine are not affected."""


class SessionClosedError(SessionError):
    """The session was closed."""


class SessionBusyError(SessionError):
    """A step of this session is already running for another task."""


class SessionEmptyError(SessionError):
    """There is nothing to continue: append at least one id first."""


class TokenIdError(SessionError):
    """A token id lies outside the model's vocabulary."""


class ContextLengthError(SessionError):
    """The session would hold more ids than the model has positions."""


class NonFiniteLogitsError(SessionError):
    """The logits hold NaN or infinity."""
