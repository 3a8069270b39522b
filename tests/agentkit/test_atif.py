"""ATIF: what a document says about a run, documents of other agents as history, and malformed ones."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from tests.fuzz import amounts, fuzz
from tests.harbor import models as harbor

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    ImagePart,
    Limits,
    Message,
    ScriptedModel,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    Trajectory,
    TrajectoryError,
    TrajectoryFormatError,
    UserMessage,
)
from agentkit.atif import MAX_FILE_BYTES, NO_RESULT, VERSIONS, atif_bytes, load_atif, parse_atif, to_atif
from agentkit.history import check_history
from agentkit_environments import Environment

from .conftest import get_weather

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
Check = Callable[[bytes], None]

LOOK = AssistantTurn(
    "I have to look.", "Looking.", [("get_weather", {"city": "Oslo"}), ("get_weather", {"town": "Oslo"})]
)
DONE = AssistantTurn(content="Snowy.")


def document(*steps: dict[str, Any], **changes: Any) -> bytes:
    numbered = [{"step_id": number, **step} for number, step in enumerate(steps, start=1)]
    agent = {"name": "other", "version": "2"}
    return json.dumps({"schema_version": "ATIF-v1.8", "agent": agent, "steps": numbered, **changes}).encode()


@pytest.fixture(params=["schema", pytest.param("harbor", marks=harbor.needs_harbor)])
def check(request: pytest.FixtureRequest) -> Check:
    """Function that raises ValueError for a document that harbor refuses: by its schema, or by harbor itself."""
    return harbor.check_trajectory if request.param == "schema" else harbor.check_trajectory_with_harbor


async def test_a_step_has_the_message_the_calls_and_the_exact_ids(
    script: Script, environment: Environment, check: Check
) -> None:
    agent = Agent(script(LOOK, DONE), [get_weather], system="Be brief.", thinking="auto")
    record = (await agent.run("Weather?", environment=environment, metadata={"trial": "a.0"})).trajectory
    made = to_atif(record)
    check(atif_bytes(record))
    system, user, look, done = made["steps"]
    assert (system["source"], system["message"]) == ("system", "Be brief.")
    assert (user["source"], user["message"]) == ("user", "Weather?")
    assert (look["source"], look["message"], look["reasoning_content"]) == ("agent", "Looking.", "I have to look.")
    assert [call["arguments"] for call in look["tool_calls"]] == [{"city": "Oslo"}, {"town": "Oslo"}]
    first, second = look["observation"]["results"]
    assert first == {"source_call_id": "call_0_0", "content": "snowy, -3 degrees"}
    assert second["source_call_id"] == "call_0_1" and second["extra"] == {"is_error": True}
    # Each step repeats the ids before it; the last one has all ids of the session.
    metrics = done["metrics"]
    assert metrics["prompt_token_ids"] + metrics["completion_token_ids"] == record.token_ids
    before = look["metrics"]["prompt_token_ids"] + look["metrics"]["completion_token_ids"]
    assert metrics["prompt_token_ids"][: len(before)] == before
    assert metrics["logprobs"] == record.logprobs[-len(metrics["logprobs"]) :]
    assert metrics["prompt_tokens"] == len(metrics["prompt_token_ids"])
    assert made["final_metrics"]["total_completion_tokens"] == sum(record.loss_mask)
    assert made["final_metrics"]["total_steps"] == 4
    assert made["agent"]["tool_definitions"] == [get_weather.spec] and made["agent"]["model_name"] == "scripted"
    assert made["extra"] == {"metadata": {"trial": "a.0"}, "status": "answered", "answer": "Snowy."}
    assert parse_atif(atif_bytes(record)) == record.messages


async def test_forced_ids_are_marked(script: Script, environment: Environment, check: Check) -> None:
    agent = Agent(script(AssistantTurn(content="word " * 50)), [], limits=Limits(max_tokens=5), thinking="never")
    record = (await agent.run("Go on.", environment=environment)).trajectory
    check(atif_bytes(record))
    metrics = to_atif(record)["steps"][-1]["metrics"]
    mask = metrics["extra"]["loss_mask"]
    assert sum(mask) == 5 and 0 in mask and len(mask) == len(metrics["completion_token_ids"])
    assert [logprob for kept, logprob in zip(mask, metrics["logprobs"], strict=True) if not kept] == [0.0] * mask.count(
        0
    )


async def test_sub_agents_are_embedded_also_from_their_files(
    script: Script, environment: Environment, tmp_path: Path, check: Check
) -> None:
    helper = Agent(script(DONE), [get_weather], system="Help.")
    turns = AssistantTurn(calls=[("helper", {"task": "Weather in Oslo?"})]), DONE
    main = Agent(script(*turns), [helper.as_tool("helper", "Helps.")])
    result = await main.run("Q", environment=environment, trajectory=tmp_path / "run.jsonl")
    loaded = Trajectory.load(tmp_path / "run.jsonl")
    for record in (result.trajectory, loaded):
        made = to_atif(record)
        check(atif_bytes(record))
        (child,) = made["subagent_trajectories"]
        (found,) = made["steps"][2]["observation"]["results"]
        assert found["subagent_trajectory_ref"] == [{"trajectory_id": child["trajectory_id"]}]
        assert child["steps"][1]["message"] == "Weather in Oslo?"
    (tmp_path / "run.agent1.jsonl").rename(tmp_path / "elsewhere.jsonl")
    made = to_atif(loaded)
    check(json.dumps(made).encode())
    (found,) = made["steps"][2]["observation"]["results"]
    assert found["subagent_trajectory_ref"][0]["trajectory_path"] == "run.agent1.jsonl"
    # A record that names itself as its own sub-agent is written once.
    (tmp_path / "run.agent1.jsonl").write_bytes((tmp_path / "run.jsonl").read_bytes())
    assert "subagent_trajectories" not in to_atif(loaded)


async def test_a_history_is_copied_context_and_images_are_kept(
    script: Script, environment: Environment, check: Check
) -> None:
    image = ImagePart.of(b"\x89PNG", "image/png")
    history: list[Message] = [UserMessage("Hi"), AssistantMessage("Hello.")]
    record = (
        await Agent(script(DONE), [], system="").run(["Look:", image], environment=environment, message_history=history)
    ).trajectory
    made = to_atif(record)
    check(atif_bytes(record))
    assert made["steps"][1]["is_copied_context"] is True and "is_copied_context" not in made["steps"][3]
    assert made["steps"][2]["message"][1]["source"]["path"] == f"data:image/png;base64,{image.data}"
    assert parse_atif(atif_bytes(record)) == record.messages
    with pytest.raises(TrajectoryFormatError, match="has no message"):
        to_atif(Trajectory(record.header))


AGENT_STEP = {"source": "agent", "message": "Hi"}
CALL = {"tool_call_id": "a", "function_name": "f", "arguments": {}}
IMAGE = {"media_type": "image/png", "path": "a.png"}


def observed(**result: Any) -> dict[str, Any]:
    return {**AGENT_STEP, "tool_calls": [CALL], "observation": {"results": [result]}}


@pytest.mark.parametrize(
    "good", [document({**AGENT_STEP, "timestamp": "2026-01-02T03:04:05Z"}), document(observed(source_call_id="a"))]
)
def test_harbor_accepts_good_documents(check: Check, good: bytes) -> None:
    check(good)


@pytest.mark.parametrize(
    "broken",
    [
        document(),
        document(AGENT_STEP, schema_version="ATIF-v2.0"),
        document(AGENT_STEP, colour="red"),
        document({**AGENT_STEP, "step_id": 2}),
        document({**AGENT_STEP, "step_id": "one"}),
        document({**AGENT_STEP, "timestamp": "yesterday"}),
        document({**AGENT_STEP, "llm_call_count": 0, "metrics": {}}),
        document({**AGENT_STEP, "metrics": {"logprobs": ["x"]}}),
        document({**AGENT_STEP, "message": [{"type": "text"}]}),
        document({**AGENT_STEP, "message": [{"type": "text", "text": "a", "source": IMAGE}]}),
        document({**AGENT_STEP, "message": [{"type": "image"}]}),
        document({**AGENT_STEP, "message": [{"type": "audio", "source": IMAGE}]}),
        document({"source": "user", "message": "Hi", "tool_calls": [CALL]}),
        document(observed(source_call_id="b")),
        document(observed(content=[{"type": "image", "text": "a", "source": IMAGE}])),
        document(observed(subagent_trajectory_ref=[{"session_id": "s"}])),
        document(AGENT_STEP, subagent_trajectories=[json.loads(document(AGENT_STEP))]),
        document(AGENT_STEP, subagent_trajectories=[json.loads(document(AGENT_STEP, trajectory_id="a"))] * 2),
        document(
            AGENT_STEP,
            subagent_trajectories=[json.loads(document({**AGENT_STEP, "step_id": 2}, trajectory_id="a"))],
        ),
    ],
)
def test_harbor_refuses_broken_documents(check: Check, broken: bytes) -> None:
    with pytest.raises(ValueError, match=r"\$|\.validate_|ValidationError"):
        check(broken)


def test_a_document_of_another_agent_becomes_a_conversation() -> None:
    call = {"tool_call_id": "a", "function_name": "bash", "arguments": {"command": "ls", "cwd": None}}
    found = parse_atif(
        document(
            {"source": "system", "message": "Be brief."},
            {"source": "user", "message": [{"type": "text", "text": "Go."}]},
            {"source": "agent", "message": "I plan.", "reasoning_content": "Hm."},
            {
                "source": "agent",
                "message": "I look.",
                "tool_calls": [call, {**call, "tool_call_id": "b"}, {**call, "tool_call_id": "c"}],
                "observation": {
                    "results": [
                        {"source_call_id": "b", "content": "two"},
                        {"content": "disk is nearly full"},
                        {"source_call_id": "a", "content": "one", "extra": {"is_error": True}},
                    ]
                },
            },
            {"source": "system", "message": "Context was compacted."},
            {"source": "agent", "message": "Done.", "metrics": {"logprobs": [-0.5], "completion_token_ids": [4]}},
        )
    )
    arguments = '{"command": "ls", "cwd": null}'
    assert found == [
        SystemMessage("Be brief."),
        UserMessage("Go."),
        AssistantMessage("I plan.\n\nI look.", "Hm.", tuple(ToolCall(name, "bash", arguments) for name in "abc")),
        ToolMessage("a", "bash", "one", is_error=True),
        ToolMessage("b", "bash", "two"),
        ToolMessage("c", "bash", NO_RESULT, is_error=True),
        UserMessage("disk is nearly full"),
        UserMessage("Context was compacted."),
        AssistantMessage("Done."),
    ]
    check_history(found)


@pytest.mark.parametrize("version", VERSIONS)
def test_all_versions_are_read(version: str) -> None:
    assert parse_atif(document({"source": "user", "message": "Hi"}, schema_version=version)) == [UserMessage("Hi")]


USER = {"source": "user", "message": "Hi"}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[]", "not an ATIF trajectory"),
        (b"{", "not an ATIF trajectory"),
        (b"[" * 100_000, "nested too deeply"),
        (document(USER, schema_version="ATIF-v2.0"), "schema_version is 'ATIF-v2.0', expected ATIF-v1.0 to ATIF-v1.8"),
        (document(USER, schema_version=[]), "schema_version is \\[\\]"),
        (document(), "at least 1 item"),
        (document({**USER, "step_id": 2}), "step_id is 2, expected 1"),
        (document({**USER, "colour": "red"}), "colour"),
        (document({**USER, "reasoning_content": "x"}), "a user step has no reasoning_content"),
        (
            document({"source": "agent", "message": "", "observation": {"results": [{"source_call_id": "z"}]}}),
            "source_call_id 'z' is not a call of step 1",
        ),
        (document({"source": "user", "message": [{"type": "text"}]}), 'a part of type "text" has text only'),
        (
            document(
                {
                    "source": "user",
                    "message": [{"type": "image", "source": {"media_type": "image/png", "path": "images/a.png"}}],
                }
            ),
            "the image 'images/a.png' is not in the document",
        ),
        (
            document(
                {
                    "source": "user",
                    "message": [
                        {"type": "image", "source": {"media_type": "image/png", "path": "data:image/png;base64,?"}}
                    ],
                }
            ),
            "must be base64",
        ),
        (document(USER, subagent_trajectories=[json.loads(document(USER))]), "needs a trajectory_id of its own"),
        (b'{"schema_version": "ATIF-v1.8", "schema_version": "ATIF-v1.8"}', "twice in one object"),
    ],
)
def test_malformed_documents(data: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "trajectory.json"
    path.write_bytes(data)
    with pytest.raises(TrajectoryFormatError, match=problem) as caught:
        load_atif(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="No such file"):
        load_atif(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(TrajectoryError, match="expected a regular file"):
        load_atif(tmp_path / "pipe.json")
    (tmp_path / "huge.json").touch()
    os.truncate(tmp_path / "huge.json", MAX_FILE_BYTES + 1)
    with pytest.raises(TrajectoryError, match="expected at most"):
        load_atif(tmp_path / "huge.json")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    ["step_id", "source", "message", "tool_calls", "observation", "metrics", "reasoning_content", "extra", "timestamp"]
)
good_step = st.fixed_dictionaries(
    {"source": st.sampled_from(["system", "user", "agent"]), "message": st.text(max_size=8)},
    optional={
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {
                    "tool_call_id": st.sampled_from("ab"),
                    "function_name": st.just("f"),
                    "arguments": st.dictionaries(st.text(max_size=3), values, max_size=2),
                }
            ),
            max_size=3,
        ),
        "observation": st.fixed_dictionaries(
            {
                "results": st.lists(
                    st.fixed_dictionaries(
                        {},
                        optional={"source_call_id": st.sampled_from("ab"), "content": st.text(max_size=5)},
                    ),
                    max_size=3,
                )
            }
        ),
    },
)


@amounts(200, 5_000)
def test_any_document_is_read_or_refused(examples: int) -> None:
    def check(value: tuple[list[dict[str, Any]], bool]) -> None:
        steps, changes = value
        data = document(*steps, **({"final_metrics": {"total_steps": "x"}} if changes else {}))
        try:
            messages = parse_atif(data)
        except TrajectoryFormatError:
            return
        kinds = SystemMessage | UserMessage | AssistantMessage | ToolMessage
        assert all(isinstance(message, kinds) for message in messages)
        for before, after in itertools.pairwise(messages):
            assert not (isinstance(before, AssistantMessage) and isinstance(after, AssistantMessage))

    steps = st.lists(good_step | st.dictionaries(keys, values, max_size=4), max_size=5)
    fuzz(check, st.tuples(steps, st.booleans()), examples)


@amounts(200, 5_000)
def test_any_bytes_are_refused(examples: int) -> None:
    def check(data: bytes) -> None:
        with pytest.raises(TrajectoryFormatError):
            parse_atif(data)

    fuzz(check, st.binary(max_size=60), examples)


def test_text_parts_alone_are_text() -> None:
    (message,) = parse_atif(document({"source": "user", "message": [{"type": "text", "text": "a"}] * 2}))
    assert message == UserMessage("a\na")
    assert TextPart("a") not in getattr(message, "parts", ())
