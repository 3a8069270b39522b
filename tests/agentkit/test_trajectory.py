"""Trajectories: complete after a crash at any byte, never misread, and with a clear error for a full disk."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentkit import (
    Agent,
    AssistantMessage,
    AssistantTurn,
    CallFinished,
    Header,
    MessageAdded,
    SamplingParams,
    ScriptedModel,
    TokenSegment,
    ToolCall,
    ToolResult,
    Trajectory,
    TrajectoryCorruptError,
    TrajectoryError,
    TrajectoryFormatError,
    TrajectoryWriteError,
    TurnStarted,
    UserMessage,
    tool,
)
from agentkit_engine.chat import Tokenizer
from agentkit_environments import Environment, EnvironmentSpec, SandboxLostError, open_environment
from agentkit_tools import ToolContext

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]


@pytest.fixture
def recorded(script: Script, tmp_path: Path) -> Trajectory:
    """A short run recorded in a file."""
    path = tmp_path / "whole.jsonl"
    calls = [("list_dir", {}), ("read_file", {"path": "nö \u2028"}), ("nope", {})]
    agent = Agent(script(AssistantTurn("Hm.", "Text.", calls), AssistantTurn(None, "Done.")))

    async def run() -> None:
        async with await open_environment(backend="unsafe-local") as environment:
            await agent.run("Q\ud800", environment=environment, trajectory=path, metadata={"a": [1]})

    anyio.run(run)
    return Trajectory.load(path)


def test_a_loaded_trajectory_equals_the_written_one(recorded: Trajectory, tmp_path: Path) -> None:
    assert recorded.path is not None
    read = Trajectory.load(recorded.path)
    assert MessageAdded(UserMessage("Q\ufffd")) in read.records
    assert len(read.loss_mask) == len(read.logprobs) == len(read.token_ids)
    assert [bool(mask) for mask in read.loss_mask] == [logprob is not None for logprob in read.logprobs]
    assert read.outcome is not None and read.outcome.status == "answered"
    read.save(tmp_path / "copy.jsonl")
    assert (tmp_path / "copy.jsonl").read_bytes() == recorded.path.read_bytes()


def test_every_line_is_json_with_a_checksum_of_what_comes_before_it(recorded: Trajectory) -> None:
    assert recorded.path is not None
    for seq, line in enumerate(recorded.path.read_bytes().splitlines()):
        parsed = json.loads(line)
        assert parsed["seq"] == seq
        assert int(parsed["crc32"], 16) == zlib.crc32(line[: line.rindex(b',"crc32"')])


def test_torn_at_every_byte(tmp_path: Path) -> None:
    """Records before the tear are read, and writing continues after them."""
    written = tmp_path / "whole.jsonl"
    whole = Trajectory(header(), written)
    whole.append(MessageAdded(UserMessage("Grüße\n")))
    whole.append(TurnStarted(0, think=True))
    whole.append(TokenSegment("prompt", (0, 5, 6)))
    whole.append(TokenSegment("sampled", (7, 1), (-0.25, -1.5)))
    whole.append(MessageAdded(AssistantMessage("Hm.", None, (ToolCall("call_0_0", "f", '{"x": 1}'),))))
    whole.append(CallFinished(ToolResult("call_0_0", "f", "ok")))
    whole.close()
    data = written.read_bytes()
    torn = tmp_path / "torn.jsonl"
    for size in range(len(data)):
        torn.write_bytes(data[:size])
        if b"\n" not in data[:size]:
            with pytest.raises(TrajectoryFormatError, match=r"no complete agentkit\.trajectory header"):
                Trajectory.load(torn)
            continue
        trajectory = Trajectory.load(torn)
        good = whole.records[: data[:size].count(b"\n") - 1]
        assert trajectory.records == good
        trajectory.reopen()
        trajectory.append(TurnStarted(1, think=False))
        trajectory.close()
        assert Trajectory.load(torn).records == [*good, TurnStarted(1, think=False)]


EXAMPLES = int(os.environ.get("AGENTKIT_FUZZ_EXAMPLES", "150"))
"""Examples of the fuzz test; 20,000 take minutes."""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=EXAMPLES)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_never_misread(recorded: Trajectory, tmp_path: Path, place: float, flip: int) -> None:
    assert recorded.path is not None
    data = bytearray(recorded.path.read_bytes())
    whole = Trajectory.load(recorded.path).records
    data[int(place * len(data))] ^= flip
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(data)
    try:
        assert Trajectory.load(changed).records == whole[:-1]
    except (TrajectoryCorruptError, TrajectoryFormatError) as error:
        assert str(changed) in str(error)


def test_damage_before_the_last_line_is_an_error_with_its_line(recorded: Trajectory, tmp_path: Path) -> None:
    assert recorded.path is not None
    lines = recorded.path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"a", b"b")
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(TrajectoryCorruptError, match=rf"damaged.jsonl, line 4 of {len(lines)} is damaged. The 3 lines"):
        Trajectory.load(path)


def test_another_format_version_is_refused(recorded: Trajectory, tmp_path: Path) -> None:
    assert recorded.path is not None
    header = recorded.path.read_bytes().splitlines()[0].replace(b'"version":3', b'"version":2')
    body = header[: header.rindex(b',"crc32"')]
    path = tmp_path / "old.jsonl"
    path.write_bytes(body + b',"crc32":"%08x"}\n' % zlib.crc32(body))
    with pytest.raises(TrajectoryFormatError, match="format version 2; this agentkit reads version 3"):
        Trajectory.load(path)


def test_a_file_that_is_not_a_trajectory_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\n", b"hello\n", b'{"role": "user"}\n{"role": "user"}\n', bytes(range(256))):
        path = tmp_path / "other"
        path.write_bytes(content)
        with pytest.raises(TrajectoryFormatError, match="is not a trajectory"):
            Trajectory.load(path)
    with pytest.raises(TrajectoryError, match=r"Cannot read trajectory .*missing: No such file"):
        Trajectory.load(tmp_path / "missing")


def header() -> Header:
    return Header(
        model="m",
        dialect="v4-preview",
        effort="high",
        sampling=SamplingParams(),
        tools=(),
        thinking="auto",
        metadata={},
    )


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    Trajectory(header(), path).close()
    with pytest.raises(TrajectoryWriteError, match="exists already"):
        Trajectory(header(), path)
    with pytest.raises(TrajectoryWriteError, match=r"Cannot write trajectory .*below: File exists"):
        Trajectory(header(), path / "below")


async def test_a_full_disk_ends_the_run_with_a_clear_error(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trajectory's file descriptor is /dev/full from the first call on."""
    path = tmp_path / "t.jsonl"
    opened: list[Environment] = []

    async def open_local(spec: EnvironmentSpec) -> Environment:
        opened.append(await open_environment(spec, backend="unsafe-local"))
        return opened[-1]

    monkeypatch.setattr("agentkit.agent.open_environment", open_local)

    @tool
    def fill(context: ToolContext) -> str:
        """Fill the disk."""
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if os.path.samestat(os.fstat(number), os.stat(path)):
                    full = os.open("/dev/full", os.O_WRONLY)
                    os.dup2(full, number)
                    os.close(full)
        return "full"

    agent = Agent(script(AssistantTurn(None, "", [("fill", {})])), [fill])
    with pytest.raises(TrajectoryWriteError, match=r"Cannot write record \d+ of .*t.jsonl: No space left .*Free space"):
        await agent.run("Q", trajectory=path)
    with pytest.raises(SandboxLostError):
        await opened[0].exec("true")
    read = Trajectory.load(path)
    assert read.outcome is None
    assert read.messages


def test_the_tokenizer_and_the_record_replace_lone_surrogates_alike(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_text("Q\ud800") == tokenizer.encode_text("Q\ufffd")
