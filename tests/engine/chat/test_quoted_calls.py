"""DSML that is a call and DSML that is only quoted or rehearsed, and common mistakes in the format of calls."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit_engine.chat import (
    CallMalformed,
    CallOpened,
    CallReady,
    CallsWithdrawn,
    ParseEvent,
    ReasoningDelta,
    StreamParser,
    TextDelta,
    Tokenizer,
)

D, E = "｜DSML｜", "<｜end▁of▁sentence｜>"
PAY = f'<{D}invoke name="pay">\n<{D}parameter name="amount" string="false">500</{D}parameter>\n</{D}invoke>\n'
LOOK = f'<{D}invoke name="look">\n\n</{D}invoke>\n'


def block(*calls: str) -> str:
    return f"\n\n<{D}tool_calls>\n{''.join(calls)}</{D}tool_calls>"


def tool(name: str, required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("pay", ["amount"], amount={"type": "integer"}), tool("look")]


class Read:
    """A completion, parsed whole and character by character with the same events."""

    def __init__(self, text: str, think: bool = True, **options: Any) -> None:
        options.setdefault("tools", TOOLS)
        whole, single = StreamParser(think, **options), StreamParser(think, **options)
        self.events = [*whole.feed(text), *whole.finish()]
        assert joined(self.events) == joined([*(e for char in text for e in single.feed(char)), *single.finish()])
        assert whole.message == single.message
        self.reasoning = whole.message.get("reasoning_content", "")
        self.content = whole.message["content"]
        calls = [call["function"] for call in whole.message.get("tool_calls", [])]
        self.calls = [(call["name"], json.loads(call["arguments"])) for call in calls]
        self.errors = [event.error for event in self.events if isinstance(event, CallMalformed)]


def joined(events: Iterable[ParseEvent]) -> list[ParseEvent]:
    out: list[ParseEvent] = []
    for event in events:
        if out and isinstance(event, TextDelta | ReasoningDelta) and type(event) is type(out[-1]):
            out[-1] = type(event)(out[-1].text + event.text)
        else:
            out.append(event)
    return out


PAID: list[tuple[str, dict[str, Any]]] = [("pay", {"amount": 500})]
NOT = " but must not."

# Thoughts


@pytest.mark.parametrize(
    "rehearsal",
    [
        block(PAY),
        block(PAY, LOOK),
        block(PAY) + block(LOOK),
        PAY,
        f"\n\n<{D}function_calls>\n{PAY}</{D}function_calls>",
        f"\n\n<{D}tool_calls>\n{PAY}",
        f"\n\n<{D}tool_calls>\n<{D}invoke name='pay'>\n",
        f'\n\n<{D}tool_calls>\n<{D}invoke name="pay">\n<{D}parameter name="amount" string="false">500',
        f'\n\n<{D}tool_calls>\n<{D}invoke name="pay">\nnonsense</{D}invoke>\n</{D}tool_calls>',
        f"\n\n<{D}tool_calls>\n</{D}tool_calls>",
    ],
)
def test_a_rehearsal_in_a_thought_stays_reasoning(rehearsal: str) -> None:
    """No event mentions it before or after: no call, no error, no start."""
    read = Read(f"I could write{rehearsal}{NOT}</think>No.{E}")
    assert (read.reasoning, read.content) == (f"I could write{rehearsal}{NOT}", "No.")
    assert joined(read.events)[:-1] == [ReasoningDelta(read.reasoning), TextDelta("No.")]
    real = Read(f"I could write{rehearsal}{NOT}</think>{block(LOOK)}{E}")
    assert (real.reasoning, real.content, real.calls, real.errors) == (read.reasoning, "", [("look", {})], [])


@pytest.mark.parametrize("end", [E, f"\n{E}", f"</think>{E}", f"\n</think>\n\n{E}"])
def test_a_block_that_ends_the_turn_inside_the_thought_counts(end: str) -> None:
    read = Read(f"So I pay.{block(PAY)}{end}")
    assert (read.reasoning, read.content, read.calls, read.errors) == ("So I pay.", "", PAID, [])
    cut = Read(f"So I pay.{block(PAY)}")
    assert cut.calls == PAID


def test_a_block_in_a_thought_is_no_call_if_the_model_did_not_end_the_turn() -> None:
    parser = StreamParser(True, tools=TOOLS)
    events = [*parser.feed(f"So I pay.{block(PAY)}"), *parser.finish(stopped=True)]
    assert joined(events)[:-1] == [ReasoningDelta(f"So I pay.{block(PAY)}")]


@pytest.mark.parametrize("between", ["</think>", "</think>\n\n", "</think>Now:"])
def test_a_rehearsed_call_is_made_once(between: str) -> None:
    read = Read(f"I shall write{block(PAY)}{between}{block(PAY)}{E}")
    assert (read.calls, read.errors) == (PAID, [])
    assert read.reasoning == f"I shall write{block(PAY)}"
    assert sum(isinstance(event, CallOpened) for event in read.events) == 1


# Text


@pytest.mark.parametrize("before", ["A call looks like this:", "x", " x\n"])
@pytest.mark.parametrize("after", [" You see?", "\n\nYou see?", f"{D}.", f"<{D}not a tag", "</think>y"])
@pytest.mark.parametrize("quote", [block(PAY), PAY, block(PAY, LOOK), block(PAY) + block(LOOK)])
def test_a_quoted_block_stays_text(before: str, after: str, quote: str) -> None:
    read = Read(f"</think>{before}{quote}{after}{E}")
    assert (read.calls, read.errors) == ([], [])
    assert read.content == f"{before}{quote}{after}".replace("</think>", "")
    assert not any(isinstance(event, CallReady | CallOpened | CallsWithdrawn) for event in read.events)


def test_a_block_counts_after_a_quotation() -> None:
    read = Read(f"</think>Like this:{block(PAY)}\nNow I look.{block(LOOK)}{E}")
    assert read.content == f"Like this:{block(PAY)}\nNow I look."
    assert read.calls == [("look", {})]
    assert [event.id for event in read.events if isinstance(event, CallReady)] == ["call_0_0"]


def test_calls_after_text_are_ready_when_the_turn_ends() -> None:
    parser = StreamParser(False, tools=TOOLS)
    assert joined(parser.feed(f"I pay.{block(PAY)}\n")) == [TextDelta("I pay.")]
    assert [type(event) for event in parser.feed(E)][:2] == [CallOpened, CallReady]


@pytest.mark.parametrize("start", ["</think>", "</think>\n", "r</think> "])
def test_calls_that_open_the_answer_are_ready_at_once_and_can_be_withdrawn(start: str) -> None:
    parser = StreamParser(True, tools=TOOLS)
    events = joined(parser.feed(f"{start}<{D}tool_calls>\n{LOOK}{PAY}"))
    assert [event.index for event in events if isinstance(event, CallReady)] == [0, 1]
    events = joined(parser.feed(f"</{D}tool_calls>, they say.{block(LOOK)}{E}"))
    assert events[0] == CallsWithdrawn(0)
    assert isinstance(events[1], TextDelta) and events[1].text.endswith(f"</{D}tool_calls>, they say.")
    assert events[2:4] == [CallOpened(2, "look"), CallReady(2, "call_0_2", "look", "{}")]
    assert [call["id"] for call in parser.message["tool_calls"]] == ["call_0_2"]


def test_with_a_grammar_calls_after_text_are_ready_at_once() -> None:
    parser = StreamParser(False, tools=TOOLS, ends_after_block=True)
    assert [type(event) for event in parser.feed(f"I pay.{block(PAY)}")] == [TextDelta, CallOpened, CallReady]


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("text", [block(PAY), PAY, f"a {D} b</{D}invoke>", f"<{D}function_calls>", block(PAY) + "x"])
def test_without_tools_there_are_no_calls(think: bool, text: str) -> None:
    for completion in (text, f"a{text}", f"{text}b"):
        read = Read(completion + E, think, calls=False, tools=())
        assert (read.reasoning if think else read.content) == completion
        assert (read.calls, read.errors) == ([], [])


# Wrappers


@pytest.mark.parametrize(
    "name",
    ["function_calls", "toolcalls", "tool_call", "tools", "functions", "calls", "invokes", "tool-calls", "ToolCalls"],
)
@pytest.mark.parametrize("close", ["same", "tool_calls", None])
def test_a_misspelt_wrapper_changes_nothing(name: str, close: str | None) -> None:
    end = "" if close is None else f"</{D}{name if close == 'same' else close}>"
    for text, content in (("", ""), ("I pay.\n\n", "I pay.")):
        read = Read(f"</think>{text}<{D}{name}>\n{PAY}{end}{E}")
        assert (read.content, read.calls, read.errors) == (content, PAID, [])
    read = Read(f"</think>{block(f'<{D}{name}>' + PAY + f'</{D}{name}>')}{E}")  # inside the correct one
    assert (read.content, read.calls, read.errors) == ("", PAID, [])


def test_a_wrapper_with_a_misspelt_end() -> None:
    for end in (f"</{D}function_calls>", f"</{D}tool_call>", f"</{D}tool_calls", f"</{D}"):
        read = Read(f"</think><{D}tool_calls>\n{PAY}{end}{E}")
        assert (read.content, read.calls, read.errors) == ("", PAID, [])


@pytest.mark.parametrize(
    "call",
    [
        PAY.replace('"pay"', "'pay'"),
        PAY.replace('invoke name="pay"', 'invoke  name = "pay" '),
        PAY.replace('invoke name="pay"', "invoke name=pay"),
        PAY.replace('invoke name="pay"', 'invoke id="1" name="pay"'),
        PAY.replace('name="amount" string="false"', 'string="false" name="amount"'),
        PAY.replace('string="false"', "string='False'"),
        PAY.replace('string="false"', "string=false"),
        PAY.replace('string="false"', 'type="integer"'),
        PAY.replace(' string="false"', ""),
        PAY.replace("parameter>", "parameter >"),
        PAY.replace("invoke>", "invoke >"),
        PAY.replace(f"<{D}invoke", f"<{D}{D}invoke"),
        PAY.replace(f"<{D}invoke", f"<{D} invoke"),
        PAY.replace("parameter", "param"),
        PAY.replace("invoke", "tool_call"),
        PAY.replace("\n", ""),
        PAY.replace("\n", "\n\n  "),
    ],
)
def test_tags_may_deviate_from_the_format(call: str) -> None:
    for text in (block(call), block(call).strip(), call):
        read = Read(f"</think>{text}{E}")
        assert (read.content, read.calls, read.errors) == ("", PAID, [])


def test_an_empty_invoke_may_close_itself() -> None:
    read = Read(f"</think>{block(f'<{D}invoke name=look/>', PAY)}{E}")
    assert read.calls == [("look", {}), *PAID]


def test_a_ready_call_is_not_also_reported_as_malformed() -> None:
    """Otherwise the model would be told to repeat a payment that was made."""
    for text in (f"<{D}function_calls>\n{PAY}</{D}function_calls>", f"<{D}toolcalls>{PAY}</{D}toolcalls>\n"):
        outcomes = [e for e in Read(f"</think>{text}{E}").events if isinstance(e, CallReady | CallMalformed)]
        assert [type(outcome) for outcome in outcomes] == [CallReady]


# Wrapped arguments

CITY = tool("get", ["city"], city={"type": "string"}, days={"type": "integer"})


def arguments(parameter: str, *tools: dict[str, Any]) -> Any:
    read = Read(f"</think>{block(f'<{D}invoke name={chr(34)}get{chr(34)}>{parameter}</{D}invoke>')}{E}", tools=tools)
    return read.errors[0] if read.errors else read.calls[0][1]


def parameter(name: str, value: str, string: str = "false") -> str:
    return f'\n<{D}parameter name="{name}" string="{string}">{value}</{D}parameter>\n'


@pytest.mark.parametrize(
    "written",
    [
        parameter("arguments", '{"city": "Paris", "days": 2}'),
        parameter("arguments", '{"city": "Paris", "days": 2}', "true"),
        parameter("input", '{"city": "Paris", "days": 2}'),
        parameter("parameters", json.dumps('{"city": "Paris", "days": 2}')),
        '\n{"city": "Paris", "days": 2}\n',
        '{"name": "get", "arguments": {"city": "Paris", "days": 2}}',
        json.dumps({"arguments": '{"city": "Paris", "days": 2}'}),
    ],
)
def test_arguments_that_fit_only_when_unwrapped_are_unwrapped(written: str) -> None:
    assert arguments(written, CITY) == {"city": "Paris", "days": 2}


def test_a_single_value_becomes_the_only_required_argument() -> None:
    assert arguments(parameter("arguments", "Paris", "true"), CITY) == {"city": "Paris"}
    assert arguments(parameter("input", "3"), tool("get", n={"type": "integer"})) == {"n": 3}


@pytest.mark.parametrize(
    ("written", "given", "expected"),
    [
        (parameter("arguments", '{"town": "Paris"}'), CITY, {"arguments": {"town": "Paris"}}),
        (parameter("arguments", '{"city": 3}'), CITY, {"arguments": {"city": 3}}),
        (parameter("arguments", '{"a": 1}'), tool("get", ["arguments"], arguments={}), {"arguments": {"a": 1}}),
        (parameter("city", '{"city": "Paris"}', "true"), CITY, {"city": '{"city": "Paris"}'}),
        ('\n{"town": "Paris"}\n', CITY, 'text between parameters: \'{"town": "Paris"}\''),
        ("\n[1]\n", CITY, "text between parameters: '[1]'"),
        ('\n{"city": "Paris"} or so\n', CITY, 'text between parameters: \'{"city": "Paris"} or so\''),
    ],
)
def test_arguments_that_do_not_fit_unwrapped_stay_wrapped(written: str, given: Any, expected: Any) -> None:
    assert arguments(written, given) == expected


# Truncated thoughts: `</think>` is forced at any point in a block that the model continues to write


@pytest.mark.parametrize("whole", [block(PAY), block(LOOK, PAY), PAY])
def test_a_thought_cut_inside_a_block_leaks_no_markup(v4: Tokenizer, whole: str) -> None:
    ids = v4.encode(f"Let me pay.{whole}")
    start = ids.index(v4.control_id(D))
    for cut in range(start, len(ids) + 1):
        parser = StreamParser(True, tokenizer=v4, tools=TOOLS)
        for part in (ids[:cut], v4.encode("</think>"), ids[cut:], v4.encode(E)):
            parser.feed(part)
        message = parser.message
        calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
        done = v4.decode(ids[:cut]).count("</｜DSML｜invoke>")
        if not done or cut == len(ids):
            assert (message["reasoning_content"], message["content"]) == ("Let me pay.", ""), v4.decode(ids[:cut])
            assert calls == (["look", "pay"] if LOOK in whole else ["pay"])
        else:  # a call that was complete in the thought counts only if the rest does
            assert calls in (["look", "pay"], ["pay"], [])
            assert message["content"].strip() in ("", "<") or D in message["reasoning_content"]


@pytest.mark.parametrize("begun", ["<", "\n\n<", f"<{D}", f"\n\n<{D}tool", f"<{D}tool_calls", f'<{D}invoke name="p'])
def test_an_unfinished_tag_in_a_thought_stays_reasoning(begun: str) -> None:
    read = Read(f"So {begun}</think>No.{E}")
    assert (read.content, read.calls, read.errors) == ("No.", [], [])
    assert read.reasoning.replace(D, "") == f"So {begun}".replace(D, "")
    read = Read(f"So {begun}</think>{block(PAY)}{E}")
    assert (read.content, read.calls, read.errors) == ("", PAID, [])


# Complexity


def work(feed: Callable[[], None]) -> int:
    """Return the number of lines that the parser executes, which unlike time does not depend on the machine's load."""
    count = 0

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal count
        if "/chat/v4_" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        feed()
    finally:
        sys.settrace(before)
    return count


