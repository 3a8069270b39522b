"""DeepSeek-V4's chat encoding: messages to the exact prompt, as text or as ids.

One renderer produces a list of pieces: `Control` tokens and plain text. `encode` joins them to the reference text,
which equals the output of DeepSeek's own encoder byte for byte; it is for comparison, display and echoing. `encode_ids`
and its siblings produce model input: control tokens become their ids, and the text between two of them is tokenised as
one string in which nothing can become a control token. If no text spells a control token or closes a tool result, both
agree: `tokenizer.encode(encode(m)) == encode_ids(m)`.

Messages are OpenAI-shaped dicts. Roles: system (anywhere), user, assistant (`content`, `reasoning_content`,
`tool_calls`), tool (`content`, `tool_call_id`), latest_reminder, and developer (a user turn that can have tools).
Further keys: `tools` and `response_format` on system and developer, `task` on a message that is last or is answered by
an assistant message, `wo_eos` on a last assistant message (prefix completion: the model continues it).

    <BOS>system<User>question<Assistant><think>reasoning</think>answer<EOS><User>...<Assistant><think>

Source: the encoder published with DeepSeek-V4 (April 2026) and, for dialect v4-0731, its effort table of July 2026.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from agentkit_engine.chat.errors import EncodeError
from agentkit_engine.chat.format import json_text, render_block, render_result
from agentkit_engine.chat.tokenizer import Tokenizer
from agentkit_engine.chat.tokens import (
    ASSISTANT,
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    LATEST_REMINDER,
    TASKS,
    THINK,
    THINK_END,
    USER,
    Control,
    split_template,
)

Effort = Literal["none", "low", "high", "max"]
Dialect = Literal["v4-preview", "v4-0731"]
Message = Mapping[str, Any]

_ABSOLUTE_MAXIMUM = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
_BEYOND_MAXIMUM = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""
EFFORT_TEXT: dict[str, dict[str, str]] = {
    "v4-preview": {"none": "", "high": "", "max": _ABSOLUTE_MAXIMUM},
    "v4-0731": {"none": "", "low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM},
}
"""The efforts of each dialect, with the text that follows BOS. With "none" the model does not think."""

_TOOLS_HEAD = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_TAIL = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def encode(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    effort: Effort = "none",
    dialect: Dialect = "v4-preview",
    drop_thinking: bool = True,
) -> str:
    """Return the reference text of a conversation, up to the point where the assistant continues.

    Args:
        messages: OpenAI-shaped dicts, oldest first.
        tools: OpenAI tool dicts. They are added to the first system message, or to an empty one if there is none.
        effort: "none" renders chat mode (no reasoning anywhere), every other effort thinking mode.
        dialect: The release whose effort table applies; a property of the checkpoint.
        drop_thinking: Omit the reasoning of turns before the last user turn. As in DeepSeek's encoder, this has no
            effect if any message has tools; then all reasoning is kept.

    Raises:
        EncodeError: The effort, a role or a task is unknown, `arguments` are not JSON text of an object, or content is
            not text.
    """
    pieces = _render(messages, tools, effort=effort, dialect=dialect, drop_thinking=drop_thinking)
    return "".join(pieces)


def encode_ids(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    effort: Effort = "none",
    dialect: Dialect = "v4-preview",
    drop_thinking: bool = True,
    think: bool | None = None,
) -> list[int]:
    """Return the ids to feed a model for a conversation: `encode` made safe, and tokenised piece by piece.

    Text of users and tools stays text, even if it spells a control token. A `</tool_result>` in a tool's output, which
    would close the result early, becomes `&lt;/tool_result>`; the reference text keeps it unchanged.

    Args:
        think: Whether the next turn thinks, independent of `effort` (which selects the effort text and the treatment of
            earlier reasoning). None: as `effort` implies.

    Raises:
        EncodeError: As for `encode`.
        TokenizerError: The tokenizer lacks a control token that the conversation needs.
    """
    pieces = _render(
        messages, tools, effort=effort, dialect=dialect, drop_thinking=drop_thinking, think=think, escape=True
    )
    return _to_ids(pieces, tokenizer)


def encode_continuation_ids(messages: Sequence[Message], *, tokenizer: Tokenizer, think: bool) -> list[int]:
    """Return the ids to append to a session whose last assistant turn ended with EOS, up to where the model continues.

    `messages` are only the new ones: tool results (in the order of their calls), user messages, or both; system and
    reminder messages may precede them. For such a session

        encode_ids(prompt) + completion + continuation == encode_ids(whole conversation, drop_thinking=False)

    with one exception: a turn sampled without thinking in a thinking session starts with `</think>`, as it was sampled,
    whereas the encoding of the whole conversation writes `<think></think>`.

    Raises:
        EncodeError: As for `encode`; or `messages` include an assistant message or do not call for an assistant turn.
        TokenizerError: The tokenizer lacks a control token that the messages need.
    """
    turns = _merge_turns(messages, escape=True)
    if not turns or turns[-1].role not in ("user", "developer") or any(turn.role == "assistant" for turn in turns):
        raise EncodeError(
            f"a continuation holds no assistant message and ends with a user or tool message; got roles "
            f"{[message.get('role') for message in messages]}"
        )
    return _to_ids(_render_turns(turns, thinking=think, keep_all=True, think_next=think), tokenizer)


def encode_completion_ids(message: Message, *, tokenizer: Tokenizer, think: bool) -> list[int]:
    """Return the ids an assistant samples for `message`: reasoning and `</think>` if it thinks, content, calls, EOS.

    Without `think`, `reasoning_content` is omitted, as in chat mode.

    Raises:
        EncodeError: The message is not an assistant's, or its calls cannot be encoded.
        TokenizerError: The tokenizer lacks a control token that the message needs.
    """
    if message.get("role", "assistant") != "assistant":
        raise EncodeError(f"a completion is an assistant message; got role {message.get('role')!r}")
    return _to_ids(_assistant(message, reasoning=think), tokenizer)


def encode_fim(prefix: str, suffix: str) -> str:
    """Return the fill-in-the-middle prompt: the model generates the text between `prefix` and `suffix`.

    The format is that of the DeepSeek-Coder family; V4 has the tokens, but no V4 document confirms the format.
    """
    return "".join(_fim(prefix, suffix))


def encode_fim_ids(prefix: str, suffix: str, *, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of `encode_fim`; neither text can become a control token. Raises TokenizerError as above."""
    return _to_ids(_fim(prefix, suffix), tokenizer)


