"""`exclude` leaves the same files out of an artifact as GNU tar, whose patterns it has."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agentkit.harbor import Artifact
from agentkit_environments.folder import pack_folder
from agentkit_evals.harbor.artifacts import without_excluded

TREE = ("a/b/x.py", "a/b/y", "a/y", "b/a/.h", "b/x.pyc", "^", "[a", "a]b")


def gnu_tar() -> bool:
    program = shutil.which("tar")
    return program is not None and b"GNU" in subprocess.run([program, "--version"], capture_output=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    for name in TREE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(archive: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        return {name.removeprefix("./") for name in files.getnames()} - {"."}


@pytest.mark.skipif(not gnu_tar(), reason="no GNU tar")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns=st.lists(st.text("abxy.*?[]!^-/\\", max_size=6), min_size=1, max_size=2))
@example(patterns=["*.py"])
@example(patterns=["./a"])
@example(patterns=["a/"])
@example(patterns=["b/*"])
@example(patterns=["[^ab]"])
@example(patterns=["[!b-a]"])
@example(patterns=["[]a]b"])
@example(patterns=["\\[a", "\\*"])
@example(patterns=["."])
@example(patterns=[""])
def test_what_tar_excludes_is_excluded(tree: Path, patterns: list[str]) -> None:
    try:
        artifact = Artifact(source="/a", exclude=patterns)
    except ValidationError:
        assert any("[" in pattern or pattern.endswith("\\") for pattern in patterns)
        return
    flags = [f"--exclude={pattern}" for pattern in patterns]
    made = subprocess.run(["tar", "cf", "-", *flags, "-C", str(tree), "."], capture_output=True, check=True)
    assert names(without_excluded(pack_folder(tree), artifact.exclude)) == names(made.stdout)


def test_a_hard_link_to_an_excluded_file_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.secret").write_text("content")
    (tmp_path / "b").hardlink_to(tmp_path / "a.secret")
    (tmp_path / "c").hardlink_to(tmp_path / "a.secret")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("a.secret", "b", "c"):
            archive.add(tmp_path / name, name)
    found = without_excluded(out.getvalue(), ["*.secret"])
    with tarfile.open(fileobj=io.BytesIO(found)) as files:
        assert files.getnames() == ["b", "c"]
        for name in ("b", "c"):
            content = files.extractfile(name)
            assert content is not None and content.read() == b"content"


@pytest.mark.parametrize("pattern", ["a\0", "[[:alpha:]]", "[a\\]]", "a\\"])
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match="are not supported"):
        Artifact(source="/a", exclude=[pattern])
