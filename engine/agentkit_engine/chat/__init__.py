"""Messages to ids and back, for DeepSeek-V4.

    messages -> encode / encode_ids -> the model -> StreamParser / parse -> message

`Tokenizer` keeps control tokens apart from text; `encode` is the reference text, `encode_ids`,
`encode_continuation_ids` and `encode_completion_ids` are what sessions are made of; `StreamParser` turns sampled ids
into events while they arrive.
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
