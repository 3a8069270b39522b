"""The caller's object for tools (`ToolContext.deps`), and tools that return text and images."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit import (
    Agent,
    AssistantTurn,
    ImagePart,
    ScriptedModel,
    TextPart,
    Tool,
    ToolContext,
    ToolMessage,
    ToolOutput,
    tool,
)
from agentkit_environments import Environment
from agentkit_tools.function import _output
from agentkit_tools.results import value_text

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]


@dataclass
class Stock:
    bolts: int


class Counts(Protocol):
    bolts: int


class Small(Stock):
    """A stock of another class."""


@tool
async def count(context: ToolContext[Stock], times: int = 1) -> int:
    """Count the bolts."""
    return context.deps.bolts * times


def take(number: int, context: ToolContext[Stock] | None) -> str:
    """Take bolts."""
    assert context is not None
    context.deps.bolts -= number
    return f"{context.deps.bolts} are left"


def any_deps(context: ToolContext[Any]) -> str:
    """Tell the deps."""
    return repr(context.deps)


def plain(context: ToolContext) -> str:
    """Tell the deps."""
    return repr(context.deps)


def shaped(context: ToolContext[Counts]) -> int:
    """Count the bolts of anything that has some."""
    return context.deps.bolts


def calls(*names_and_arguments: tuple[str, dict[str, Any]]) -> AssistantTurn:
    return AssistantTurn(calls=names_and_arguments)


async def results(agent: Agent, environment: Environment, **options: Any) -> list[str]:
    run = await agent.run("Q", environment=environment, **options)
    return [message.content for message in run.trajectory.messages if isinstance(message, ToolMessage)]


async def test_tools_receive_the_object_of_the_run(script: Script, environment: Environment) -> None:
    stock = Stock(7)
    agent = Agent(
        script(calls(("count", {"times": 2})), calls(("take", {"number": 3})), AssistantTurn(content="ok")),
        [count, take],
    )
    assert await results(agent, environment, deps=stock) == ["14", "4 are left"]
    assert stock.bolts == 4
    assert "context" not in str([each.spec for each in agent.tools.values()])


async def test_a_continued_run_keeps_the_object(script: Script, environment: Environment) -> None:
    turns = [calls(("count", {})), AssistantTurn(content="ok"), calls(("count", {})), AssistantTurn(content="ok")]
    result = await Agent(script(*turns), [count]).run("Q", environment=environment, deps=Stock(7))
    result = await result.continue_("Again")
    assert [each.content for each in result.trajectory.results] == ["7", "7"]


def test_synchronous_runs_and_streams_take_the_object(script: Script) -> None:
    agent = Agent(script(calls(("count", {})), AssistantTurn(content="ok")), [count])
    result = agent.run_sync("Q", deps=Stock(5))
    assert [each.content for each in result.trajectory.results] == ["5"]


async def test_streams_take_the_object(script: Script, environment: Environment) -> None:
    agent = Agent(script(calls(("count", {})), AssistantTurn(content="ok")), [count])
    events = [event async for event in agent.stream("Q", environment=environment, deps=Stock(5))]
    assert [event.result.content for event in events if event.type == "call_finished"] == ["5"]


@pytest.mark.parametrize("deps", [None, 7, Stock])
@pytest.mark.parametrize("fn", [count, take])
async def test_a_run_without_the_object_that_a_tool_needs_is_refused(script: Script, fn: Any, deps: object) -> None:
    agent = Agent(script(AssistantTurn()), [fn])
    with pytest.raises(TypeError, match=r"tool '(count|take)' needs deps of type Stock, got .*pass deps="):
        await agent.run("Q", deps=deps)  # before a sandbox is opened


async def test_an_object_of_a_subclass_will_do(script: Script, environment: Environment) -> None:
    agent = Agent(script(calls(("count", {})), AssistantTurn(content="ok")), [count])
    assert await results(agent, environment, deps=Small(3)) == ["3"]


@pytest.mark.parametrize("fn", [any_deps, plain, shaped])
async def test_a_type_that_cannot_be_checked_takes_any_object(
    script: Script, environment: Environment, fn: Callable[..., Any]
) -> None:
    agent = Agent(script(calls((fn.__name__, {})), AssistantTurn(content="ok")), [fn])
    assert await results(agent, environment, deps=Stock(3)) == ["3" if fn is shaped else "Stock(bolts=3)"]


IMAGE = ImagePart.of(b"\x89PNG", "image/png")


@pytest.mark.parametrize(
    ("value", "parts", "text"),
    [
        (IMAGE, (IMAGE,), "[image: image/png, 4 bytes]"),
        (TextPart("hello"), (TextPart("hello"),), "hello"),
        (["a", IMAGE], (TextPart("a"), IMAGE), "a\n[image: image/png, 4 bytes]"),
        ((IMAGE, TextPart("b")), (IMAGE, TextPart("b")), "[image: image/png, 4 bytes]\nb"),
        (
            [IMAGE, {"x": 1}, 3],
            (IMAGE, TextPart('{"x": 1}'), TextPart("3")),
            '[image: image/png, 4 bytes]\n{"x": 1}\n3',
        ),
        ({"picture": IMAGE}, (), '{"picture": "[image: image/png, 4 bytes]"}'),
        (["a", "b"], (), '["a", "b"]'),
    ],
)
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_tool_may_return_text_and_images(
    script: Script, environment: Environment, value: Any, parts: Any, text: str, is_async: bool
) -> None:
    async def look_async() -> Any:
        return value

    def look() -> Any:
        return value

    made: Tool = tool(name="look", description="Look.")(look_async if is_async else look)
    result = await Agent(script(calls(("look", {})), AssistantTurn(content="ok")), [made]).run(
        "Q", environment=environment
    )
    told = result.trajectory.messages[3]
    assert isinstance(told, ToolMessage)
    assert (told.content, told.parts, told.is_error) == (text, parts, False)


parts = st.builds(TextPart, st.text()) | st.builds(
    lambda data: ImagePart("image/png", base64.b64encode(data).decode()), st.binary(max_size=20)
)


@given(st.lists(parts | st.text() | st.integers() | st.dictionaries(st.text(), st.integers()), max_size=5))
def test_every_item_of_a_list_with_parts_is_kept_in_order(values: list[Any]) -> None:
    output = _output(values)
    if not any(isinstance(value, TextPart | ImagePart) for value in values):
        assert output == ToolOutput(value_text(values))
        return
    assert len(output.parts) == len(values)
    for part, value in zip(output.parts, values, strict=True):
        assert part is value if isinstance(value, TextPart | ImagePart) else part == TextPart(value_text(value))
