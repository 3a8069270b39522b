"""The base image's builder can be run as the hint says, also from a wheel, and needs no installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from agentkit_environments.docker import BUILD_HINT

ROOT = Path(__file__).parent.parent.parent


def test_the_hint_names_a_module_that_runs() -> None:
    module = BUILD_HINT.split("`")[1].removeprefix("python -m ")
    subprocess.run([sys.executable, "-m", module, "--help"], check=True, capture_output=True)


def test_the_file_runs_by_its_path_before_anything_is_installed(tmp_path: Path) -> None:
    spec = find_spec("agentkit_environments.images.base")
    assert spec is not None and spec.origin is not None
    said = (ROOT / "environments" / "images" / "ci-docker.sh").read_text()
    path = ROOT / "environments" / "images" / said.split('"$here/')[1].split('"')[0]
    assert os.path.samefile(path, spec.origin)
    subprocess.run([sys.executable, "-I", "-S", path, "--help"], check=True, capture_output=True, cwd=tmp_path)