def _fim(prefix: str, suffix: str) -> list[str]:
    return [BOS, FIM_BEGIN, str(prefix), FIM_HOLE, str(suffix), FIM_END]


def _to_ids(pieces: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """Return control tokens by id, and each run of plain text between two of them tokenised as one string."""
    ids: list[int] = []
    for control, run in groupby(pieces, key=lambda piece: isinstance(piece, Control)):
        if control:
            ids += map(tokenizer.control_id, run)
        else:
            ids += tokenizer.encode_text("".join(run))
    return ids


# Turns: messages, with tool results and adjacent user messages merged into user turns.


@dataclass(frozen=True, slots=True)
class _Result:
    """One rendered tool result inside a user turn."""

    call_id: str | None
    text: str


@dataclass(slots=True)
class _Turn:
    """A message to render. A user turn has blocks."""

    role: str
    message: Message
    blocks: list[str | _Result] = field(default_factory=list)


def _merge_turns(messages: Sequence[Message], *, escape: bool) -> list[_Turn]:
    """Merge tool and consecutive user messages into user turns; sort the results of each turn in call order."""
    turns: list[_Turn] = []
    for message in messages:
        role = message.get("role")
        if role not in ("system", "developer", "user", "tool", "assistant", "latest_reminder"):
            raise EncodeError(
                f"unknown role {role!r}; expected system, developer, user, assistant, tool or latest_reminder"
            )
        if role not in ("user", "tool"):
            turns.append(_Turn(role, message))
            continue
        text = _text(message.get("content"), role)
        block: str | _Result = text
        if role == "tool":
            block = _Result(message.get("tool_call_id"), render_result(text, escape=escape))
        if turns and turns[-1].role == "user" and (role == "tool" or not turns[-1].message.get("task")):
            turns[-1].blocks.append(block)
        else:
            turns.append(_Turn("user", message if role == "user" else {}, [block]))
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            order = {call.get("id", ""): i for i, call in enumerate(turn.message["tool_calls"])}
        if order:
            results = sorted(
                (block for block in turn.blocks if isinstance(block, _Result)),
                key=lambda result: order.get(result.call_id or "", 0),
            )
            in_order = iter(results)
            turn.blocks = [next(in_order) if isinstance(block, _Result) else block for block in turn.blocks]
    return turns


def _text(content: Any, role: str) -> str:
    """Return the text of a message's content: a string, None, or a list of parts, of which only text is supported.

    The result is always a plain `str`: a `Control` given as content is ordinary text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return str(content)
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return "\n\n".join(
            str(part.get("text", "")) if part.get("type") == "text" else f"[Unsupported {part.get('type')}]"
            for part in content
        )
    raise EncodeError(f"content of a {role} message must be text or a list of parts; got {type(content).__name__}")


def _with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Message]:
    """Return the messages with `tools` on the first system message."""
    if not tools:
        return list(messages)
    first = next((i for i, message in enumerate(messages) if message.get("role") == "system"), None)
    if first is None:
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if messages[first].get("tools"):
        raise EncodeError("tools given both as an argument and on the first system message; give them once")
    return [*messages[:first], {**messages[first], "tools": tools}, *messages[first + 1 :]]


# Rendering: every function returns pieces, which are Control tokens and plain text.


def _render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    effort: str,
    dialect: str,
    drop_thinking: bool,
    think: bool | None = None,
    escape: bool = False,
) -> list[str]:
    efforts = EFFORT_TEXT.get(dialect)
    if efforts is None:
        raise EncodeError(f"unknown dialect {dialect!r}; expected one of {', '.join(EFFORT_TEXT)}")
    if effort not in efforts:
        raise EncodeError(f"effort {effort!r} does not exist in dialect {dialect!r}; it has {', '.join(efforts)}")
    thinking = effort != "none"
    turns = _merge_turns(_with_tools(messages, tools), escape=escape)
    keep_all = not drop_thinking or any(turn.message.get("tools") for turn in turns)
    if thinking and not keep_all:
        last = _last_user(turns)
        turns = [turn for i, turn in enumerate(turns) if turn.role != "developer" or i >= last]
    rendered = _render_turns(
        turns, thinking=thinking, keep_all=keep_all, think_next=thinking if think is None else think
    )
    return [BOS, efforts[effort], *rendered] if turns else [BOS]


def _last_user(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _render_turns(turns: Sequence[_Turn], *, thinking: bool, keep_all: bool, think_next: bool) -> list[str]:
    pieces: list[str] = []
    last_user = _last_user(turns)
    for i, turn in enumerate(turns):
        kept = thinking and (keep_all or i > last_user)
        after_task = i > 0 and turns[i - 1].message.get("task")
        if turn.role == "assistant":
            pieces += _assistant(turn.message, reasoning=kept and not after_task)
        else:
            pieces += _asking(turn)
        following = turns[i + 1].role if i + 1 < len(turns) else None
        if following in (None, "assistant", "latest_reminder"):
            keeps = keep_all or i >= last_user or turn.message.get("task")
            thinks = think_next if following is None else thinking and keeps
            pieces += _transition(turn, THINK if thinks else THINK_END)
    return pieces


def _asking(turn: _Turn) -> list[str]:
    """Return a system, developer, user or reminder turn, without its transition."""
    if turn.role == "user":
        blocks = [block.text if isinstance(block, _Result) else block for block in turn.blocks]
        return [USER, "\n\n".join(blocks)]
    message = turn.message
    text = _text(message.get("content"), turn.role)
    if turn.role == "latest_reminder":
        return [LATEST_REMINDER, text]
    if turn.role == "developer" and not text:
        raise EncodeError("a developer message needs content; got none")
    pieces = [USER, text] if turn.role == "developer" else [text]
    if message.get("tools"):
        pieces += ["\n\n", *_tools_block(message["tools"])]
    if message.get("response_format"):
        pieces += ["\n\n", _RESPONSE_FORMAT, json_text(message["response_format"])]
    return pieces


def _tools_block(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    for tool in tools:
        if not isinstance(tool.get("function"), Mapping):
            raise EncodeError(f'a tool is {{"type": "function", "function": {{...}}}}; got {dict(tool)!r:.200}')
    schemas = "\n".join(json_text(tool["function"]) for tool in tools)
    return [*split_template(_TOOLS_HEAD), schemas, _TOOLS_TAIL]


def _transition(turn: _Turn, marker: Control) -> list[str]:
    """Return the tokens after a turn that the assistant answers: role marker or quick instruction."""
    task = turn.message.get("task")
    if task:
        if task not in TASKS:
            raise EncodeError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
        return [ASSISTANT, marker, TASKS[task]] if task == "action" else [TASKS[task]]
    return [ASSISTANT, marker] if turn.role in ("user", "developer") else []


def _assistant(message: Message, *, reasoning: bool) -> list[str]:
    pieces: list[str] = []
    if reasoning:
        pieces += [_text(message.get("reasoning_content"), "assistant"), THINK_END]
    pieces.append(_text(message.get("content"), "assistant"))
    calls = message.get("tool_calls") or []
    if calls:
        pieces += render_block(map(_call, calls))
    if not message.get("wo_eos"):
        pieces.append(EOS)
    return pieces


def _call(call: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of a call."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not {"name", "arguments"} <= function.keys():
        raise EncodeError(f'a tool call is {{"function": {{"name": ..., "arguments": ...}}}}; got {dict(call)!r:.200}')
    return function["name"], _arguments(function)


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call as an object. Text that is not JSON becomes one parameter named `arguments`."""
    text = function["arguments"]
    if not isinstance(text, str):
        raise EncodeError(
            f"arguments of {function['name']!r} must be JSON text of an object; got {type(text).__name__}. "
            "Pass json.dumps(arguments)."
        )
    try:
        arguments = json.loads(text)
    except ValueError:
        return {"arguments": text}
    if not isinstance(arguments, dict):
        raise EncodeError(f"arguments of {function['name']!r} must be a JSON object; got {text[:200]}")
    return arguments
