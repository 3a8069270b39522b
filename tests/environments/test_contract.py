"""The contract of an environment, tested on every backend that works here."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import tarfile
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    ExecResult,
    FileTooLargeError,
    OutputStream,
    ResourceLimits,
    SandboxLostError,
    UnsafeArchiveError,
    UnsafePathError,
    reap,
)

if TYPE_CHECKING:
    from tests.conftest import Tag
    from tests.environments.conftest import Opener

pytestmark = pytest.mark.anyio


async def test_a_command_reports_output_and_exit_code(env: Environment) -> None:
    result = await env.exec("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
    assert not result.timed_out
    assert not result.truncated
    assert 0 < result.duration_s < 30


async def test_an_argument_vector_is_not_read_by_a_shell(env: Environment) -> None:
    result = await env.exec(["printf", "%s|", "$HOME", "a b", "*"])
    assert result.stdout == "$HOME|a b|*|"


async def test_standard_input(env: Environment) -> None:
    assert (await env.exec("cat", stdin="héllo")).stdout == "héllo"
    assert (await env.exec("wc -c", stdin=b"x" * 3_000_000)).stdout.strip() == "3000000"
    assert (await env.exec("cat")).stdout == ""
    assert (await env.exec("true", stdin=b"x" * 3_000_000)).exit_code == 0


async def test_commands_start_in_the_work_directory(env: Environment) -> None:
    assert (await env.exec("pwd")).stdout == "/workspace\n"
    await env.write_file("cwd/deep/file", "")
    assert (await env.exec("pwd", cwd="cwd/deep")).stdout == "/workspace/cwd/deep\n"
    assert (await env.exec(["pwd"], cwd="/workspace/cwd")).stdout == "/workspace/cwd\n"
    with pytest.raises(FileNotFoundError):
        await env.exec("pwd", cwd="cwd/missing")
    with pytest.raises(NotADirectoryError):
        await env.exec("pwd", cwd="cwd/deep/file")


async def test_variables(env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_SECRET", "secret")
    result = await env.exec('echo "$FROM_SPEC $OWN ${HARNESS_SECRET-unset} $HOME"', env={"OWN": "a b"})
    assert result.stdout == "spec a b unset /workspace\n"
    assert (await env.exec("echo $FROM_SPEC", env={"FROM_SPEC": "call"})).stdout == "call\n"


async def test_only_docker_runs_commands_as_another_user(env: Environment) -> None:
    if env.backend == "docker":
        assert (await env.exec("id -u", user="0:0")).stdout == "0\n"
        assert (await env.exec("id -u")).stdout == "1000\n"
    else:
        with pytest.raises(ValueError, match="docker backend"):
            await env.exec("id -u", user="0:0")


async def test_python3_is_modern(env: Environment) -> None:
    result = await env.exec(["python3", "-c", "import sys, json, ssl; print(sys.version_info >= (3, 11))"])
    assert result.stdout == "True\n", result.stderr


async def test_a_program_that_cannot_start_has_a_shells_exit_code(env: Environment) -> None:
    missing = await env.exec(["no-such-program"])
    assert missing.exit_code == 127
    assert "not found" in missing.stderr
    await env.write_file("not-executable", "x")
    assert (await env.exec(["./not-executable"])).exit_code == 126
    assert (await env.exec("kill -KILL $$")).exit_code == 137


@pytest.mark.parametrize("command", ["", [], [""], ["a\0b"], "a\0b", "echo \ud800"])
async def test_a_malformed_command_is_refused(env: Environment, command: str | list[str]) -> None:
    if command == "":
        assert (await env.exec("")).exit_code == 0
        return
    with pytest.raises(ValueError, match="command"):
        await env.exec(command)
    with pytest.raises(ValueError, match="env"):
        await env.exec("true", env={"A=B": "c"})


async def test_a_timeout_kills_the_whole_tree(env: Environment, tag: Tag) -> None:
    daemon = f"import os; os.fork() or os.setsid() or os.fork() or os.execvp('sleep', ['sleep', '{tag.value}'])"
    await env.write_file("daemon.py", daemon)
    started = time.monotonic()
    result = await env.exec(
        f"echo before; sleep {tag.value} & setsid sleep {tag.value} & python3 daemon.py; sleep {tag.value}",
        timeout_s=1.5,
    )
    assert result.timed_out
    assert result.exit_code == 137
    assert result.stdout == "before\n"
    assert time.monotonic() - started < 8
    assert tag.alive() == 0


async def test_output_is_bounded_and_says_where_it_was_cut(env: Environment) -> None:
    result = await env.exec("printf start; head -c 100000 /dev/zero | tr '\\0' x; printf end", max_output_bytes=100)
    assert result.truncated
    assert result.stdout.startswith("startxx")
    assert result.stdout.endswith("xxend")
    assert "\n[... 99908 bytes cut ...]\n" in result.stdout
    exact = await env.exec("printf 0123456789", max_output_bytes=10)
    assert (exact.stdout, exact.truncated) == ("0123456789", False)


async def test_an_endless_line_takes_bounded_memory(env: Environment) -> None:
    size = 1 << 30
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = await env.exec(f"head -c {size} /dev/zero", max_output_bytes=1000, timeout_s=120)
    assert result.exit_code == 0
    assert f"[... {size - 1000} bytes cut ...]" in result.stdout
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 << 10


async def test_invalid_utf8_is_replaced(env: Environment) -> None:
    assert (await env.exec("printf 'a\\377\\376b'")).stdout == "a\ufffd\ufffdb"


UNTIL_GO = "while ! [ -e go ]; do sleep 0.01; done; rm go"


class Heard:
    """Output that came while a command ran; the file `go`, for which the command waits, is written at a given text."""

    def __init__(self, env: Environment, answers: dict[str, str] | None = None) -> None:
        self.calls: list[tuple[OutputStream, str]] = []
        self._env, self._answers, self._tasks = env, answers or {}, anyio.create_task_group()

    def text(self, stream: OutputStream) -> str:
        return "".join(text for each, text in self.calls if each == stream)

    def __call__(self, stream: OutputStream, text: str) -> None:
        self.calls.append((stream, text))
        if self.text(stream) == self._answers.get(stream):
            self._tasks.start_soon(self._env.write_file, "go", "")

    async def exec(self, command: str, **options: Any) -> ExecResult:
        with anyio.fail_after(60):
            async with self._tasks:
                result = await self._env.exec(command, on_output=self, **options)
        assert (self.text("stdout"), self.text("stderr")) == (result.stdout, result.stderr)
        return result


async def test_output_comes_while_the_command_runs(env: Environment) -> None:
    heard = Heard(env, {"stdout": "one\n", "stderr": "two\n"})
    result = await heard.exec(f"echo one; {UNTIL_GO}; echo two >&2; {UNTIL_GO}; echo three; exit 4")
    assert (result.stdout, result.stderr, result.exit_code) == ("one\nthree\n", "two\n", 4)
    assert heard.calls[:2] == [("stdout", "one\n"), ("stderr", "two\n")]


async def test_output_of_a_short_command_comes_at_its_end(env: Environment) -> None:
    heard = Heard(env)
    await heard.exec("echo out; echo err >&2", stdin=b"x" * 100_000)
    assert sorted(heard.calls) == [("stderr", "err\n"), ("stdout", "out\n")]
    heard = Heard(env)
    assert (await heard.exec("true")).exit_code == 0
    assert heard.calls == []
    heard = Heard(env)
    assert "not found" in (await heard.exec("no-such-program")).stderr


async def test_live_output_is_decoded_across_chunks(env: Environment) -> None:
    heard = Heard(env, {"stdout": "a\ufffdb"})
    result = await heard.exec(f"printf 'a\\377b\\303'; {UNTIL_GO}; printf '\\251c\\342\\202'")
    assert result.stdout == "a\ufffdbéc\ufffd"
    assert heard.calls[0] == ("stdout", "a\ufffdb")


async def test_names_of_the_host_do_not_come_in_two_parts(env: Environment) -> None:
    heard = Heard(env, {"stderr": "first half"})
    halves = 'printf "in %s" "${PWD%??}"; printf "first half" >&2', 'printf "%s!\n" "${PWD#"${PWD%??}"}"'
    assert (await heard.exec(f"{halves[0]}; {UNTIL_GO}; {halves[1]}")).stdout == "in /workspace!\n"
    result = await Heard(env).exec("for i in 1 2 3; do echo $PWD/$i /tmp/$i /tmp/x/tmp /tm; sleep 0.06; done")
    assert result.stdout == "".join(f"/workspace/{i} /tmp/{i} /tmp/x/tmp /tm\n" for i in (1, 2, 3))


async def test_live_output_of_a_flood_is_bounded(env: Environment) -> None:
    flood = "head -c 300000 /dev/zero | tr '\\0' x; printf é"
    heard = Heard(env, {"stdout": "start" + "x" * 495})
    result = await heard.exec(f"printf start; {flood}; {UNTIL_GO}; {flood}; printf end", max_output_bytes=1000)
    assert result.truncated and result.stdout.endswith("xéend")
    assert "".join(text for _, text in heard.calls[:-1]) == "start" + "x" * 495
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heard = Heard(env)
    assert (await heard.exec("yes", timeout_s=1)).timed_out
    assert len(heard.calls) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 << 10


async def test_floods_do_not_hold_up_other_commands(env: Environment, tag: Tag) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(partial(Heard(env).exec, f"sleep {tag.value} & yes"))
        await anyio.to_thread.run_sync(tag.wait, 4)
        with anyio.fail_after(30):
            for number in range(20):
                heard = Heard(env)
                assert (await heard.exec(f"echo {number}")).stdout == f"{number}\n"
        tasks.cancel_scope.cancel()
    assert tag.alive() == 0


async def test_live_output_ends_with_a_cancellation(env: Environment, tag: Tag) -> None:
    calls = []

    def stop(stream: OutputStream, text: str) -> None:
        calls.append(text)
        scope.cancel()

    with anyio.fail_after(30), anyio.CancelScope() as scope:
        await env.exec(f"sleep {tag.value} & while :; do echo again; done", on_output=stop)
    assert scope.cancelled_caught
    assert tag.alive() == 0
    heard = len(calls)  # more than one if several chunks arrived together
    assert (await Heard(env).exec("echo fine")).stdout == "fine\n"
    assert len(calls) == heard


async def test_an_exception_of_the_listener_kills_the_command(env: Environment, tag: Tag) -> None:
    def fail(stream: OutputStream, text: str) -> None:
        raise TimeoutError(text)

    with anyio.fail_after(30):
        with pytest.raises(TimeoutError, match="ready"):
            await env.exec(f"echo ready; sleep {tag.value}", on_output=fail)
        assert tag.alive() == 0
        with pytest.raises(TimeoutError, match="at the end"):
            await env.exec("echo at the end", on_output=fail)
    assert (await env.exec("echo fine")).stdout == "fine\n"


async def test_a_timeout_keeps_the_live_output(env: Environment) -> None:
    heard = Heard(env)
    result = await heard.exec("echo before; sleep 60", timeout_s=1)
    assert result.timed_out
    assert heard.calls == [("stdout", "before\n")]


async def test_background_processes_live_on_until_kill_all(env: Environment, tag: Tag) -> None:
    result = await env.exec(
        f"sleep {tag.value} >/dev/null 2>&1 & setsid sleep {tag.value} & echo started", timeout_s=20
    )
    assert (result.stdout, result.timed_out) == ("started\n", False)
    tag.wait(2)
    await env.write_file("kept", "kept")
    await env.kill_all()
    assert tag.alive() == 0
    assert (await env.exec("cat kept")).stdout == "kept"


async def test_commands_run_side_by_side(env: Environment) -> None:
    count = 32
    results: dict[int, str] = {}

    async def run(number: int) -> None:
        results[number] = (await env.exec(f"echo {number}; sleep 0.3")).stdout

    started = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(run, number)
    assert results == {number: f"{number}\n" for number in range(count)}
    assert time.monotonic() - started < count * 0.3


async def test_cancellation_kills_the_command_and_leaves_the_environment_usable(env: Environment, tag: Tag) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(env.exec, f"sleep {tag.value} & sleep {tag.value}")
        await anyio.to_thread.run_sync(tag.wait, 2)
        started = time.monotonic()
        tasks.cancel_scope.cancel()
    assert time.monotonic() - started < 1
    assert tag.alive() == 0
    assert (await env.exec("echo fine")).stdout == "fine\n"


async def test_files_round_trip(env: Environment) -> None:
    data = bytes(range(256)) * 1000
    await env.write_file("files/a/b.bin", data)
    assert await env.read_file("files/a/b.bin") == data
    assert await env.read_file("/workspace/files/a/../a/b.bin") == data
    await env.write_file("files/text", "grüße")
    assert await env.read_file("files/text") == "grüße".encode()
    assert (
        await env.exec("cat files/text && stat -c %a files/text && echo more >> files/a/b.bin")
    ).stdout == "grüße644\n"
    await env.exec("chmod 755 files/text")
    await env.write_file("files/text", "x")
    assert (await env.exec("stat -c %a:%s files/text && touch files/new")).stdout == "755:1\n"
    await env.write_file("/tmp/outside/file", "tmp")
    assert await env.read_file("/tmp/outside/file") == b"tmp"
    assert (await env.exec("cat /tmp/outside/file")).stdout == "tmp"


async def test_file_errors(env: Environment) -> None:
    await env.write_file("errors/file", "0123456789")
    await env.exec("mkfifo errors/pipe; ln -s loop errors/loop; ln -s file errors/link")
    assert await env.read_file("errors/link", max_bytes=10) == b"0123456789"
    with pytest.raises(FileTooLargeError, match="more than 9"):
        await env.read_file("errors/file", max_bytes=9)
    with pytest.raises(FileNotFoundError):
        await env.read_file("errors/missing")
    with pytest.raises(IsADirectoryError):
        await env.read_file("errors")
    with pytest.raises(IsADirectoryError):
        await env.write_file("errors", "x")
    with pytest.raises(NotADirectoryError):
        await env.write_file("errors/file/below", "x")
    with pytest.raises(NotADirectoryError):
        await env.write_file("errors/file/far/below", "x")
    with pytest.raises(OSError, match="File name too long"):
        await env.write_file("x" * 300, "x")
    with anyio.fail_after(20):
        with pytest.raises(OSError, match="not a regular file"):
            await env.read_file("errors/pipe")
        with pytest.raises(OSError):
            await env.write_file("errors/pipe", "x")
    for path in ("", "a\0b", "a\ud800b", "errors/loop"):
        with pytest.raises(UnsafePathError):
            await env.read_file(path)
    for path in ("/etc/x", "/usr/x", "/x/y"):
        with pytest.raises(OSError) as error:
            await env.write_file(path, "x")
        assert error.value.errno in {13, 30}


async def test_a_link_never_leads_to_the_host(env: Environment, tmp_path_factory: pytest.TempPathFactory) -> None:
    if env.backend == "unsafe-local":
        pytest.skip("unsafe-local does not isolate")
    secret = tmp_path_factory.mktemp("secret") / "file"
    secret.write_text("secret")
    await env.exec(f"ln -sfn {secret.parent} out; ln -sf {secret} link; ln -sf /etc/shadow shadow")
    for path in ("link", "out/file", str(secret)):
        with pytest.raises(FileNotFoundError):
            await env.read_file(path)
    with pytest.raises(OSError):
        assert b"root:" not in await env.read_file("shadow")
        raise FileNotFoundError
    with contextlib.suppress(OSError):
        await env.write_file("link", "changed")
    assert secret.read_text() == "secret"


async def test_directories_round_trip(env: Environment) -> None:
    await env.exec("mkdir -p dir/sub/empty && echo hi > dir/sub/f && chmod 755 dir/sub/f && ln -s sub/f dir/link")
    await env.exec("ln -s . dir/here; ln -s dir to-dir")
    data = (await env.export_dir("dir")).data
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["here", "link", "sub", "sub/empty", "sub/f"]
    for path in ("./dir/.", "dir//", "dir/sub/..", "dir/here", "to-dir"):
        assert (await env.export_dir(path)).data == data
    await env.import_dir("imported/here", data)
    result = await env.exec("cd imported/here && cat link && stat -c %a sub/f && ls -d sub/empty && touch sub/new")
    assert result.stdout == "hi\n755\nsub/empty\n", result.stderr
    with pytest.raises(FileNotFoundError):
        await env.export_dir("no-dir")
    with pytest.raises(NotADirectoryError):
        await env.export_dir("dir/sub/f")


async def test_what_must_not_enter_is_not_unpacked(env: Environment) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("fine"))
        archive.addfile(tarfile.TarInfo("../evil"))
    with pytest.raises(UnsafeArchiveError, match="evil"):
        await env.import_dir("refused", buffer.getvalue())
    with pytest.raises(FileNotFoundError):
        await env.read_file("refused/fine")


def tar(name: str, kind: bytes, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.size, member.linkname = kind, len(content), "target" if kind == tarfile.SYMTYPE else ""
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("there", "name", "kind"),
    [
        ("mkdir x; echo kept > x/kept", "x", tarfile.REGTYPE),
        ("mkdir x; echo kept > x/kept", "x", tarfile.SYMTYPE),
        ("echo kept > x", "x", tarfile.DIRTYPE),
        ("echo kept > x", "x/file", tarfile.REGTYPE),
        ("mkdir elsewhere; ln -s elsewhere x", "x", tarfile.DIRTYPE),
        ("mkdir elsewhere; ln -s elsewhere x", "x/file", tarfile.REGTYPE),
        ("ln -s nowhere x", "x", tarfile.DIRTYPE),
    ],
)
async def test_an_import_over_another_kind_of_entry_is_an_error(
    env: Environment, there: str, name: str, kind: bytes
) -> None:
    await env.exec(f"rm -rf conflict; mkdir conflict; cd conflict; {there}")
    look = "find conflict -printf '%p %y %l %s\n' | sort"
    before = (await env.exec(look)).stdout
    with pytest.raises(FileExistsError):
        await env.import_dir("conflict", tar(name, kind))
    assert (await env.exec(look)).stdout == before


async def test_an_import_merges_directories_and_replaces_files_and_links(env: Environment) -> None:
    await env.exec("mkdir -p merge/d; cd merge; echo kept > d/kept; echo old > d/f; echo kept > target; ln -s target l")
    await env.import_dir("merge", tar("d/f", tarfile.REGTYPE, b"new\n"))
    await env.import_dir("merge", tar("l", tarfile.REGTYPE, b"new\n"))
    assert (await env.exec("cat d/kept d/f target l", cwd="merge")).stdout == "kept\nnew\nkept\nnew\n"
    with pytest.raises(NotADirectoryError):
        await env.import_dir("merge/l", tar("f", tarfile.REGTYPE))


async def test_hard_links_with_any_names_round_trip(env: Environment) -> None:
    await env.exec("mkdir -p hard/a; cd hard; echo text > a/b; ln a/b a-b; ln a/b z")
    await env.import_dir("hard-again", (await env.export_dir("hard")).data)
    assert (await env.exec("cat a-b a/b z", cwd="hard-again")).stdout == "text\n" * 3


async def test_closing_ends_everything(backend: str, open_backend: Opener, tag: Tag) -> None:
    env = await open_backend(backend)
    await env.exec(f"sleep {tag.value} >/dev/null 2>&1 & setsid sleep {tag.value} >/dev/null 2>&1 &")
    tag.wait(2)
    await env.close()
    await env.close()
    assert tag.alive() == 0
    with pytest.raises(SandboxLostError):
        await env.exec("true")
    with pytest.raises(SandboxLostError):
        await env.read_file("x")
    with pytest.raises(SandboxLostError):
        await env.kill_all()


async def test_an_exception_inside_the_block_leaves_nothing(backend: str, open_backend: Opener, tag: Tag) -> None:
    with pytest.raises(ZeroDivisionError):
        async with await open_backend(backend) as env:
            await env.exec(f"sleep {tag.value} >/dev/null 2>&1 &")
            tag.wait(1)
            raise ZeroDivisionError
    assert tag.alive() == 0
    with anyio.move_on_after(0.2):
        async with await open_backend(backend) as env:
            await env.exec(f"sleep {tag.value}")
    assert tag.alive() == 0


async def test_disk_process_and_memory_limits(backend: str, open_backend: Opener) -> None:
    if backend == "unsafe-local":
        pytest.skip("unsafe-local has no limits")
    limits = ResourceLimits(memory_mib=256, processes=64, file_size_mib=8, disk_mib=16)
    async with await open_backend(backend, EnvironmentSpec(limits=limits)) as env:
        too_large = await env.exec("head -c 9M /dev/zero > big; stat -c %s big; rm big")
        assert too_large.stdout == f"{8 << 20}\n"
        full = await env.exec("for i in 1 2 3 4 5; do head -c 4M /dev/zero > f$i || exit 9; done")
        assert full.exit_code == 9
        assert "No space left" in full.stderr
        with pytest.raises(OSError, match="No space left"):
            await env.write_file("more", b"x" * (1 << 20))
        await env.exec("rm f*")
        await env.write_file("more", b"x" * (1 << 20))
        with pytest.raises(OSError, match="File too large"):
            await env.write_file("big", b"x" * (9 << 20))
        hog = await env.exec(["python3", "-c", "x = bytearray(600 << 20); print(len(x))"], timeout_s=60)
        assert hog.exit_code != 0
        await env.write_file("bomb.sh", "bomb() { bomb | bomb & }; bomb; sleep 100")
        bomb = await env.exec("bash bomb.sh", timeout_s=1)
        assert bomb.timed_out
        await env.kill_all()
        assert (await env.exec("echo alive")).stdout == "alive\n"


async def test_reap_removes_a_run_by_its_name(backend: str, open_backend: Opener, tag: Tag) -> None:
    # a process sandbox ends with its parent, so nothing is left to reap
    reaped = 0 if backend.startswith("process") else 1
    run_id = f"reap-{os.getpid()}-{tag.value}"
    env = await open_backend(backend, run_id=run_id)
    try:
        await env.exec(f"sleep {tag.value} >/dev/null 2>&1 &")
        tag.wait(1)
        assert await reap(run_id) == reaped
        assert tag.alive() == 1 - reaped
        assert await reap(run_id) == 0
    finally:
        await env.close()
