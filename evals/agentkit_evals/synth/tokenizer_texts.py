"""Texts that a small tokenizer is made for: the constant parts of prompts, calls and results."""

from __future__ import annotations

from collections.abc import Iterator

from agentkit.agent import DEFAULT_SYSTEM
from agentkit_engine import chat
from agentkit_tools import BUILTINS, Tool


def phrases() -> list[str]:
    """Return constant texts of prompts and calls that a small vocabulary can include as single tokens.

    They are the default system prompt, each line (with its newline) of the tools block of the built-in tools, the
    fixed parts of a user tool's line, and the fixed parts of calls and results.
    """
    tools: list[Tool] = list(BUILTINS.values())
    block = chat.encode([{"role": "system", "content": ""}], tools=[tool.spec for tool in tools], effort="high")
    found = [DEFAULT_SYSTEM]
    for piece in between_control_tokens(block):
        found += [line for line in piece.splitlines(keepends=True) if len(line) > 3]
    for tool in tools:
        found.append(f'invoke name="{tool.name}">\n<')
        found += [f'parameter name="{name}" string="true">' for name in tool.parameters["properties"]]
    return list(dict.fromkeys([*found, *TOOL_LINE, *CALL_FRAMES]))


TOOL_LINE = (
    *('{"name": "', '", "description": "', '", "parameters": {"type": "object", "properties": {', '"}, "', '": {'),
    *('"type": "string"}', '"type": "integer"}', '"type": "number"}', '"type": "boolean"}', '"description": "'),
    *('", "type": "string"}', '", "type": "integer"}', '}, "required": ["', '"]}}\n', "}}}\n", '", "', ', "'),
)
CALL_FRAMES = (
    *('invoke name="', '">\n<', 'parameter name="', '" string="true">', '" string="false">', "tool_calls>\n<"),
    *(" `", "\n\n<", "</", "parameter>\n<", "parameter>\n</", "invoke>\n<", "invoke>\n</", "tool_calls>"),
    *("<tool_result>", "</tool_result>", "</tool_result>\n\n<tool_result>"),
)


def between_control_tokens(text: str) -> Iterator[str]:
    """Yield the pieces of a text between control tokens."""
    for token in chat.CONTROL_TOKENS:
        text = text.replace(token, "\0")
    return (piece for piece in text.split("\0") if piece)
