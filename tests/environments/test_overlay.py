"""A folder of the host under an overlay: what commands see of it, what they cannot reach, what comes back."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    ResourceLimits,
    SandboxUnavailableError,
    UnsafeArchiveError,
)
from agentkit_environments.executor import OPAQUE
from agentkit_environments.overlay import Overlay, owner_in_sandbox
from agentkit_environments.process import Launcher, ProcessEnvironment, launcher_failure

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]
HIDDEN = (".env", ".git", "build/out", "deep/er/secret", "node_modules", "sock")


@pytest.fixture(params=["bwrap", "unshare"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    chosen: Launcher = request.param
    reason = launcher_failure(chosen)
    if reason is not None:
        pytest.skip(f"process-{chosen}: {reason}")
    return chosen


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of the user that only the user can enter, with a socket on which a program of the user listens."""
    tmp_path.chmod(0o700)
    root = tmp_path / "it's: mine,\\ \n\udcff"
    for path in (".env", ".git/config", "node_modules/a/b", "build/out", "build/kept", "deep/er/secret", "deep/er/a"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("SECRET" if path in HIDDEN else "kept\n")
    for path in ("a.txt", "src/one.py", "src/two.py", "old/file"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(f"{path}\n")
    (root / "a.txt").chmod(0o600)
    (root / "src").chmod(0o700)
    (root / "link").symlink_to("src/one.py")
    here = Path.cwd()
    os.chdir(root)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("sock")
            server.listen()
            os.chdir(here)
            yield root
    finally:
        os.chdir(here)


async def opened(folder: Path, launcher: Launcher, **limits: int) -> ProcessEnvironment:
    overlay = Overlay(str(folder), HIDDEN)
    return await ProcessEnvironment.open(
        EnvironmentSpec(limits=ResourceLimits(**limits)), "tests", launcher=launcher, overlay=overlay
    )


def look(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return everything about every entry of a folder that a write could change."""
    found: dict[str, tuple[object, ...]] = {}
    for parent, directories, names in os.walk(folder):
        for name in [*directories, *names, "."]:
            path = Path(parent, name)
            info = path.lstat()
            content = path.read_bytes() if path.is_file() else None
            found[str(path)] = (info.st_mode, info.st_uid, info.st_ino, info.st_mtime_ns, info.st_ctime_ns, content)
    return found


async def run(env: Environment, command: str) -> str:
    result = await env.exec(command, timeout_s=60)
    return result.stdout + result.stderr


async def upper(env: ProcessEnvironment) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the kind of each entry of the upper layer that is not merely above another one."""
    exported = await env.export_upper()
    kinds = {tarfile.REGTYPE: "file", tarfile.SYMTYPE: "link", tarfile.CHRTYPE: "whiteout", tarfile.DIRTYPE: "dir"}
    found = {}
    with tarfile.open(fileobj=io.BytesIO(exported.data)) as tar:
        for entry in tar:
            found[entry.name] = "opaque" if entry.pax_headers.get(OPAQUE) == "y" else kinds[entry.type]
    used = {name.rpartition("/")[0] for name in found}
    return {name: kind for name, kind in found.items() if kind != "dir" or name not in used}, exported.dropped


async def test_commands_see_the_folder_without_what_is_hidden(folder: Path, launcher: Launcher) -> None:
    there = look(folder)
    async with await opened(folder, launcher) as env:
        found = await run(env, "find . -mindepth 1 | sort; cat a.txt link; ls -ld src deep/er")
        assert found.split("\ndrwx")[0].splitlines() == [
            *("./a.txt", "./build", "./build/kept", "./deep", "./deep/er", "./deep/er/a", "./link", "./old"),
            *("./old/file", "./src", "./src/one.py", "./src/two.py", "a.txt", "src/one.py"),
        ]
        assert found.splitlines()[-1].startswith("drwx------") and "agent" in found.splitlines()[-1]
        assert await env.read_file("a.txt") == b"a.txt\n"
        await env.write_file("a.txt", "changed\n")
        changed = (
            "echo x >> src/one.py; chmod 700 src/two.py; rm -r old; mkdir old; touch old/new; rm link; mv build b2"
        )
        assert await run(env, changed) == ""
        assert await upper(env) == (
            {
                "a.txt": "file",
                "src/one.py": "file",
                "src/two.py": "file",
                "old": "opaque",
                "old/new": "file",
                "link": "whiteout",
                "build": "whiteout",
                "b2/kept": "file",
                "deep/er": "dir",
            },
            (),
        )
    assert look(folder) == there


async def test_what_is_hidden_stays_out_of_reach(folder: Path, launcher: Launcher) -> None:
    there = look(folder)
    attack = """
import ctypes, os, socket, subprocess
libc = ctypes.CDLL(None, use_errno=True)
seen = []
def attempt(call):
    try:
        call()
    except OSError:
        return
    seen.append(call.__name__)
def umounts(): libc.umount2(b'/workspace', 2) and os.stat('/missing')
def mounts(): libc.mount(b'/workspace', b'/tmp', None, 4096, None) and os.stat('/missing')
def whiteout(): os.mknod('zero', 0o20000, 0)
def opaque(): os.setxattr('src', 'trusted.overlay.opaque', b'y')
def redirect(): os.mkdir('r'); os.setxattr('r', 'user.overlay.redirect', b'/node_modules')
def metacopy(): open('m', 'w').close(); os.setxattr('m', 'user.overlay.metacopy', b''); open('m').read()
def connects(): socket.socket(socket.AF_UNIX).connect('sock')
def stage(): os.listdir('/tmp/upper')
def descriptors(): os.listdir('/proc/1/fd')
def root(): os.listdir('/proc/1/root')
for call in (umounts, mounts, whiteout, opaque, connects, stage, descriptors, root):
    attempt(call)
attempt(redirect); attempt(metacopy)
for name in ('.env', 'node_modules', 'deep/er/secret', '.git'):
    os.mkdir(name); os.rmdir(name); os.symlink(name, 'to'); os.unlink('to')
    if os.path.lexists(name): seen.append(name)
os.rename('deep/er/a', 'moved'); subprocess.run(['rm', '-r', 'deep']); os.makedirs('deep/er')
found = subprocess.run('grep -rl SECRET /workspace /dev/shm /opt/agentkit /home /var; ls -A r deep/er; cat m; '
    'ls -d .env .git node_modules', shell=True, capture_output=True)
seen = [each for each in seen if each not in ('redirect', 'metacopy')]
print(seen, found.stdout)
"""
    async with await opened(folder, launcher) as env:
        await env.write_file("/tmp/attack.py", attack)
        assert await run(env, "python3 /tmp/attack.py") == "[] b'deep/er:\\n\\nr:\\n'\n"
    assert look(folder) == there


async def test_new_entries_at_hidden_names_do_not_come_back(folder: Path, launcher: Launcher) -> None:
    async with await opened(folder, launcher) as env:
        await run(
            env, "echo mine > .env; mkdir node_modules; seq 60000 | (cd node_modules && xargs touch); echo x > ok"
        )
        found, dropped = await upper(env)
        assert "ok" in found and not {".env", "node_modules"} & found.keys()
        assert sorted(dropped) == [
            "'.env': new, but a hidden entry has this name",
            "'node_modules': new, but a hidden entry has this name",
        ]
    assert (folder / ".env").read_text() == "SECRET"


async def test_special_files_are_left_out(folder: Path, launcher: Launcher) -> None:
    async with await opened(folder, launcher) as env:
        code = "import os, socket; os.mkfifo('src/pipe'); socket.socket(socket.AF_UNIX).bind('s')"
        assert (
            await run(env, f'rm a.txt; python3 -c "{code}"; mkfifo a.txt; rm -r src/one.py; ln -s /etc src/one.py')
            == ""
        )
        found, dropped = await upper(env)
        assert found["src/one.py"] == "link"
        assert sorted(dropped) == [f"{name!r}: a pipe, a socket or a device" for name in ("a.txt", "s", "src/pipe")]


async def test_a_directory_that_becomes_a_link_leads_nowhere(folder: Path, launcher: Launcher) -> None:
    there = look(folder)
    async with await opened(folder, launcher) as env:
        said = await run(env, "rm -r src; ln -s /etc src; echo evil > src/passwd; ln -s / up; cat up/workspace/.env")
        assert said.count("Read-only file system") + said.count("Permission denied") == 1 and "SECRET" not in said
        found, _ = await upper(env)
        assert found["src"] == found["up"] == "link"
    assert look(folder) == there


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("mkdir many && cd many && seq 60000 | xargs touch", "more than 50000 entries"),
        ("truncate -s 200M one two", "more than 268435456 bytes"),
    ],
)
async def test_too_many_changes_are_an_error_and_not_a_flood(
    folder: Path, launcher: Launcher, command: str, reason: str
) -> None:
    async with await opened(folder, launcher) as env:
        assert await run(env, command) == ""
        with pytest.raises(UnsafeArchiveError, match=f"the changes are too large: {reason}"):
            await env.export_upper()


async def test_changes_are_bounded_as_a_work_directory_is(folder: Path, launcher: Launcher) -> None:
    async with await opened(folder, launcher, disk_mib=8) as env:
        assert "No space left" in await run(env, "head -c 9000000 /dev/zero > large")
        assert "No space left" in await run(env, "rm -f large; seq 3000 | xargs touch")


async def test_a_hidden_entry_that_has_gone_meanwhile(folder: Path, launcher: Launcher) -> None:
    (folder / "deep" / "er" / "secret").unlink()
    (folder / "deep" / "er" / "a").unlink()
    (folder / "deep" / "er").rmdir()
    (folder / "deep").rmdir()
    async with await opened(folder, launcher) as env:
        assert await run(env, "cat a.txt") == "a.txt\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="not applicable: needs root to give files to another user")
async def test_root_works_on_the_folder_of_another_user(folder: Path, launcher: Launcher) -> None:
    for parent, directories, names in os.walk(folder):
        for name in [".", *directories, *names]:
            os.lchown(f"{parent}/{name}", 54321, 54322)
    assert owner_in_sandbox(str(folder)) == (54321, 54322)
    there = look(folder)
    async with await opened(folder, launcher) as env:
        assert (
            await run(env, "cat a.txt && echo x >> a.txt && stat -c %U:%G a.txt src")
            == "a.txt\nagent:agent\nagent:agent\n"
        )
    assert look(folder) == there


async def test_where_there_can_be_no_overlay_the_reason_is_given(folder: Path) -> None:
    if (reason := launcher_failure("bwrap-plain")) is not None:
        pytest.skip(f"process-bwrap-plain: {reason}")
    with pytest.raises(SandboxUnavailableError, match="permits no mounts"):
        await opened(folder, "bwrap-plain")
    with pytest.raises(SandboxUnavailableError, match="the sandbox did not start"):
        await ProcessEnvironment.open(EnvironmentSpec(), "tests", launcher="bwrap", overlay=Overlay("/proc/1"))


async def test_without_an_overlay_there_is_no_upper_layer(launcher: Launcher) -> None:
    async with await ProcessEnvironment.open(EnvironmentSpec(), "tests", launcher=launcher) as env:
        with pytest.raises(ValueError, match="use export_dir"):
            await env.export_upper()
