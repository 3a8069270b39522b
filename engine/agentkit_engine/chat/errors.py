"""Errors of the chat encoding.

ChatError (a ValueError: the caller's input is wrong)
├── TokenizerError      a tokenizer file is missing, unreadable or unusable, or lacks an id or control token
├── EncodeError         a conversation has no encoding
└── ParseError          a completion violates the strict grammar (`parse(..., strict=True)` only)
"""

from __future__ import annotations


class ChatError(ValueError):
    """Base of all errors that this package raises deliberately."""


class TokenizerError(ChatError):
    """The tokenizer file cannot be used, or it lacks the requested id or control token."""


class EncodeError(ChatError):
    """The messages, the effort or the task name cannot be encoded."""


class ParseError(ChatError):
    """The completion violates the strict grammar of an assistant turn."""
