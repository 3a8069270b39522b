"""Calls that a DeepSeek model wrote as text, because its server did not parse them.

The markers have the bars of the token (`｜DSML｜`), ASCII bars, or double bars. As in the embedded model's parser, a
block of calls counts only if the turn ends right after it; any other block is a quotation, and stays text. There are
two exceptions: if a block starts the answer and more lines follow it, its calls are malformed, and if the answer is
only a block in a Markdown fence, the block counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

from agentkit.model import CallMalformed, CallReady
from agentkit_engine import chat
from agentkit_engine.chat.format import BLOCK_WORD
from agentkit_engine.chat.tokens import DSML
from agentkit_tools import ToolCall

_MARKER: Final = r"\s?[|｜]{1,2}\s?DSML\s?[|｜]{1,2}\s?"
_ANY: Final = re.compile(rf"(</?){_MARKER}")
_START: Final = re.compile(rf"<{_MARKER}(?={BLOCK_WORD})", re.IGNORECASE)
_CLOSING: Final = re.compile(rf"</{_MARKER}\w+>")
_BEGUN: Final = re.compile(r"<\s?(?:[|｜]{1,2}\s?(?:D(?:S(?:M(?:L\s?(?:[|｜]{1,2}\s?)?)?)?)?)?)?\w*\Z")
_FENCED: Final = re.compile(r"\s*```[\w-]*\n(.*?)\n?```\s*", re.DOTALL)
_LONGEST: Final = 48
_MAX_STARTS: Final = 32


def shown_length(text: str, known: int = 0) -> int:
    """Return the length of the beginning of a text that is certainly not part of a block of calls; at least `known`."""
    start = _START.search(text, known)
    if start is not None:
        return start.start()
    offset = max(known, len(text) - _LONGEST)
    begun = _BEGUN.search(text, offset)
    return begun.start() if begun else len(text)


def split_calls(
    text: str, *, turn: int, tools: Sequence[Mapping[str, Any]]
) -> tuple[str, list[CallReady | CallMalformed]]:
    """Return the text before the block of calls at its end, and the calls; the whole text if there is no such block."""
    fenced = _FENCED.fullmatch(text)
    if fenced and _START.match(fenced[1]):
        text = fenced[1]
    for start in islice(_START.finditer(text), _MAX_STARTS):
        parser = chat.StreamParser(False, turn=turn, tools=tools)
        parsed = parser.feed(_ANY.sub(rf"\1{DSML}", text[start.start() :])) + parser.finish()
        if any(isinstance(event, chat.TextDelta) and event.text.strip() for event in parsed):
            names = [event.name for event in parsed if isinstance(event, chat.CallReady)]
            is_alone = not text[: start.start()].strip() and _CLOSING.split(text)[-1].startswith("\n")
            if names and is_alone:
                return "", [CallMalformed(index, name, "text follows the calls") for index, name in enumerate(names)]
            continue
        calls: list[CallReady | CallMalformed] = []
        for event in parsed:
            match event:
                case chat.CallReady():
                    calls.append(CallReady(event.index, ToolCall(event.id, event.name, event.arguments_json)))
                case chat.CallMalformed():
                    calls.append(CallMalformed(event.index, event.name, event.error))
        begins_line = text[: start.start()].rpartition("\n")[2].isspace() or text[: start.start()][-1:] in ("", "\n")
        if any(isinstance(call, CallReady) for call in calls) or (calls and begins_line):
            return text[: start.start()].rstrip(), calls
    return text, []
