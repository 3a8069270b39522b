"""`unsafe-local` alone: removing a directory tree that a command has made hard to remove."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from agentkit_environments import EnvironmentSpec, reap
from agentkit_environments.local import LocalEnvironment

pytestmark = pytest.mark.anyio

NEST = """
import os
for name in ["long" * 60] * 40 + ["d"] * 1500:
    os.mkdir(name)
    os.chdir(name)
open("file", "w").close()
os.symlink("/etc", "link")
os.chmod(".", 0)
"""


@pytest.mark.parametrize("by_reaping", [False, True])
async def test_a_deep_tree_without_permissions_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_reaping: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = LocalEnvironment(EnvironmentSpec(), "deep")
    assert (await environment.exec(["python3", "-c", NEST])).exit_code == 0
    if by_reaping:
        assert await reap("deep") == 1
    await environment.close()
    assert os.listdir(tmp_path) == []
