"""Exports keep what can be carried and list what they left out, for any files that commands make."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.environments.conftest import Opener

from agentkit_environments import (
    Environment,
    EnvironmentSpec,
    ExportedDir,
    ResourceLimits,
    SandboxError,
    UnsafeArchiveError,
    check_archive,
    environment,
)
from agentkit_environments.archive import MAX_ARCHIVE_BYTES, MAX_ARCHIVE_ENTRIES, drop_links, pieces
from agentkit_environments.executor import MAX_TIME, DropList, Packer, unpack

pytestmark = pytest.mark.anyio

LONG = "import os\nfor _ in range({}): os.mkdir({!r}); os.chdir({!r})\nopen('f', 'w')"


def names(exported: ExportedDir) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(exported.data)) as archive:
        return archive.getnames()


def truncate(size: int) -> str:
    return f"""python3 -c "open('big', 'w').truncate({size})" """


async def made(env: Environment, setup: str, place: str = "made") -> ExportedDir:
    """Make a directory with a file `ok`, run `setup` in it and export it; assert that the result is safe to unpack."""
    done = await env.exec(f"chmod -R u+rwx {place} 2>/dev/null; rm -rf {place}; mkdir {place}; cd {place}; {setup}")
    assert done.exit_code == 0, done.stderr
    await env.write_file(f"{place}/ok", "ok")
    exported = await env.export_dir(place)
    check_archive(exported.data)
    return exported


@pytest.mark.parametrize(
    ("setup", "kept", "dropped"),
    [
        ("ln -s /etc/passwd x", [], ["'x': a link to an absolute path"]),
        ("mkdir d; ln -s ../../.. d/x", ["d"], ["'d/x': a link that leads out"]),
        ("mkdir d; ln -s ../d d/x", ["d", "d/x"], []),
        ("ln -s x x", [], ["'x': a loop of links"]),
        ("ln -s b a; ln -s a b", [], ["'a': a loop of links", "'b': a loop of links"]),
        ("ln -s y/../../.. x; ln -s . y", ["y"], ["'x': a link that leads out"]),
        ("mkdir b; ln -s /usr/bin/python3 b/python3; ln -s python3 b/python", ["b"], ["'b/python'", "'b/python3'"]),
        ("ln -s nowhere x", ["x"], []),
        ("mkfifo x; mkdir d; mkfifo d/y", ["d"], ["'x': a pipe", "'d/y': a pipe"]),
        ("mkfifo x; ln x y", [], ["'x': a pipe", "'y': "]),
        (r"printf x > 'a b'; printf x > \"$(printf 'n\nl')\"; mkfifo \"$(printf 'f\033[31m')\"", [], [r"'f\x1b[31m'"]),
    ],
)
async def test_what_cannot_be_carried_is_left_out_and_named(
    env: Environment, setup: str, kept: list[str], dropped: list[str]
) -> None:
    exported = await made(env, setup.replace('\\"', '"'))
    assert set(kept) <= set(names(exported)) and "ok" in names(exported)
    assert len(exported.dropped) == len(dropped)
    for beginning in dropped:
        assert any(line.startswith(beginning) for line in exported.dropped), exported.dropped
    await env.import_dir("again", exported.data)
    assert await env.read_file("again/ok") == b"ok"


async def test_a_socket_is_left_out(env: Environment) -> None:
    exported = await made(env, "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('x')\"")
    assert names(exported) == ["ok"]
    # The container engine leaves sockets out silently.
    assert exported.dropped == (() if env.backend == "docker" else ("'x': a pipe, a socket or a device",))


async def test_a_venv_is_carried_except_its_absolute_links(env: Environment) -> None:
    exported = await made(env, "python3 -m venv --without-pip --symlinks v; echo 'x = 1' > v/module.py")
    assert {"v/pyvenv.cfg", "v/module.py", "v/bin/activate", "v/lib64"} <= set(names(exported))
    assert exported.dropped and all("absolute" in line for line in exported.dropped)


async def test_times_are_clamped_to_the_range_of_archives(env: Environment) -> None:
    touch = (
        "touch -d @9223372036854775807 a; touch -d @-9223372036854775808 b; touch -d @-100000000000 c; touch -d @7 d"
    )
    exported = await made(env, f"{touch}; mkdir e; touch -d @9223372036854775807 e")
    await env.import_dir("times", exported.data)
    times = (await env.exec("stat -c %Y a b c d e", cwd="times")).stdout.split()
    assert times == [str(MAX_TIME), "0", "0", "7", str(MAX_TIME)]


async def test_files_without_permissions_are_carried(env: Environment) -> None:
    setup = "mkdir -p d/e; echo x > d/e/f; chmod 000 d/e/f d/e; chmod 400 d; echo y > g; chmod 7000 g"
    exported = await made(env, setup)
    assert names(exported) == ["d", "d/e", "d/e/f", "g", "ok"] and exported.dropped == ()
    with tarfile.open(fileobj=io.BytesIO(exported.data)) as archive:
        assert [archive.getmember(name).mode for name in ("d/e/f", "g")] == [0, 0]
    there = await env.exec("stat -c %a d; chmod 700 d; stat -c %a d/e; chmod 700 d/e; stat -c %a d/e/f", cwd="made")
    assert there.stdout.split() == ["400", "0", "0"]
    await env.import_dir("opened", exported.data)
    look = await env.exec("stat -c %a d d/e d/e/f g; chmod 600 d/e/f g; cat d/e/f g; rm -r d", cwd="opened")
    assert look.stdout.split() == ["700", "700", "0", "0", "x", "y"], look.stderr


async def test_a_directory_without_permissions_is_itself_exported(env: Environment) -> None:
    await env.exec("mkdir shut; echo x > shut/f; chmod 000 shut")
    exported = await env.export_dir("shut")
    assert names(exported) == ["f"]
    assert (await env.exec("stat -c %a shut")).stdout == "0\n"


@pytest.mark.parametrize(("count", "name"), [(1200, "d"), (30, "d" * 250), (5000, "d")])
async def test_paths_too_long_or_too_deep_are_left_out(env: Environment, count: int, name: str) -> None:
    exported = await made(env, "true")
    await env.exec(["python3", "-c", LONG.format(count, name, name)], cwd="made")
    exported = await env.export_dir("made")
    check_archive(exported.data)
    assert names(exported)[-1] == "ok" and len(names(exported)) > 10
    assert len(exported.dropped) == 1 and ("deeper than 128" in exported.dropped[0] or "longer" in exported.dropped[0])
    await env.import_dir("less-deep", exported.data)
    await env.exec("rm -rf made less-deep")


async def test_names_that_are_not_utf8_survive(env: Environment) -> None:
    strange = [b"\xff", b"\xc3", b"a\n\x1b", b"\xfe" * 255]
    code = f"import os\nfor name in {strange}: open(name, 'w')\nos.symlink({strange[0]!r}, b'l')"
    exported = await made(env, "true")
    assert (await env.exec(["python3", "-c", code], cwd="made")).exit_code == 0
    exported = await env.export_dir("made")
    await env.import_dir("bytes", exported.data)
    look = await env.exec(
        ["python3", "-c", "import os; print(sorted(os.listdir(b'.')), os.readlink(b'l'))"], cwd="bytes"
    )
    assert look.stdout.strip() == f"{sorted([*strange, b'l', b'ok'])} {strange[0]!r}"


async def test_an_export_that_is_too_large_is_refused_before_packing(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "MAX_ARCHIVE_ENTRIES", 100)
    monkeypatch.setattr(environment, "MAX_ARCHIVE_BYTES", 1 << 20)
    assert len(names(await made(env, "mkdir d; touch d/$(seq -s ' d/' 98)"))) == 100
    with pytest.raises(UnsafeArchiveError, match="more than 100 entries"):
        await made(env, "mkdir d; touch d/$(seq -s ' d/' 99)")
    with pytest.raises(UnsafeArchiveError, match="more than"):
        await made(env, truncate(1048577))
    with pytest.raises(UnsafeArchiveError, match="more than"):
        await made(env, truncate(200 << 20))
    assert len((await made(env, truncate(700_000) + "; ln big a")).data) > 700_000  # a hard link is not a copy


async def test_an_executor_needs_no_more_memory_than_its_sandbox_has(backend: str, open_backend: Opener) -> None:
    spec = EnvironmentSpec(limits=ResourceLimits(memory_mib=256, disk_mib=128))
    async with await open_backend(backend, spec) as env, await open_backend(backend, spec) as other:
        await env.exec("head -c 100M /dev/zero > big; printf end >> big; mkdir d; touch d/$(seq -s ' d/' 2000)")
        exported = await env.export_dir("/workspace")
        assert len(exported.data) > 100 << 20
        await other.import_dir("/workspace", exported.data)
        look = await other.exec("stat -c %s big; tail -c 3 big; ls d | wc -l")
        assert look.stdout.split() == [f"{(100 << 20) + 3}", "end2000"], look.stderr


async def test_concurrent_and_cancelled_exports(env: Environment) -> None:
    await env.exec("mkdir side; for n in 1 2 3; do head -c 3M /dev/urandom > side/$n; done")
    alone = (await env.export_dir("side")).data
    found: list[bytes] = []

    async def export() -> None:
        found.append((await env.export_dir("side")).data)

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(export)
    assert found == [alone] * 4
    for delay_s in (0.0, 0.001, 0.01):
        with anyio.move_on_after(delay_s):
            await env.export_dir("side")
    assert (await env.export_dir("side")).data == alone


async def test_an_import_that_fails_leaves_the_sandbox_usable(env: Environment) -> None:
    await env.exec("mkdir -p stuck/f/d; touch stuck/f/d/x")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("f"))
    with pytest.raises(FileExistsError):
        await env.import_dir("stuck", buffer.getvalue())
    assert (await env.exec("echo alive")).stdout == "alive\n"


async def test_crafted_archives_are_refused_or_imported_but_never_break_a_sandbox(env: Environment) -> None:
    for headers in ({"mtime": "nan"}, {"mtime": "inf"}, {"mtime": "-1e300"}, {"size": "-1"}, {"path": "a\0b"}):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo("f")
            member.pax_headers = headers
            archive.addfile(member)
        with anyio.fail_after(20):
            try:
                await env.import_dir("crafted", buffer.getvalue())
            except (SandboxError, OSError) as error:
                assert "gone" not in str(error)
        assert (await env.exec("echo alive")).stdout == "alive\n"


# Tests without a sandbox


def pack(folder: Path, entries: int = MAX_ARCHIVE_ENTRIES, size: int = MAX_ARCHIVE_BYTES) -> ExportedDir:
    packer = Packer(str(folder), entries, size)
    data = b"".join(iter(packer.piece, b""))
    return drop_links(data, packer.drops.lines, max_entries=entries, max_bytes=size)


def test_bounds_apply_before_anything_is_read(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="more than 19 entries"):
        Packer(str(tmp_path), 19, 1 << 20)
    with pytest.raises(OSError, match="more than 2000 bytes"):
        Packer(str(tmp_path), 100, 2000)
    assert len(names(pack(tmp_path, 20, 2040))) == 20


def test_changes_between_counting_and_reading_keep_the_archive_whole(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).write_bytes(b"1234")
    packer = Packer(str(tmp_path), 100, 1 << 20)
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").unlink()
    (tmp_path / "c").unlink()
    os.mkfifo(tmp_path / "c")
    (tmp_path / "e").write_bytes(b"new")
    data = b"".join(iter(packer.piece, b""))
    assert names(ExportedDir(data)) == ["a", "d", "e"] and packer.drops.lines == ("'c': a pipe, a socket or a device",)


def test_pieces_add_up_to_the_whole_archive(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "d").mkdir(parents=True)
    (source / "big").write_bytes(os.urandom(3_500_000))
    (source / "big").chmod(0o444)
    for number in range(1_200):
        (source / "d" / f"{number}").write_bytes(b"x" * (number % 7))
    (source / "empty").touch()
    exported = pack(source)
    sizes = []
    for entries, content in pieces(exported.data, check_archive(exported.data)):
        sizes.append(len(content))
        unpack(str(target), entries, content)
    assert len(sizes) > 4 and max(sizes) <= 1 << 20
    assert pack(target).data == exported.data


def test_links_that_are_slow_to_follow_take_bounded_time(tmp_path: Path) -> None:
    for number in range(1_200):
        (tmp_path / f"{number}").symlink_to("./" * 2000 + "x")
    exported = pack(tmp_path)
    check_archive(exported.data)
    assert len(names(exported)) + len(exported.dropped) >= 1001 and "too long to follow" in exported.dropped[-2]


def test_the_list_of_dropped_entries_is_bounded() -> None:
    drops = DropList()
    for number in range(5_000):
        drops.add("x" * 10_000 + str(number), "a reason")
    assert len(drops.lines) == 1_001 and drops.lines[-1] == "... and 4000 more"
    assert max(map(len, drops.lines)) < 250 and str(number)[:2] not in drops.lines[0]


Tree = list[tuple[str, str, str]]
parts = st.sampled_from(["a", "b", "c"])
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
targets = st.lists(st.sampled_from(["a", "b", "c", "..", ".", ""]), max_size=5).map("/".join)
trees: st.SearchStrategy[Tree] = st.lists(
    st.tuples(st.sampled_from(["dir", "file", "link", "hard", "pipe", "locked"]), paths, targets), max_size=12
)


def make(root: Path, kind: str, place: Path, target: str) -> None:
    match kind:
        case "dir":
            place.mkdir()
        case "file":
            place.write_text(target)
        case "link":
            place.symlink_to(target or "x")
        case "hard":
            place.hardlink_to(root / (target or "a"))
        case "pipe":
            os.mkfifo(place)
        case "locked":
            place.chmod(0)


def build(root: Path, tree: Tree) -> None:
    for kind, path, target in tree:
        place = root / path
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if (kind == "locked") == os.path.lexists(place):
                make(root, kind, place, target)
        except (OSError, ValueError):
            continue


def contents(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[str(path.relative_to(root))] = os.readlink(path)
        elif stat.S_ISREG(mode):
            found[str(path.relative_to(root))] = (path.read_bytes(), mode)
        elif stat.S_ISDIR(mode):
            found[str(path.relative_to(root))] = None
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees)
def test_any_tree_is_exported_safely_and_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> None:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    build(source, tree)
    exported = pack(source)
    for entries, content in pieces(exported.data, check_archive(exported.data)):
        unpack(str(target), entries, content)
    before, after = contents(source), contents(target)
    missing = before.keys() - after.keys()
    assert {name: before[name] for name in after} == after
    assert all(any(line.startswith(repr(name)) for line in exported.dropped) for name in missing)
