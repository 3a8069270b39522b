"""What can go wrong between messages and token ids.

ChatError (a ValueError: the caller's input is at fault)
├── TokenizerError      a tokenizer file that is missing, unreadable or unfit; an id or control token it lacks
├── EncodeError         a conversation that has no encoding
└── ParseError          a completion outside the strict grammar (`parse(..., strict=True)` only)
"""

from __future__ import annotations


class ChatError(ValueError):
    """Base of everything this package raises on purpose."""


class TokenizerError(ChatError):
    """The tokenizer file cannot be used, or it lacks the asked id or control token."""


class EncodeError(ChatError):
    """The messages, the effort or the task name cannot be encoded."""


class ParseError(ChatError):
    """The completion breaks the strict grammar of an assistant turn."""
