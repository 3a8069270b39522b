"""A parser for DeepSeek's own grammar of completions, without leniency: one spelling is accepted."""

from __future__ import annotations

import re
from typing import Any

from agentkit_engine.chat import format as dsml
from agentkit_engine.chat.errors import ParseError
from agentkit_engine.chat.tokens import BOS, DSML, EOS, THINK, THINK_END

_BLOCK_START = "".join(dsml.BLOCK_START).removesuffix(">\n")
_BLOCK_END = "".join(dsml.BLOCK_END)
_INVOKE_START = re.compile("".join(dsml.INVOKE_START) + dsml.invoke_name(f"({dsml.NAME})"))
_INVOKE_END = "".join(dsml.INVOKE_END)
_PARAMETER_START = re.compile("".join(dsml.PARAMETER_START) + rf'({dsml.NAME})"( string="(?:true|false)")?>')


def parse_strict(text: str, *, think: bool) -> dict[str, Any]:
    """Return the assistant message in a completion's text. Raises ParseError if the text violates the grammar."""
    reasoning, rest = "", text
    if think:
        reasoning, found, rest = rest.partition(THINK_END)
        if not found or _BLOCK_START in reasoning or EOS in reasoning:
            raise ParseError(f"missing {THINK_END} before the answer; the completion starts {text[:60]!r}")
    content, block_start, block = rest.partition(_BLOCK_START)
    calls: list[dict[str, Any]] = []
    if EOS in content or not block_start:
        content, found, after = rest.partition(EOS)
        if not found:
            raise ParseError(f"missing {EOS} at the end; the completion ends {text[-60:]!r}")
    else:
        calls, after = _parse_block(block)
        if not after.startswith(EOS):
            raise ParseError(f"expected {EOS} right after the tool_calls block; got {after[:60]!r}")
        after = after.removeprefix(EOS)
    if after:
        raise ParseError(f"text after {EOS}: {after[:60]!r}")
    for part, name in ((reasoning, "reasoning"), (content, "content")):
        for token in (BOS, EOS, THINK, THINK_END, DSML):
            if token in part:
                raise ParseError(f"control token {token} inside the {name}")
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if think:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _parse_block(block: str) -> tuple[list[dict[str, Any]], str]:
    """Return the calls of a block, and the text after it. `block` starts after `<｜DSML｜tool_calls`."""
    calls: list[dict[str, Any]] = []
    if not block.startswith(">\n"):
        raise ParseError(f"expected '>\\n' after the tool_calls marker; got {block[:60]!r}")
    rest = block[2:]
    while not rest.startswith(_BLOCK_END):
        invoke = _INVOKE_START.match(rest)
        if invoke is None:
            raise ParseError(f"expected an invoke or the end of the tool_calls block; got {rest[:60]!r}")
        arguments, rest = _parse_parameters(rest[invoke.end() :])
        function = {"name": invoke[1], "arguments": arguments}
        calls.append({"id": f"call_0_{len(calls)}", "type": "function", "function": function})
    return calls, rest[len(_BLOCK_END) :]


def _parse_parameters(text: str) -> tuple[str, str]:
    """Return the arguments of a call as JSON text, and the text after its `</invoke>` line."""
    arguments: dict[str, str] = {}
    rest = text.removeprefix(dsml.NO_PARAMETERS)
    while not rest.startswith(_INVOKE_END):
        parameter = _PARAMETER_START.match(rest)
        if parameter is None:
            raise ParseError(f"expected a parameter or the end of the invoke; got {rest[:60]!r}")
        key, string = parameter.groups()
        if string is None:
            raise ParseError(f"parameter {key!r} lacks its string attribute")
        if key in arguments:
            raise ParseError(f"parameter {key!r} is given twice")
        value, found, rest = rest[parameter.end() :].partition(f"/{DSML}{dsml.PARAMETER}")
        if not found or not value.endswith("<") or not rest.startswith(">\n"):
            raise ParseError(f"parameter {key!r} is not closed by its tag and a newline; got {rest[:60]!r}")
        rest = rest[2:]
        arguments[key] = dsml.json_text(value[:-1]) if "true" in string else value[:-1]
    return dsml.json_object(arguments), rest[len(_INVOKE_END) :]
