"""The executor of a container: its program, its parser, and images that have nothing to offer it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import docker
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentkit_environments import EnvironmentSpec, open_environment
from agentkit_environments.docker import DockerEnvironment, docker_failure
from agentkit_environments.docker.attachment import Frames
from agentkit_environments.docker.executor import ARCHITECTURES, executor_program
from agentkit_environments.docker.executor.build import TARGETS, compile_executor, compiler_failure, record
from agentkit_environments.docker.hardening import EXECUTOR
from agentkit_environments.docker.users import resolve_user
from agentkit_environments.executor import FRAME

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def env(anyio_backend: str) -> AsyncIterator[DockerEnvironment]:
    reason = docker_failure()
    if reason is not None:
        pytest.skip(f"docker: {reason}")
    async with await DockerEnvironment.open(EnvironmentSpec(), "executor") as environment:
        yield environment


# The program


def test_the_programs_were_compiled_from_this_source() -> None:
    assert tuple(TARGETS) == ARCHITECTURES
    assert record() == json.loads((Path(executor_folder()) / "programs.json").read_text()), (
        "run `python -m agentkit_environments.docker.executor.build`"
    )


def executor_folder() -> str:
    from agentkit_environments.docker import executor

    assert executor.__file__ is not None
    return str(Path(executor.__file__).parent)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiling_again_gives_the_same_bytes(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = compiler_failure()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("ZIG_LOCAL_CACHE_DIR", str(tmp_path / "cache"))
    compile_executor(architecture, tmp_path / "executor")
    assert (tmp_path / "executor").read_bytes() == executor_program(architecture)


@pytest.mark.parametrize(("architecture", "machine"), [("amd64", 62), ("arm64", 183)])
def test_a_program_is_small_static_and_for_its_machine(architecture: str, machine: int) -> None:
    program = executor_program(architecture)
    assert len(program) < 200_000
    assert program[:4] == b"\x7fELF" and int.from_bytes(program[18:20], "little") == machine
    offset, size, count = (int.from_bytes(program[at : at + n], "little") for at, n in ((32, 8), (54, 2), (56, 2)))
    kinds = {int.from_bytes(program[offset + i * size :][:4], "little") for i in range(count)}
    assert 3 not in kinds, "it names a program interpreter, so it is not static"


# The parser


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@pytest.mark.docker
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(texts, max_size=5), st.dictionaries(st.from_regex(r"[a-zA-Z_é]+", fullmatch=True), texts, max_size=3))
async def test_any_texts_arrive_as_they_are(
    env: DockerEnvironment, words: list[str], variables: dict[str, str]
) -> None:
    code = "import os, sys; sys.stdout.buffer.write(b'\\0'.join([*map(os.fsencode, sys.argv[1:]), b'']))"
    code += "; sys.stderr.buffer.write(b'\\0'.join(os.environb.get(os.fsencode(n), b'') for n in sys.argv[1:]))"
    result = await env.exec(["python3", "-c", code, *words], env=variables)
    assert result.stdout == "".join(word + "\0" for word in words)
    result = await env.exec(["python3", "-c", code, *variables], env=variables)
    assert result.stderr == "\0".join(variables.values())


@pytest.mark.docker
async def test_names_that_are_not_utf8_can_be_used(env: DockerEnvironment) -> None:
    await env.write_file("a\udcff\udc80", "x")
    assert await env.read_file("a\udcff\udc80") == b"x"
    assert (await env.exec(["printf", "%s", "\udcff"])).stdout == "\ufffd"
    with pytest.raises(FileNotFoundError) as missing:
        await env.read_file("b\udcffé")
    assert missing.value.filename == "/workspace/b\udcffé"


async def ask(env: DockerEnvironment, header: bytes, body: bytes = b"") -> dict[str, Any]:
    """Send a raw frame and return the header of the reply, which no request waits for."""
    peer = env._connection._peer
    await peer.send(FRAME.pack(len(header), len(body)) + header + body)
    data = b""
    while len(data) < 8 or len(data) < 8 + sum(FRAME.unpack(data[:8])):
        data += await peer.receive()
    reply: dict[str, Any] = json.loads(data[8 : 8 + FRAME.unpack(data[:8])[0]])
    return reply


VALID = (
    '{"id": 7, "op": "read_file", "path": "/\\u00e9\\ud83d\\ude00", "max_bytes": 1e3, "l": ["a", "b"], "o": {"k": "v"}}'
)
MALFORMED = [
    "x",
    "{",
    "{}",
    "[]",
    "{}x",
    '{"id": 7, "op": 3}',
    '{"id": 7, "op": "read_file"}',
    '{"id": 7, "op": "read_file", "path": ["x"]}',
    '{"id": 7, "op": "no-such-operation"}',
    '{"id": 7, "op": "exec"}',
    '{"id": 7, "op": "exec", "argv": [], "env": {}, "cwd": "/"}',
    '{"id": 7, "op": "exec", "argv": ["true"], "env": {}}',
    '{"id": 7, "op": "exec", "argv": "true", "env": {}, "cwd": "/"}',
    '{"id": 7, "op": "exec", "argv": [1], "env": {}, "cwd": "/"}',
    '{"id": 7, "op": "exec", "argv": [["a"]], "env": {}, "cwd": "/"}',
    '{"id": 7, "op": "exec", "argv": ["true",], "env": {}, "cwd": "/"}',
    '{"id": 7, "op": "exec", "argv": ["true"], "env": {"a": 1}, "cwd": "/"}',
    '{"id": 7, "op": "read_file", "path": "\\u0000"}',
    '{"id": 7, "op": "read_file", "path": "\\ud800"}',
    '{"id": 7, "op": "read_file", "path": "\\ud800\\u0041"}',
    '{"id": 7, "op": "read_file", "path": "\\u12"}',
    '{"id": 7, "op": "read_file", "path": "\\x41"}',
    '{"id": 7, "op": "read_file", "path": "a\nb"}',
    '{"id": 7, "op": "read_file", "path": "a',
    '{"id": 7, "op": "read_file", "path": "a\\',
    '{"id": 7, "a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1, "g": 1, "h": 1, "i": 1, "j": 1, "k": 1, "l": 1, '
    '"m": 1, "n": 1, "o": 1, "p": 1, "op": "kill_all"}',
]  # fmt: skip


@pytest.mark.docker
@pytest.mark.parametrize("header", MALFORMED)
async def test_a_malformed_request_is_an_error_and_not_the_end(env: DockerEnvironment, header: str) -> None:
    assert (await ask(env, header.encode(), b"body"))["errno"] > 0
    assert (await env.exec("echo alive")).stdout == "alive\n"


@pytest.mark.docker
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(VALID)), st.integers(0, 3), st.text('"\\{}[]:, u0dc8\n\x00a1-.e', max_size=6))
async def test_any_damage_to_a_request_gets_a_reply(env: DockerEnvironment, at: int, cut: int, text: str) -> None:
    with anyio.fail_after(20):
        assert "id" in await ask(env, (VALID[:at] + text + VALID[at + cut :]).encode() or b" ")


@pytest.mark.docker
async def test_a_request_that_does_not_fit_in_memory_is_refused(env: DockerEnvironment) -> None:
    header = b'{"id": 7, "op": "write_file", "path": "/workspace/big"}'
    reply = await ask(env, header, bytes(200 << 20))
    assert (reply["errno"], reply["message"]) == (12, "too large for the sandbox's limits")
    assert (await env.exec("echo alive; ls big")).stdout == "alive\n"


@pytest.mark.docker
async def test_output_that_does_not_fit_in_memory_is_cut(env: DockerEnvironment) -> None:
    result = await env.exec("head -c 300000000 /dev/zero; printf end", max_output_bytes=1 << 30, timeout_s=60)
    assert (result.exit_code, result.truncated, result.stdout[-3:]) == (0, True, "end")
    kept = result.stdout.count("\0") + 3
    assert f"[... {300_000_003 - kept} bytes cut ...]" in result.stdout
    assert (await env.exec("echo alive")).stdout == "alive\n"


@pytest.mark.docker
async def test_chunks_leave_room_for_a_harness_that_does_not_read(env: DockerEnvironment) -> None:
    """The engine's pipes and buffers hold less than these commands write, so an executor that waits for room to send it
    does not serve the last command."""
    peer, common = env._connection._peer, {"op": "exec", "cwd": "/workspace", "env": {"PATH": "/usr/bin:/bin"}}
    write = ["/bin/sh", "-c", "head -c 400000 /dev/zero; exec sleep 60"]
    writing = [{"id": 900 + number, "argv": write, "chunks": True} for number in range(16)]
    touch = {"id": 916, "argv": ["/bin/sh", "-c", "sleep 2; head -c 10000000 /dev/zero; touch /tmp/ran"]}
    for request in [*writing, touch]:
        header = json.dumps({**common, "timeout_s": 60, "max_output_bytes": 16 << 20, **request}).encode()
        await peer.send(FRAME.pack(len(header), 0) + header)
    client = docker.from_env()
    try:
        until = ["/bin/sh", "-c", "for i in $(seq 600); do [ ! -e /tmp/ran ] || exit 0; sleep 0.05; done; exit 1"]
        assert client.containers.get(env.container_id).exec_run(until).exit_code == 0
    finally:
        client.close()
    with anyio.fail_after(60):
        await env.kill_all()
        assert (await env.exec("echo alive")).stdout == "alive\n"


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=30)), max_size=8), st.integers(1, 9))
def test_frames_of_the_engine_come_apart_at_any_cut(frames: list[tuple[int, bytes]], size: int) -> None:
    data = b"".join(bytes([stream, 0, 0, 0]) + len(text).to_bytes(4, "big") + text for stream, text in frames)
    parser, found = Frames(), {1: b"", 2: b""}
    for start in range(0, len(data), size):
        for stream, payload in parser.feed(data[start : start + size]):
            found[stream] += payload
    assert found == {stream: b"".join(text for s, text in frames if s == stream) for stream in (1, 2)}


# Images and users


def archive_of(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            tar.addfile(member, io.BytesIO(data))
    return archive.getvalue()


@pytest.fixture
def bare_image(architecture: str) -> Iterator[str]:
    """An image of one static program, without a shell, libraries or /etc."""
    client = docker.from_env()
    emulator = Path("/proc/sys/fs/binfmt_misc") / {"amd64": "qemu-x86_64", "arm64": "qemu-aarch64"}[architecture]
    # With the flag F, the kernel finds the emulator in a container, too.
    is_emulated = emulator.exists() and re.search("^flags: .*F", emulator.read_text(), re.MULTILINE)
    if architecture != client.version()["Arch"] and not is_emulated:
        client.close()
        pytest.skip(
            f"not applicable: containers for {architecture} do not run here; on Debian, "
            "`apt-get install binfmt-support qemu-user-static` lets them"
        )
    name = f"agentkit-test-{secrets.token_hex(4)}"
    layer = archive_of({"tool": executor_program(architecture)})
    layers = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
    config = json.dumps({"architecture": architecture, "os": "linux", "rootfs": layers, "config": {}})
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [f"{name}:latest"], "Layers": ["layer.tar"]}])
    image = {"layer.tar": layer, "config.json": config.encode(), "manifest.json": manifest.encode()}
    try:
        client.images.load(archive_of(image))
        yield name
        client.images.remove(name, force=True)
    finally:
        client.close()


@pytest.mark.docker
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_an_image_needs_to_have_nothing(env: DockerEnvironment, architecture: str, bare_image: str) -> None:
    async with await open_environment(EnvironmentSpec(image=bare_image), backend="docker") as bare:
        assert await bare.read_file(EXECUTOR) == executor_program(architecture)
        await bare.write_file("d/f", "text")
        assert await bare.read_file("d/f") == b"text"
        exported = await bare.export_dir(".")
        await bare.import_dir("/tmp/copy", exported.data)
        assert await bare.read_file("/tmp/copy/d/f") == b"text"
        missing = await bare.exec("true")
        assert (missing.exit_code, missing.stderr) == (127, "/bin/sh: not found\n")
        ran = await bare.exec(["/tool"], user="7:8")  # the executor itself: a program that refuses to run like this
        assert (ran.exit_code, ran.stderr[:15]) == (2, "usage: executor")
        await bare.kill_all()
        with pytest.raises(ValueError, match="no user 'root'"):
            await bare.exec(["/tool"], user="root")


@pytest.mark.docker
async def test_commands_have_the_variables_of_the_image(env: DockerEnvironment) -> None:
    client = docker.from_env()
    name = f"agentkit-test-{secrets.token_hex(4)}"
    try:
        source = client.api.create_container("agentkit-base:latest", command=["true"])["Id"]
        client.api.commit(source, name, changes="ENV OF_IMAGE='a b=c' LANG=x")
        client.api.remove_container(source)
        async with await open_environment(EnvironmentSpec(image=name), backend="docker") as other:
            found = await other.exec('echo "$OF_IMAGE|$LANG|$PATH"')
        assert found.stdout == "a b=c|C.UTF-8|/usr/local/bin:/usr/bin:/bin\n"
        client.images.remove(name)
    finally:
        client.close()


PASSWD = "root:x:0:0:root:/root:/bin/sh\ntester:x:1001:100::/:/bin/sh\n1002:x:7:8::/:\nbroken\n"
GROUP = "root:x:0:\nusers:x:100:\naudio:x:29:root,tester\nvideo:x:44:tester\nbroken:x\n"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("root", "0 0 29"),
        ("0", "0 0 29"),
        ("0:0", "0 0"),
        ("tester", "1001 100 29 44"),
        ("tester:video", "1001 44"),
        ("tester:12", "1001 12"),
        ("1001", "1001 100 29 44"),
        ("1002", "7 8"),
        ("1234", "1234 0"),
        ("1234:5", "1234 5"),
    ],
)
def test_a_user_is_found_as_the_engine_finds_it(user: str, expected: str) -> None:
    assert " ".join(resolve_user(user, PASSWD, GROUP)) == expected


@pytest.mark.parametrize("user", ["nobody", "", "root:nobody", ":0", "-1", "²", "99999999999", "0:-1"])
def test_a_user_that_does_not_exist_is_refused(user: str) -> None:
    with pytest.raises(ValueError, match=r"the image has no (user|group)"):
        resolve_user(user, PASSWD, GROUP)


@pytest.mark.docker
async def test_a_command_has_the_groups_of_its_user(env: DockerEnvironment) -> None:
    assert (await env.exec("id -u; id -g; id -G", user="1000:5")).stdout == "1000\n5\n5\n"
    assert (await env.exec("id -u; id -g; id -G", user="agent")).stdout == "1000\n1000\n1000\n"
