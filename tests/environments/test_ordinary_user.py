"""As root, the tests of the process sandbox run a second time, with an ordinary user as the harness."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import agentkit_environments
from agentkit_environments.process import LAUNCHERS, launcher_failure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")
@pytest.mark.parametrize(
    "file", ["test_contract.py", "test_escape.py", "test_crash.py", "test_survival.py", "test_overlay.py"]
)
def test_the_same_as_an_ordinary_user(file: str) -> None:
    uid = 50_000 + secrets.randbelow(10_000)
    enter = str(Path(agentkit_environments.__file__).with_name("enter.py"))
    expose = ":".join(sorted({os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, ROOT)}))
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, uid, uid)
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "sandbox and not hostile", "-p", "no:cacheprovider"]
        tests += ["--basetemp", f"{home}/pytest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        finished = subprocess.run(
            [sys.executable, "-I", enter, str(os.getpid()), str(uid), expose, "-", *tests, str(HERE / file)],
            env={"PATH": os.environ["PATH"], "HOME": home, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    for launcher in LAUNCHERS:
        assert launcher_failure(launcher) or f"process-{launcher}: " not in finished.stdout, finished.stdout[-2000:]
