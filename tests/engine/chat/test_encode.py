"""The reference text: published examples, every rule, every error, and DeepSeek's own encoder by hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from agentkit_engine.chat import EFFORT_TEXT, ChatError, EncodeError, encode, encode_fim

VECTORS = json.loads((Path(__file__).parent / "reference_vectors.json").read_text(encoding="utf-8"))
"""Random conversations, with the sha256 of the text that DeepSeek's encoder of April 2026 produces for them."""

F = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}
B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(id: str, arguments: Any, name: str = "f") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(id: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["sha256"][:8])
def test_equals_the_reference_encoder(vector: dict[str, Any]) -> None:
    text = encode(vector["messages"], effort=vector["effort"], drop_thinking=vector["drop_thinking"])
    assert hashlib.sha256(text.encode()).hexdigest() == vector["sha256"]


def test_without_thinking() -> None:
    text = encode([{"role": "system", "content": "You are a helpful assistant."}, user("Hi")])
    assert text == "<｜begin▁of▁sentence｜>You are a helpful assistant.<｜User｜>Hi<｜Assistant｜></think>"


def test_thinking_drops_or_keeps_history() -> None:
    messages = [user("a"), assistant("b", reasoning_content="rb"), user("c")]
    assert encode(messages, effort="high") == f"{B}{U}a{A}</think>b{E}{U}c{A}<think>"
    assert encode(messages, effort="high", drop_thinking=False) == f"{B}{U}a{A}<think>rb</think>b{E}{U}c{A}<think>"
    assert encode(messages, effort="none", drop_thinking=False) == f"{B}{U}a{A}</think>b{E}{U}c{A}</think>"


TOOL_TALK = [
    {"role": "system", "content": "S"},
    user("Q1"),
    assistant(
        "Let me look.",
        reasoning_content="R1",
        tool_calls=[call("a", '{"x": 1, "s": "a\\nb", "l": [1, "é"], "n": null}'), call("b", "{}")],
    ),
    result("b", "RB"),
    result("a", "RA"),
    user("also?"),
]
TOOL_TALK_TEXT = f"""\
{U}Q1{A}<think>R1</think>Let me look.

<｜DSML｜tool_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>
<｜DSML｜parameter name="s" string="true">a
b</｜DSML｜parameter>
<｜DSML｜parameter name="l" string="false">[1, "é"]</｜DSML｜parameter>
<｜DSML｜parameter name="n" string="false">null</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="f">

</｜DSML｜invoke>
</｜DSML｜tool_calls>{E}{U}<tool_result>RA</tool_result>

<tool_result>RB</tool_result>

also?{A}<think>"""


def test_tools_and_thinking() -> None:
    text = encode(TOOL_TALK, tools=[F], effort="high")
    head, separator, tail = text.partition("\nYou MUST strictly follow")
    assert head.startswith(f"{B}S\n\n## Tools\n\nYou have access")
    assert head.endswith(
        '### Available Tool Schemas\n\n{"name": "f", "description": "é", "parameters": {"type": "object"}}\n'
    )
    assert separator
    assert tail == " the above defined tool name and parameter schemas to invoke tool calls.\n" + TOOL_TALK_TEXT
    chat = encode(TOOL_TALK, tools=[F])
    assert chat.endswith(TOOL_TALK_TEXT.replace("<think>R1</think>", "</think>").replace("<think>", "</think>"))


def test_tools_add_a_missing_system_message() -> None:
    text = encode([user("q")], tools=[F], effort="high")
    assert text.startswith(f"{B}\n\n## Tools\n")
    assert text == encode([{"role": "system", "content": "", "tools": [F]}, user("q")], effort="high")
    late = encode([user("q"), {"role": "system", "content": "s"}, user("r")], tools=[F])
    assert late.startswith(f"{B}{U}qs\n\n## Tools\n")


@pytest.mark.parametrize("where", ["system", "developer"])
def test_tools_anywhere_keep_all_reasoning(where: str) -> None:
    messages = [
        user("a"),
        assistant("b", reasoning_content="rb"),
        {"role": where, "content": "c", "tools": [F]},
        user("d"),
    ]
    assert "<think>rb</think>b" in encode(messages, effort="high")


def test_developer_turns_before_the_last_user_turn_are_dropped_with_the_reasoning() -> None:
    messages = [{"role": "developer", "content": "d"}, assistant("b", reasoning_content="r"), user("c")]
    assert encode(messages, effort="high") == f"{B}b{E}{U}c{A}<think>"
    assert encode(messages, effort="high", drop_thinking=False) == f"{B}{U}d{A}<think>r</think>b{E}{U}c{A}<think>"


def test_a_tool_result_counts_as_a_user_turn_when_dropping() -> None:
    messages = [user("q"), assistant("", reasoning_content="r", tool_calls=[call("a", "{}")]), result("a", "x")]
    assert "r</think>" not in encode(messages, effort="high")


def test_missing_reasoning_is_empty() -> None:
    text = encode([user("q"), assistant("b"), user("c")], effort="high", drop_thinking=False)
    assert text == f"{B}{U}q{A}<think></think>b{E}{U}c{A}<think>"


def test_consecutive_user_messages_are_one_turn() -> None:
    assert encode([user("a"), user("b")]) == f"{B}{U}a\n\nb{A}</think>"


