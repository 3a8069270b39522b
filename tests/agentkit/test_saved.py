"""A run with `save_snapshots` goes on after its last complete turn, with the files that its sandbox had then."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentkit import (
    Agent,
    AssistantTurn,
    Message,
    ResumeError,
    ScriptedModel,
    Trajectory,
    TrajectoryWriteError,
    TurnFinished,
    TurnStarted,
    tool,
)
from agentkit.events import CallFinished, MessageAdded, Record
from agentkit.interrupted import FILES_RESTORED
from agentkit.messages import UserMessage
from agentkit.run import Run
from agentkit.saved import remove_snapshots, saved_snapshot
from agentkit_engine.chat import Tokenizer
from agentkit_environments import (
    DeferredEnvironment,
    Environment,
    EnvironmentSpec,
    Snapshot,
    SnapshotError,
    open_environment,
)
from agentkit_tools import BUILTINS

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]


def bash(command: str) -> AssistantTurn:
    return AssistantTurn(None, "", [("bash", {"command": command})])


TURNS = (
    bash("echo 1 >> log; cat log"),
    AssistantTurn(None, "", [("list_dir", {})]),
    bash("echo 3 >> log; cat log"),
    AssistantTurn(None, "Done."),
)


class WatchedAgent(Agent):
    """Copies the folder of its record at many moments, as a process that is killed then would leave it."""

    folder: Path
    moments: list[Path]

    def copy_folder(self) -> None:
        self.moments.append(self.folder.with_name(f"moment{len(self.moments)}"))
        shutil.copytree(self.folder, self.moments[-1])

    async def ask(self, run: Run, *args: Any, **options: Any) -> Any:
        self.copy_folder()
        return await super().ask(run, *args, **options)

    async def act(self, run: Run, *args: Any) -> None:
        self.copy_folder()
        await super().act(run, *args)
        self.copy_folder()

    async def observe(self, run: Run, news: Sequence[Message]) -> None:
        await super().observe(run, news)
        self.copy_folder()


async def test_a_run_that_was_killed_at_many_moments(script: Script, tmp_path: Path) -> None:
    """No complete turn is done again, and the turn in flight begins with the files from before it."""
    watched = WatchedAgent(script(*TURNS), thinking="never")
    watched.folder, watched.moments = tmp_path / "run", []
    path = watched.folder / "t.jsonl"
    async with await open_environment(backend="unsafe-local") as environment:
        whole = await watched.run("Count.", environment=environment, trajectory=path, save_snapshots=True)
        assert await environment.read_file("log") == b"1\n3\n"
    assert [file.name for file in watched.folder.iterdir()] == ["t.jsonl"], "a run that has ended needs no snapshot"
    agent = Agent(script(*TURNS), thinking="never")
    done_again = 0
    for moment in watched.moments:
        path = moment / "t.jsonl"
        killed = Trajectory.load(path)
        complete = sum(isinstance(record, TurnFinished) for record in killed.records)
        begun = sum(isinstance(record, TurnStarted) for record in killed.records)
        if not begun:
            continue
        lines = path.read_bytes().splitlines(keepends=True)
        kept = 1 + max((n for n, line in enumerate(lines) if b'"turn_finished"' in line), default=-1)
        saved = saved_snapshot(killed)
        assert saved is not None and len(list(moment.glob("*.snapshot"))) == 1
        async with await open_environment(backend="unsafe-local", snapshot=Snapshot.load(saved.path)) as environment:
            options: dict[str, Any] = {"world_turns": saved.turns, "save_snapshots": True}
            result = await agent.resume(killed, environment=environment, **options)
            assert await environment.read_file("log") == b"1\n3\n"
        assert path.read_bytes().startswith(b"".join(lines[:kept])), "complete turns are kept as they are"
        assert result.trajectory.messages == whole.trajectory.messages and result.usage.turns == 4
        assert {file.name for file in moment.iterdir()} <= {"t.jsonl", "t.jsonl.torn"}
        done_again += begun - complete
    assert done_again > 0


BOUGHT: list[str] = []


@tool
def buy(article: str) -> str:
    """Buy an article, elsewhere."""
    BOUGHT.append(article)
    return f"bought {article}"


MIXED = (
    bash("echo 1 >> log"),
    AssistantTurn(
        None, "", [("bash", {"command": "echo 2 >> log"}), ("buy", {"article": "bolt"}), ("buy", {"article": "nut"})]
    ),
    AssistantTurn(None, "Done."),
)


def cut(record: Trajectory, records: list[Record]) -> Trajectory:
    """Return a record that has only these of the records."""
    part = Trajectory(record.header)
    part.records, part.times_s = records, [0.0] * len(records)
    return part


@pytest.mark.parametrize("read", [False, True])
async def test_a_turn_that_also_had_effects_elsewhere_is_kept(script: Script, read: bool) -> None:
    """No call is made again. Recorded results stay, and the model is told once that its changes to files are lost."""
    agent = Agent(script(*MIXED), [BUILTINS["bash"], buy], thinking="never")
    BOUGHT.clear()
    async with await open_environment(backend="unsafe-local") as environment:
        whole = (await agent.run("Q", environment=environment)).trajectory
        await environment.write_file("log", "1\n")
        records = whole.records[: [n for n, each in enumerate(whole.records) if isinstance(each, TurnFinished)][1]]
        if not read:  # killed before the last call had a result
            end = max(n for n, each in enumerate(records) if isinstance(each, CallFinished))
            lost = [each for each in records if isinstance(each, CallFinished) and each.result.call_id == "call_1_2"]
            records = [each for each in records[: end + 1] if each not in lost]
        result = await agent.resume(cut(whole, records), environment=environment, world_turns=1)
        assert await environment.read_file("log") == b"1\n" and sorted(BOUGHT) == ["bolt", "nut"]
        second = {each.call_id: each.content for each in result.trajectory.results}
        assert second["call_1_1"] == "bought bolt"
        assert ("outcome unknown" in second["call_1_2"]) != read and ("bought nut" in second["call_1_2"]) == read
        assert (result.answer, result.usage.turns) == ("Done.", 3)
        told = [each for each in result.trajectory.records if each == MessageAdded(UserMessage(FILES_RESTORED))]
        assert len(told) == 1
        place = result.trajectory.records.index(told[0])
        again = await agent.resume(
            cut(whole, result.trajectory.records[: place + 1]), environment=environment, world_turns=1
        )
        assert again.trajectory.messages == result.trajectory.messages and len(BOUGHT) == 2
        submits = agent.tools["bash"], buy, BUILTINS["submit"]
        agent = Agent(
            script(MIXED[0], replace(MIXED[1], calls=[*MIXED[1].calls, ("submit", {"answer": "a"})])), submits
        )
        ended = (await agent.run("Q", environment=environment)).trajectory
        with pytest.raises(ResumeError, match="would repeat a call of buy"):
            await agent.resume(cut(ended, ended.records[:-1]), environment=environment, world_turns=1)


@pytest.fixture
def breaks(tokenizer: Tokenizer) -> Agent:
    """An agent whose model fails in its second turn, which leaves a run that can be resumed."""

    def policy(messages: Sequence[Message], think: bool) -> AssistantTurn:
        if len(messages) > 3:
            raise RuntimeError("the model is on fire")
        return TURNS[0]

    return Agent(ScriptedModel(policy, tokenizer), thinking="never")


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


async def test_the_sandbox_of_a_resumed_run_begins_with_the_snapshot(
    script: Script, breaks: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def open_local(spec: EnvironmentSpec, *, snapshot: Snapshot | None = None) -> Environment:
        return await open_environment(spec, backend="unsafe-local", snapshot=snapshot)

    monkeypatch.setattr("agentkit.agent.open_environment", open_local)
    monkeypatch.setattr("agentkit.forks.open_environment", open_local)
    path = tmp_path / "t.jsonl"
    with pytest.raises(RuntimeError, match="on fire"):
        await breaks.run("Count.", trajectory=path, save_snapshots=True)
    assert len(names(tmp_path)) == 2
    result = await Agent(script(*TURNS), thinking="never").resume(path, save_snapshots=True)
    assert [each.content for each in result.trajectory.results][::2] == ["1", "1\n3"]
    assert result.usage.turns == 4 and names(tmp_path) == {"t.jsonl", "t.jsonl.torn"}


@pytest.fixture
async def killed(breaks: Agent, tmp_path: Path) -> Trajectory:
    """The record of a run that broke off in its second turn, with a snapshot of its first."""
    async with await open_environment(backend="unsafe-local") as environment:
        with pytest.raises(RuntimeError, match="on fire"):
            await breaks.run("Q", environment=environment, trajectory=tmp_path / "t.jsonl", save_snapshots=True)
    return Trajectory.load(tmp_path / "t.jsonl")


async def test_only_a_snapshot_of_this_record_is_used(killed: Trajectory, tmp_path: Path) -> None:
    saved = saved_snapshot(killed)
    assert saved is not None and saved.turns == 1 and saved.path.parent == tmp_path
    killed.header = replace(killed.header, id="another")
    assert saved_snapshot(killed) is None
    killed = Trajectory.load(tmp_path / "t.jsonl")
    count = int(saved.path.name.split("-")[-1].removesuffix(".snapshot"))
    killed.rewind(count - 1)
    assert saved_snapshot(killed) is None, "it has effects of calls that the record does not have"
    assert saved_snapshot(Trajectory(killed.header)) is None, "the record has no file"


async def test_only_the_files_of_the_record_are_removed(killed: Trajectory, tmp_path: Path) -> None:
    saved = saved_snapshot(killed)
    assert saved is not None
    other = tmp_path / saved.path.name.replace("t.jsonl", "t.jsonl.x")
    unlike = tmp_path / "t.jsonl.mine.snapshot"
    part = tmp_path / f".{saved.path.name}.0a1b2c3d"
    for file in (other, unlike, part):
        file.touch()
    remove_snapshots(tmp_path / "t.jsonl")
    assert names(tmp_path) == {"t.jsonl", other.name, unlike.name}


async def test_a_damaged_snapshot_is_an_error(killed: Trajectory, script: Script) -> None:
    saved = saved_snapshot(killed)
    assert saved is not None and killed.path is not None
    saved.path.write_bytes(saved.path.read_bytes()[:-7])
    before = killed.path.read_bytes()
    with pytest.raises(SnapshotError, match=r"t\.jsonl\.[0-9a-f]{8}-[0-9]+\.snapshot cannot be used as a snapshot"):
        await Agent(script(*TURNS), thinking="never").resume(killed)
    assert killed.path.read_bytes() == before


async def test_snapshots_need_a_file_of_the_record(script: Script) -> None:
    agent = Agent(script(*TURNS))
    with pytest.raises(ValueError, match="save_snapshots=True needs a file beside which to save them"):
        await agent.run("Q", save_snapshots=True)


class FullEnvironment(DeferredEnvironment):
    """An environment that cannot be captured once `full` is set."""

    full = False

    async def snapshot(self) -> Snapshot:
        if self.full:
            raise SnapshotError("the files of the environment cannot be captured: more than 3 entries")
        return await super().snapshot()


async def local(spec: EnvironmentSpec) -> Environment:
    return await open_environment(spec, backend="unsafe-local")


async def test_files_that_cannot_be_captured(script: Script, tmp_path: Path) -> None:
    """Before the first turn that is an error. Later the run goes on, and the snapshot from before stays."""
    names: list[list[str]] = []

    @tool
    def look() -> str:
        """Look."""
        environment.full = True
        names.append(sorted(file.name for file in tmp_path.glob("*.snapshot")))
        return "seen"

    async with FullEnvironment(EnvironmentSpec(), local) as environment:
        await environment.open()
        looks = AssistantTurn(None, "", [("look", {})])
        agent = Agent(
            script(looks, bash("touch a"), looks, AssistantTurn(None, "Hi.")),
            [BUILTINS["bash"], look],
            thinking="never",
        )
        result = await agent.run("Q", environment=environment, trajectory=tmp_path / "t.jsonl", save_snapshots=True)
        assert result.answer == "Hi." and len(names) == 2 and len(names[0]) == 1 and names[0] == names[1]
        with pytest.raises(SnapshotError, match="the files of the environment cannot be captured: more than 3 entries"):
            await agent.run("Q", environment=environment, trajectory=tmp_path / "u.jsonl", save_snapshots=True)
    with pytest.raises(ResumeError, match="has no turn of the run yet"):
        await agent.resume(tmp_path / "u.jsonl")


async def test_a_snapshot_that_cannot_be_written_is_an_error(script: Script, tmp_path: Path) -> None:
    folder = tmp_path / "gone"

    @tool
    def remove() -> str:
        """Remove the folder of the record."""
        shutil.rmtree(folder)
        return "removed"

    agent = Agent(
        script(AssistantTurn(None, "", [("remove", {}), ("bash", {"command": "touch a"})])),
        [BUILTINS["bash"], remove],
        thinking="never",
    )
    async with await open_environment(backend="unsafe-local") as environment:
        with pytest.raises(TrajectoryWriteError, match=r"Cannot write a snapshot beside trajectory .*No such file"):
            await agent.run("Q", environment=environment, trajectory=folder / "t.jsonl", save_snapshots=True)
