"""Snapshots and forks: the same files in every backend, and nothing shared between the copies."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    ResourceLimits,
    SandboxLostError,
    Snapshot,
    SnapshotError,
    open_environment,
)

from .conftest import AS_IMAGE, BACKENDS, require

if TYPE_CHECKING:
    from tests.conftest import Tag
    from tests.environments.conftest import Opener

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=[*BACKENDS, pytest.param(AS_IMAGE, id=AS_IMAGE, marks=pytest.mark.docker)])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    require(name)
    return name


WORLD = r"""
umask 022
mkdir -p src/deep "$(printf 'odd\nname')" empty locked
printf 'print(1)\n' >src/a.py
printf '\377\376' >src/deep/bytes
ln src/a.py src/hard
ln -s src/a.py relative
ln -s /workspace/src absolute
ln -s nowhere/at/all broken
ln -s /tmp/other to-tmp
mkfifo pipe
printf secret >locked/file
printf 'in tmp' >/tmp/other
mkdir /tmp/.hidden
chmod 640 src/a.py
chmod 4755 src/deep/bytes
chmod 1777 empty
chmod 000 locked/file
chmod 000 locked
touch -d @1000000000 src/a.py
touch -d @1200000000 src
touch -h -d @1100000000 relative
"""
LIST = """
import os, stat
for root in (os.environ.get("TREE", "/workspace"), "/tmp"):
    found = [root]
    for parent, directories, files in os.walk(root):
        found += [os.path.join(parent, name) for name in directories + files]
    for path in sorted(found):
        info = os.lstat(path)
        kind = stat.S_IFMT(info.st_mode)
        fields = [path[len(root):], oct(info.st_mode), info.st_nlink if kind == stat.S_IFREG else 0]
        if path != root and kind != stat.S_IFDIR:
            fields.append(int(info.st_mtime))
        if kind == stat.S_IFLNK:
            fields.append(os.readlink(path))
        elif kind == stat.S_IFREG and info.st_mode & 0o400:
            fields += [info.st_size, open(path, "rb").read()[:100]]
        print(fields)
