"""Conversion between messages and token ids for DeepSeek-V4.

    messages -> encode / encode_ids -> the model -> StreamParser / parse -> message

`Tokenizer` keeps control tokens apart from text. `encode` gives the reference text; `encode_ids`,
`encode_continuation_ids` and `encode_completion_ids` give the ids for sessions. `StreamParser` converts sampled ids to
events as they arrive.
"""

from __future__ import annotations

from agentkit_engine.chat.errors import ChatError, EncodeError, ParseError, TokenizerError
from agentkit_engine.chat.tokenizer import DecodeStream, Tokenizer
from agentkit_engine.chat.tokens import CONTROL_TOKENS, Control
from agentkit_engine.chat.v4 import (
    EFFORT_TEXT,
    Dialect,
    Effort,
    Message,
    encode,
    encode_completion_ids,
    encode_continuation_ids,
    encode_fim,
    encode_fim_ids,
    encode_ids,
)
from agentkit_engine.chat.v4_parser import (
    CallMalformed,
    CallOpened,
    CallReady,
    CallsWithdrawn,
    FinishReason,
    ParseEvent,
    ParseFinished,
    ReasoningDelta,
    StreamParser,
    TextDelta,
    parse,
)

__all__ = [
    "CONTROL_TOKENS",
    "EFFORT_TEXT",
    "CallMalformed",
    "CallOpened",
    "CallReady",
    "CallsWithdrawn",
    "ChatError",
    "Control",
    "DecodeStream",
    "Dialect",
    "Effort",
    "EncodeError",
    "FinishReason",
    "Message",
    "ParseError",
    "ParseEvent",
    "ParseFinished",
    "ReasoningDelta",
    "StreamParser",
    "TextDelta",
    "Tokenizer",
    "TokenizerError",
    "encode",
    "encode_completion_ids",
    "encode_continuation_ids",
    "encode_fim",
    "encode_fim_ids",
    "encode_ids",
    "parse",
]
