"""The text format of calls and tool results, shared by the encoder, the parsers and the grammar.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">text as it is</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

The block of calls follows an empty line and ends the turn. A call without parameters has an empty line in their place.
A tag is a sequence of pieces: `Control` tokens and plain text. The encoder converts pieces to ids, and the grammar
converts them to terms of its rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from agentkit_engine.chat.tokens import DSML

BLOCK: Final = "tool_calls"
INVOKE: Final = "invoke"
PARAMETER: Final = "parameter"

BLOCK_START: Final = ("\n\n<", DSML, f"{BLOCK}>\n")
BLOCK_END: Final = ("</", DSML, f"{BLOCK}>")
INVOKE_START: Final = ("<", DSML, f'{INVOKE} name="')
"""Up to the name; `invoke_name` follows."""
INVOKE_END: Final = ("</", DSML, f"{INVOKE}>\n")
PARAMETER_START: Final = ("<", DSML, f'{PARAMETER} name="')
"""Up to the name; `parameter_name` follows."""
PARAMETER_END: Final = ("</", DSML, f"{PARAMETER}>\n")
NO_PARAMETERS: Final = "\n"
RESULT_END: Final = "</tool_result>"

NAME: Final = '[^"<>]*'
"""Pattern of the names that the format can express."""
BLOCK_WORD: Final = r"\w*(?:tool|function|call|invo)"
"""Pattern of the beginning of `tool_calls`, and of words that models write instead, in upper or lower case."""


def invoke_name(name: str) -> str:
    """Return the rest of a call's first line, from the name on."""
    return f'{name}">\n'


def parameter_name(key: str, *, string: bool) -> str:
    """Return the rest of a parameter's start tag, from the name on. `string` means that the value is text, not JSON."""
    return f'{key}" string="{"true" if string else "false"}">'


def render_block(calls: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return the pieces of a block of calls, each given by its name and arguments."""
    pieces: list[str] = [*BLOCK_START]
    for name, arguments in calls:
        pieces += [*INVOKE_START, invoke_name(name)]
        for key, value in arguments.items():
            string = isinstance(value, str)
            pieces += [*PARAMETER_START, parameter_name(key, string=string), value if string else json_text(value)]
            pieces += PARAMETER_END
        pieces += INVOKE_END if arguments else (NO_PARAMETERS, *INVOKE_END)
    return [*pieces, *BLOCK_END]


def render_result(text: str, *, escape: bool) -> str:
    """Return a tool result. `escape` rewrites a `</tool_result>` in `text`, which would end the result early."""
    return f"<tool_result>{text.replace(RESULT_END, '&lt;/tool_result>') if escape else text}{RESULT_END}"


def json_text(value: Any) -> str:
    """Return `value` as JSON text in the format's spelling."""
    return json.dumps(value, ensure_ascii=False)


def json_object(values: Mapping[str, str]) -> str:
    """Return the JSON text of an object whose values are JSON texts."""
    return "{" + ", ".join(f"{json_text(key)}: {value}" for key, value in values.items()) + "}"
