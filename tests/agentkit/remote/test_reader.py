"""Whatever a server sends is read as a turn, or refused as a broken stream: nothing else may come out."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentkit.model import CallReady
from agentkit.models.remote.names import ToolNames
from agentkit.models.remote.openai_chat import _Reader
from agentkit.models.remote.provider import Delta, StreamFinished, TextChunk, TransientError
from agentkit.models.remote.turn import RemoteTurn

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**40),
    st.floats(allow_nan=False),
    st.sampled_from(["", "a", "<think>", "</"]),
)
KEYS = st.sampled_from(
    """choices delta message content tool_calls index id function name arguments finish_reason usage prompt_tokens
    completion_tokens prompt_tokens_details cached_tokens completion_tokens_details reasoning_tokens token_ids logprobs
    logprob prompt_token_ids reasoning reasoning_content reasoning_details refusal type text thinking""".split()
)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
OBJECTS = st.dictionaries(KEYS, ANYTHING, max_size=5)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "index": st.none() | st.integers(0, 2),
        "id": st.sampled_from([None, "", "a", "b", 3]),
        "function": st.dictionaries(st.sampled_from(["name", "arguments"]), LEAVES | st.just("look"), max_size=2),
    },
)
DELTAS = st.fixed_dictionaries(
    {}, optional={"content": ANYTHING, "reasoning": LEAVES, "tool_calls": st.lists(CALLS, max_size=3) | ANYTHING}
)
CHOICES = st.fixed_dictionaries({"delta": DELTAS}, optional={"finish_reason": LEAVES, "token_ids": ANYTHING})
CHUNKS = OBJECTS | st.fixed_dictionaries({"choices": st.lists(CHOICES, max_size=1)}, optional={"usage": OBJECTS})


@given(st.lists(CHUNKS, max_size=6))
def test_a_stream_of_anything(chunks: list[dict[str, Any]]) -> None:
    reader = _Reader(None, None)
    deltas: list[Delta] = []
    try:
        for chunk in chunks:
            deltas += reader.read(chunk)
        deltas += reader.end("openai-chat")
    except TransientError:
        return
    assert isinstance(deltas[-1], StreamFinished)
    turn = RemoteTurn(0, think=False, tools=[], names=ToolNames([]), taken_ids=set())
    for delta in deltas:
        list(turn.add(delta))
    message, events = turn.end()
    ids = [event.call.id for event in events if isinstance(event, CallReady)]
    assert len(set(ids)) == len(ids) == len(message.calls)
    assert message.content == "".join(delta.text for delta in deltas if isinstance(delta, TextChunk))
    counts = deltas[-1].usage
    assert 0 <= counts.reasoning_tokens <= counts.output_tokens