"""


@pytest.fixture(scope="module")
async def world(backend: str, open_backend: Opener, anyio_backend: str) -> AsyncIterator[Environment]:
    """An environment with every kind of entry in it."""
    async with await open_backend(backend) as environment:
        made = await environment.exec(WORLD)
        assert (made.exit_code, made.stderr) == (0, "")
        yield environment


async def listing(environment: Environment) -> str:
    """Return every entry of both directories with its mode, links, time, target and content."""
    done = await environment.exec(["python3", "-c", LIST])
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


async def test_a_fork_has_the_same_files(world: Environment) -> None:
    before = await listing(world)
    assert "src/deep/bytes" in before
    assert "/.hidden" in before
    async with world.fork(2) as forks:
        for fork in forks:
            assert await listing(fork) == before
            opened = await fork.exec(
                "chmod 700 locked && chmod 400 locked/file && cat locked/file src/hard absolute/a.py"
            )
            assert (opened.stdout, opened.stderr) == ("secretprint(1)\nprint(1)\n", "")
    assert await listing(world) == before


async def test_forks_do_not_see_each_other(world: Environment) -> None:
    before = await listing(world)
    async with world.fork(3) as forks:
        for number, fork in enumerate(forks):
            # `absolute` and `to-tmp` are links by absolute path, which must lead to the fork's own files
            done = await fork.exec(
                f"echo {number} >>src/hard; echo {number} >absolute/new; echo {number} >to-tmp; rm relative"
            )
            assert done.stderr == ""
        for number, fork in enumerate(forks):
            shown = await fork.exec("cat src/a.py src/new /tmp/other; ls relative")
            assert shown.stdout == f"print(1)\n{number}\n{number}\n{number}\n"
            assert shown.exit_code != 0
    assert await listing(world) == before


async def test_forks_end_with_their_block(world: Environment) -> None:
    async with world.fork() as [fork]:
        pass
    with pytest.raises(SandboxLostError):
        await fork.exec("true")
    with pytest.raises(ZeroDivisionError):
        async with world.fork(2) as forks:
            raise ZeroDivisionError
    for fork in forks:
        with pytest.raises(SandboxLostError):
            await fork.exec("true")
    async with world.fork(0) as forks:
        assert forks == []
    with pytest.raises(ValueError, match=r"fork\(n\) takes at least 0, got -1"):
        async with world.fork(-1):
            pass


async def test_a_fork_of_a_fork_outlives_both(backend: str, open_backend: Opener) -> None:
    async with await open_backend(backend) as first:
        await first.write_file("a", "1")
        async with first.fork() as [second]:
            await second.write_file("b", "2")
            snapshot = await second.snapshot()
    async with await second.reopen(snapshot) as third, await first.reopen(snapshot) as fourth:
        snapshot.close()
        for environment in (third, fourth):
            assert (await environment.exec("cat a b")).stdout == "12"


async def test_processes_are_not_forked(backend: str, open_backend: Opener, tag: Tag) -> None:
    async with await open_backend(backend) as environment:
        await environment.exec(f"sleep {tag.value} >/dev/null 2>&1 & echo started >log")
        tag.wait(1)
        async with environment.fork() as [fork]:
            assert await fork.read_file("log") == b"started\n"
            tag.wait(1)
            await fork.kill_all()
            tag.wait(1)
    tag.wait(0)


async def test_a_snapshot_can_be_saved_and_opened_in_any_backend(
    world: Environment, backend: str, open_backend: Opener, tmp_path: Path
) -> None:
    snapshot = await world.snapshot()
    assert snapshot.left_out == ()
    assert snapshot.entries is not None and snapshot.entries > 15
    snapshot.save(tmp_path / "world")
    snapshot.save(tmp_path / "world")
    assert os.listdir(tmp_path) == ["world"]
    snapshot.close()
    snapshot.close()
    loaded = Snapshot.load(tmp_path / "world")
    os.unlink(tmp_path / "world")
    before = await listing(world)
    async with await open_backend(backend, snapshot=loaded) as environment:
        assert await listing(environment) == before
    if backend != AS_IMAGE:
        async with await open_environment(backend="unsafe-local", run_id="tests", snapshot=loaded) as environment:
            assert (
                await environment.exec("cat src/a.py to-tmp; readlink absolute")
            ).stdout == "print(1)\nin tmp/workspace/src\n"
    loaded.close()
    with pytest.raises(SnapshotError, match="this snapshot was closed"):
        await world.reopen(loaded)
    with pytest.raises(SnapshotError, match="this snapshot was closed"):
        loaded.save(tmp_path / "again")
    assert not os.listdir(tmp_path)


async def test_holes_stay_holes(backend: str, open_backend: Opener) -> None:
    limits = ResourceLimits(disk_mib=16, file_size_mib=200)
    async with await open_backend(backend, EnvironmentSpec(limits=limits)) as environment:
        make = "f = open('holes', 'wb'); f.truncate(10 << 20); f.seek(5000000); f.write(b'x'); open('none', 'w')"
        assert (await environment.exec(["python3", "-c", make])).exit_code == 0
        snapshot = await environment.snapshot()
        assert snapshot.size_bytes < 1 << 20
        async with await environment.reopen(snapshot) as fork:
            same = await fork.exec("stat -c %s holes none; cat holes | tr -d '\\0'")
            assert same.stdout == "10485760\n0\nx"
            if not backend.startswith("docker"):  # the engine writes zeros
                assert int((await fork.exec("du -k holes | cut -f1")).stdout) < 1024


async def test_a_snapshot_is_bounded(backend: str, open_backend: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    async with await open_backend(backend, EnvironmentSpec(limits=ResourceLimits(disk_mib=4))) as environment:
        await environment.exec("for i in 1 2 3 4 5 6 7; do echo $i >$i; done")
        monkeypatch.setattr("agentkit_environments.environment.MAX_ENTRIES", 8)
        with pytest.raises(SnapshotError, match="cannot be captured: more than 8 entries"):
            await environment.snapshot()
        monkeypatch.setattr("agentkit_environments.environment.MAX_ENTRIES", 9)
        await environment.snapshot()
        monkeypatch.setattr("agentkit_environments.environment.SLACK_BYTES", -(8 << 20) + 100)
        with pytest.raises(SnapshotError, match="cannot be captured: more than 100 bytes"):
            await environment.snapshot()
        assert (await environment.exec("cat 7")).stdout == "7\n"


async def test_files_that_do_not_fit_are_refused(backend: str, open_backend: Opener, tag: Tag) -> None:
    if backend in ("unsafe-local", AS_IMAGE):
        pytest.skip("not applicable: no limit on disk space")
    async with await open_backend(backend) as environment:
        await environment.exec("head -c 6M /dev/urandom >big")
        snapshot = await environment.snapshot()
    with pytest.raises(SnapshotError, match=r"cannot be restored: (.*)[Nn]o space left"):
        await open_backend(backend, EnvironmentSpec(limits=ResourceLimits(disk_mib=4)), snapshot=snapshot)


async def test_sockets_and_deep_names_are_left_out_by_name(backend: str, open_backend: Opener) -> None:
    async with await open_backend(backend) as environment:
        await environment.exec(
            [
                "python3",
                "-c",
                "import os, socket\n"
                "socket.socket(socket.AF_UNIX).bind('sock')\n"
                "for _ in range(140): os.mkdir('d'); os.chdir('d')",
            ]
        )
        snapshot = await environment.snapshot()
        told = [line for line in snapshot.left_out if "sock" not in line]
        assert [line.rpartition(": ")[2] for line in told] == ["deeper than 128 directories"]
        if not backend.startswith("docker"):  # the engine leaves sockets out silently
            assert "'work/sock': cannot be read: a socket or a device" in snapshot.left_out
        async with await environment.reopen(snapshot) as fork:
            assert (await fork.exec("ls")).stdout == "d\n"


async def test_a_snapshot_of_a_lost_environment(backend: str, open_backend: Opener) -> None:
    environment = await open_backend(backend)
    await environment.close()
    with pytest.raises(SandboxLostError):
        await environment.snapshot()


async def test_concurrent_commands_and_snapshots(backend: str, open_backend: Opener) -> None:
    async with await open_backend(backend) as environment:
        await environment.exec("head -c 3000000 /dev/zero >big")
        snapshots: list[Snapshot] = []

        async def take() -> None:
            snapshots.append(await environment.snapshot())

        async with anyio.create_task_group() as task_group:
            for number in range(4):
                task_group.start_soon(take)
                task_group.start_soon(environment.exec, f"echo {number} >f{number}; head -c {number}000 /dev/zero >big")
        async with await environment.reopen(snapshots[-1]) as fork:
            assert (await fork.exec("ls big")).stdout == "big\n"


async def test_cancelling_a_fork_leaves_nothing(backend: str, open_backend: Opener, tmp_path: Path) -> None:
    async with await open_backend(backend) as environment:
        await environment.exec("head -c 3000000 /dev/urandom >big")
        before = len(os.listdir("/proc/self/fd"))
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as task_group:

                async def cancel() -> None:
                    scope.cancel()

                task_group.start_soon(cancel)
                async with environment.fork(2):
                    pass
        assert scope.cancelled_caught
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # the connection pool of the engine's client may grow
        assert (await environment.exec("ls")).stdout == "big\n"
