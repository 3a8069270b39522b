"""Damaged event streams end in a turn or in an error of the API, never in an error of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import anthropic, responses

from agentkit.errors import ApiError, ContextFullError
from agentkit.models.remote import anthropic as anthropic_client
from agentkit.models.remote import openai_responses as responses_client
from agentkit.models.remote.connection import Connection
from agentkit.models.remote.provider import Delta, ReasoningChunk, StreamFinished, TextChunk, TransientError
from agentkit.models.remote.schemas import anthropic_tool, openai_tool

Json = dict[str, Any]

SCHEMA: Json = {"type": "object", "properties": {"$odd": {"type": "string"}, "path": {"type": "string"}}}
RESPONSE = responses.turn(
    responses.reasoning("thought"),
    responses.message("text"),
    responses.call("call_a", "odd", '{"$odd": "x", "path": null}'),
    responses.call("call_b", "bash", "{}"),
)
MESSAGE = anthropic.turn(
    anthropic.thinking("thought"),
    anthropic.text("text"),
    anthropic.tool_use("toolu_a", "odd", '{"_odd": "x"}'),
    anthropic.tool_use("toolu_b", "bash", "{}"),
)
ODD: list[Any] = [None, True, 7, -1, "x", [], [1], {}, {"type": "text"}]
LEFT_OUT = object()


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def changed(events: list[Json], path: tuple[Any, ...], value: object) -> list[Json]:
    """Return the events with another value at a path, or without it."""
    copy: Any = json.loads(json.dumps(events))
    *outer, key = path
    inside = copy
    for step in outer:
        inside = inside[step]
    if value is LEFT_OUT:
        del inside[key]
    else:
        inside[key] = value
    return list(copy)


def read(reader: Any, events: list[Json]) -> None:
    """Read a stream; it ends in a complete turn or in an error of the API."""
    try:
        deltas: list[Delta] = [delta for event in events for delta in reader.read(event)]
        deltas.extend(reader.rest({"api": "a"}))
    except (TransientError, ApiError, ContextFullError):
        return
    last = deltas.pop()
    assert isinstance(last, StreamFinished) and json.dumps(last.provider_data)
    assert all(isinstance(delta.text, str) for delta in deltas if isinstance(delta, TextChunk | ReasoningChunk))


@pytest.fixture(scope="module")
def connection() -> Connection:
    return Connection(
        "openai", model="m", base_url="http://a/v1", api_key="sk-secret", variable="OPENAI_API_KEY", timeout_s=1
    )


def response_reader(connection: Connection, has_output: bool) -> Any:
    output = openai_tool(SCHEMA) if has_output else None
    return responses_client._Reader(connection, {"odd": openai_tool(SCHEMA)}, output)


def message_reader(connection: Connection, has_output: bool) -> Any:
    output = anthropic_tool(SCHEMA) if has_output else None
    return anthropic_client._Reader(connection, {"odd": anthropic_tool(SCHEMA)}, output, holds_text=has_output)


STREAMS = pytest.mark.parametrize(
    ("reader", "events"), [(response_reader, RESPONSE), (message_reader, MESSAGE)], ids=["responses", "anthropic"]
)


@STREAMS
def test_each_value_of_a_stream_may_be_missing_or_another(
    connection: Connection, reader: Any, events: list[Json]
) -> None:
    for path in paths(events):
        for value in (LEFT_OUT, *ODD):
            if len(path) > 1 or value is LEFT_OUT:  # an event that is no object ends the stream before
                read(reader(connection, len(path) % 2 == 0), changed(events, path, value))


@STREAMS
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_the_events_of_a_stream_may_come_in_any_order(
    connection: Connection, reader: Any, events: list[Json], data: st.DataObject
) -> None:
    order = data.draw(st.lists(st.sampled_from(events), max_size=len(events)) | st.permutations(events))
    read(reader(connection, data.draw(st.booleans())), json.loads(json.dumps(order)))
