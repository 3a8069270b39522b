"""Finding, making and removing control groups, in directories that look like the kernel's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agentkit_environments import ResourceLimits
from agentkit_environments.cgroups import PREFIX, CommandGroup, Hierarchy, hierarchies, reap_groups, remove_orphans
from agentkit_environments.owner import owner_token

LIMITS = ResourceLimits(memory_mib=100, processes=20, cpus=0.5)
V2 = frozenset([""])


def proc(path: Path, mountinfo: str, cgroup: str) -> Path:
    path.mkdir()
    (path / "mountinfo").write_text(mountinfo)
    (path / "cgroup").write_text(cgroup)
    return path


def test_a_version_2_machine(tmp_path: Path) -> None:
    line = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n24 1 8:1 / / rw - ext4 /dev/vda rw\n"
    own = "/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope"
    (found,) = hierarchies(proc(tmp_path / "p", line, f"0::{own}\n"))
    assert found == Hierarchy(2, V2, Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup" + own))
    assert found.parent == Path("/sys/fs/cgroup" + own).parent
    (root,) = hierarchies(proc(tmp_path / "r", line, "0::/\n"))
    assert root.parent == root.own == Path("/sys/fs/cgroup")


def test_a_version_1_machine_has_a_hierarchy_for_each_controller(tmp_path: Path) -> None:
    mounts = (
        "31 24 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "32 24 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
        "33 24 0:29 /docker/abc /sys/fs/cgroup/mem\\040ory rw - cgroup cgroup rw,memory\n"
        "34 24 0:30 /other /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
    )
    groups = "4:pids:/elsewhere\n3:memory:/docker/abc/job\n2:cpu,cpuacct:/a\n0::/b\n"
    found = {str(h.own): h for h in hierarchies(proc(tmp_path / "p", mounts, groups))}
    assert set(found) == {
        "/sys/fs/cgroup/unified/b",
        "/sys/fs/cgroup/cpu,cpuacct/a",
        "/sys/fs/cgroup/mem ory/job",  # without pids: its subtree with this process is not mounted
    }
    memory = found["/sys/fs/cgroup/mem ory/job"]
    assert (memory.version, memory.controllers, memory.parent) == (1, frozenset(["memory"]), memory.own)


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    assert hierarchies(tmp_path / "nothing") == []
    assert hierarchies(proc(tmp_path / "p", "24 1 8:1 / / rw - ext4 /dev/vda rw\n", "")) == []
    group = CommandGroup.create(LIMITS, [])
    assert (group.directories, group.procs_fds, group.bounds_memory) == ([], [], False)
    assert group.host_failure() is None
    group.remove()


def fake_group_files(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Give every new directory these files, as a cgroup file system does, and remove them with it."""
    make, remove = Path.mkdir, Path.rmdir

    def mkdir(self: Path) -> None:
        make(self)
        for name in names:
            (self / name).write_text("")

    def rmdir(self: Path) -> None:
        for file in self.iterdir():
            file.unlink()
        remove(self)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)


def test_version_2_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "slice" / "harness.scope"
    own.mkdir(parents=True)
    (own.parent / "cgroup.subtree_control").write_text("")
    (own / "memory.events.local").write_text("low 0\noom 0\noom_kill 3\noom_group_kill 0\n")
    fake_group_files(monkeypatch, "cgroup.procs", "memory.max", "memory.swap.max", "pids.max", "cpu.max")
    group = CommandGroup.create(LIMITS, [Hierarchy(2, V2, tmp_path, own)])
    (path,) = group.directories
    assert path.parent == own.parent
    assert (path / "memory.max").read_text() == str(100 << 20)
    assert (path / "memory.swap.max").read_text() == "0"
    assert (path / "pids.max").read_text() == "21"
    assert (path / "cpu.max").read_text() == "50000 100000"
    assert len(group.procs_fds) == 1
    assert group.bounds_memory
    assert group.host_failure() is None
    (own / "memory.events.local").write_text("oom 1\noom_kill 4\n")
    assert "host ran out of memory" in str(group.host_failure())
    group.remove()
    assert group.procs_fds == []
    assert not path.exists()


def test_a_group_without_controllers_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    fake_group_files(monkeypatch, "cgroup.procs")
    group = CommandGroup.create(LIMITS, [Hierarchy(2, V2, tmp_path, own)])
    assert (group.directories, group.procs_fds, group.bounds_memory) == ([], [], False)
    assert list(tmp_path.glob(PREFIX + "*")) == []


def test_version_1_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    names = ("cgroup.procs", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    fake_group_files(monkeypatch, *names)
    found = [Hierarchy(1, frozenset([name]), tmp_path, tmp_path) for name in ("memory", "freezer")]
    group = CommandGroup.create(LIMITS, found)
    (path,) = group.directories
    assert [(path / name).read_text() for name in names] == ["", str(100 << 20), str(100 << 20)]
    assert group.bounds_memory
    group.remove()


def test_only_groups_of_dead_harnesses_of_this_machine_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine, pid, start = owner_token().split("/")
    names = {
        f"{PREFIX}{machine}~{dead.pid}~1-aa": False,
        f"{PREFIX}{machine}~{pid}~{start}1-bb": False,  # the same number, but another process
        f"{PREFIX}{machine}~{pid}~{start}-cc": True,
        f"{PREFIX}elsewhere~{dead.pid}~1-dd": True,
        f"{PREFIX}x": True,
        f"{PREFIX}{machine}~abc~1-ee": True,
        "somebody-elses": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    assert remove_orphans(tmp_path) == 2
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert remove_orphans(tmp_path / "missing") == 0
    assert reap_groups() >= 0