def test_results_are_sorted_by_call_and_text_stays_in_place() -> None:
    messages = [
        assistant("", tool_calls=[call("a", "{}"), call("b", "{}"), call("c", "{}")]),
        result("c", "C"),
        user("note"),
        result("b", "B"),
        result("?", "unknown sorts first"),
    ]
    assert encode(messages).endswith(
        "<tool_result>unknown sorts first</tool_result>\n\nnote\n\n<tool_result>B</tool_result>\n\n"
        f"<tool_result>C</tool_result>{A}</think>"
    )


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "p"}, {"type": "image_url"}, {"type": "text", "text": "q"}]
    assert (
        encode([result("a", parts)]) == f"{B}{U}<tool_result>p\n\n[Unsupported image_url]\n\nq</tool_result>{A}</think>"
    )
    assert encode([user("a"), assistant(None)]) == f"{B}{U}a{A}</think>{E}"


def test_reminder_comes_between_system_and_user() -> None:
    reminder = {"role": "latest_reminder", "content": "2026-02-21,星期六"}
    text = encode([{"role": "system", "content": "s"}, reminder, user("q")])
    assert text == f"{B}s<｜latest_reminder｜>2026-02-21,星期六{U}q{A}</think>"


def test_response_format() -> None:
    system = {"role": "system", "content": "s", "tools": [F], "response_format": {"type": "json_object"}}
    assert encode([system, user("q")]).endswith(
        "to invoke tool calls.\n\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        f'{{"type": "json_object"}}{U}q{A}</think>'
    )


def test_quick_instructions() -> None:
    for task in ("query", "authority", "domain", "read_url"):
        assert encode([user("a", task=task)]) == f"{B}{U}a<｜{task}｜>"
    assert encode([user("a", task="action")]) == f"{B}{U}a{A}</think><｜action｜>"
    assert encode([user("a", task="action")], effort="high") == f"{B}{U}a{A}<think><｜action｜>"
    answered = [user("a", task="query"), assistant("x", reasoning_content="r")]
    assert encode(answered, effort="high") == f"{B}{U}a<｜query｜>x{E}"
    assert encode([user("a"), assistant("b", task="title")]) == f"{B}{U}a{A}</think>b{E}<｜title｜>"


def test_prefix_completion() -> None:
    messages = [user("a"), assistant("Sure: ", reasoning_content="r", wo_eos=True)]
    assert encode(messages) == f"{B}{U}a{A}</think>Sure: "
    assert encode(messages, effort="high") == f"{B}{U}a{A}<think>r</think>Sure: "


def test_fill_in_the_middle() -> None:
    assert encode_fim("a", "b") == f"{B}<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"


def test_efforts_of_both_dialects() -> None:
    def effort_text(effort: Any, dialect: Any) -> str:
        text = encode([user("q")], effort=effort, dialect=dialect)
        end = f"{U}q{A}" + ("</think>" if effort == "none" else "<think>")
        return text.removeprefix(B).removesuffix(end)

    assert effort_text("none", "v4-preview") == effort_text("high", "v4-preview") == ""
    assert effort_text("none", "v4-0731") == effort_text("low", "v4-0731") == ""
    assert effort_text("max", "v4-preview") == effort_text("high", "v4-0731")
    assert effort_text("max", "v4-preview").startswith(
        "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou"
    )
    assert effort_text("max", "v4-preview").endswith("no assumption is left unchecked.\n\n")
    assert effort_text("max", "v4-0731").startswith("Reasoning Effort: Beyond maximum — exhaustive, relentless, and")
    assert effort_text("max", "v4-0731").endswith("no error remains undiscovered.\n\n")
    assert EFFORT_TEXT["v4-0731"].keys() == {"none", "low", "high", "max"}


def test_unparsable_arguments_become_one_parameter() -> None:
    text = encode([assistant("", tool_calls=[call("a", "{bad")])])
    assert '<｜DSML｜parameter name="arguments" string="true">{bad</｜DSML｜parameter>' in text


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        ([user("q")], {"effort": "low"}, "effort 'low' does not exist in dialect 'v4-preview'; it has none, high, max"),
        ([user("q")], {"effort": "ultra", "dialect": "v4-0731"}, "effort 'ultra' does not exist in dialect 'v4-0731'"),
        ([user("q")], {"dialect": "v3"}, "unknown dialect 'v3'"),
        ([{"role": "function", "content": "x"}], {}, "unknown role 'function'"),
        ([{"content": "x"}], {}, "unknown role None"),
        ([user("q", task="poem")], {}, "unknown task 'poem'"),
        ([{"role": "developer", "content": ""}], {}, "developer message needs content"),
        ([assistant("", tool_calls=[call("a", "[1]")])], {}, r"must be a JSON object; got \[1\]"),
        ([assistant("", tool_calls=[call("a", "3")])], {}, "must be a JSON object; got 3"),
        ([assistant("", tool_calls=[call("a", {"x": 1})])], {}, r"got dict\. Pass json\.dumps"),
        ([assistant("", tool_calls=[{"id": "a"}])], {}, "a tool call is"),
        ([user("q")], {"tools": [{"name": "f"}]}, "a tool is"),
        ([{"role": "system", "content": "", "tools": [F]}], {"tools": [F]}, "give them once"),
        ([{"role": "user", "content": 3}], {}, "content of a user message must be text"),
    ],
)
def test_errors(messages: list[dict[str, Any]], options: dict[str, Any], error: str) -> None:
    with pytest.raises(EncodeError, match=error):
        encode(messages, **options)


def test_errors_are_value_errors() -> None:
    assert issubclass(EncodeError, ChatError)
    assert issubclass(ChatError, ValueError)
