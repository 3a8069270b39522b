"""The text of calls and results, shared by encoder, parsers and grammar."""

from __future__ import annotations

import json
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from agentkit_engine.chat import CallReady, StreamParser, parse
from agentkit_engine.chat.format import NAME, render_block

EOS = "<｜end▁of▁sentence｜>"
NAMES = st.from_regex(NAME, fullmatch=True).filter(lambda name: "｜" not in name)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="｜"))
VALUES = TEXTS | st.integers() | st.none() | st.booleans() | st.lists(TEXTS) | st.dictionaries(TEXTS, st.integers())


def test_the_format_needs_no_torch() -> None:
    code = "import sys, agentkit_engine.chat.format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3))
def test_both_parsers_read_every_call_that_the_format_can_express(calls: list[tuple[str, dict[str, object]]]) -> None:
    text = "".join(render_block(calls)) + EOS
    strict = [call["function"] for call in parse(text, effort="none", strict=True)["tool_calls"]]
    assert [(call["name"], json.loads(call["arguments"])) for call in strict] == calls
    parser = StreamParser(False)
    ready = [event for event in parser.feed(text) + parser.finish() if isinstance(event, CallReady)]
    assert [(call.name, json.loads(call.arguments_json)) for call in ready] == calls