HOSTILE = {
    "an unclosed name": f'<{D}invoke name="' + "a" * 4000,
    "an unclosed name in a block": f'<{D}tool_calls>\n<{D}invoke name="' + "a" * 4000,
    "an unclosed tag": f"<{D}invoke " + " " * 4000,
    "quotes": f"<{D}invoke " + "\"'" * 2000,
    "an unclosed value": f'<{D}invoke name="f"><{D}parameter name="x">' + "a" * 4000,
    "markers in a value": f'<{D}invoke name="f"><{D}parameter name="x">' + f"</{D}" * 700,
    "markers": D * 700,
    "leads": f"<{D}" * 600,
    "newlines": "\n" * 4000,
    "newlines after a block": block(LOOK) + "\n" * 4000,
    "text in an invoke": f'<{D}invoke name="f">' + "a" * 4000,
    "quotations": (block(LOOK) + "x") * 40,
    "thoughts": "</think>" * 600,
    "calls": block(*[LOOK] * 100),
    "malformed calls": block(*[f"<{D}invoke>a"] * 150),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("think", [True, False])
def test_parsing_takes_linear_work(text: str, think: bool) -> None:
    def one_by_one(text: str) -> int:
        parser = StreamParser(think, tools=TOOLS)

        def feed() -> None:
            for character in text:
                parser.feed(character)
            parser.finish()

        return work(feed)

    half, whole = one_by_one(text[: len(text) // 2]), one_by_one(text)
    assert whole < 2.6 * half + 500


def test_long_values_and_names_are_parsed_quickly(tiny: Tokenizer) -> None:
    """80,000 characters in an unclosed name once took 90 s; the limit is generous for a busy machine."""
    import time

    start = time.perf_counter()
    for head in (f'<{D}invoke name="', f'<{D}tool_calls><{D}invoke name="f"><{D}parameter name="x" string="true">'):
        ids = tiny.encode(head) + tiny.encode_text("a") * 80_000
        parser = StreamParser(False, tokenizer=tiny, tools=TOOLS)
        for token_id in ids:
            parser.feed((token_id,))
        parser.finish()
    assert time.perf_counter() - start < 20


# Random input

pieces = st.lists(
    st.sampled_from(
        [
            *("a", "\n", "\n\n", " ", "<", "</", "</think>", "<think>", D, PAY, LOOK, block(PAY), block(LOOK, PAY)),
            *(f"<{D}tool_calls>", f"</{D}tool_calls>", f"<{D}function_calls>", f"</{D}invoke>"),
            *(f'<{D}invoke name="pay">', f'<{D}parameter name="amount" string="false">', f"</{D}parameter>", "500"),
            *("tool_calls>", 'invoke name="'),
        ]
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(pieces=pieces, think=st.booleans(), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_any_text_split_anywhere(pieces: list[str], think: bool, cuts: list[int]) -> None:
    text = "".join(pieces) + E
    read = Read(text, think)
    bounds = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    parser = StreamParser(think, tools=TOOLS)
    events = [event for i, j in pairwise(bounds) for event in parser.feed(text[i:j])]
    assert joined([*events, *parser.finish()]) == joined(read.events)
    if read.calls and not read.errors:  # then only white space follows the last block
        end = max(text.rindex("invoke"), text.rfind("tool_calls>"), text.rfind("function_calls>"))
        rest = text[end:].partition(">")[2]
        rest = re.sub(rf"</?think>|</(?:{D})*\s*[a-z_]*>?|{D}", "", rest.removesuffix(E))  # surplus closing tags
        assert not rest.strip("<\n ")
    in_answer = think and "</think>" not in text
    assert not in_answer or read.content == ""


@settings(deadline=None, max_examples=200)
@given(
    thought=st.lists(st.sampled_from(["x", block(PAY), PAY, f"<{D}tool_calls>\n", f'<{D}invoke name="pay">', "\n"])),
    answer=st.sampled_from(["No.", "No.\n", "No <b>."]),
)
def test_a_thought_makes_no_call_if_the_answer_is_text(thought: list[str], answer: str) -> None:
    read = Read(f"{''.join(thought)}</think>{answer}{E}")
    assert (read.calls, read.errors, read.content) == ([], [], answer)
    assert not any(isinstance(event, CallReady | CallOpened | CallMalformed) for event in read.events)


@pytest.mark.parametrize("after", ["a", "\n\nNo.", "<", " but not now"])
def test_a_block_that_ends_its_thought_and_is_followed_by_text_is_quoted(after: str) -> None:
    """The tag of the block opens in the thought, the call comes after it, and text follows the call."""
    read = Read(f"<{D}tool_calls></think>{PAY}{after}{E}", True)
    assert (read.calls == []) == bool(after.strip("<"))
