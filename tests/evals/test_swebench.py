"""Rows in the shape of SWE-bench become tasks in their own Docker image, scored by tests."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import typer.testing

from agentkit.cli import app
from agentkit.errors import TaskFileError
from agentkit.models.scripted import Policy
from agentkit.task import SolutionConfig, TestsConfig
from agentkit_environments import available_backends
from agentkit_evals.compare import task_hash
from agentkit_evals.record import RunDirectory
from agentkit_evals.suite import load_suite

MakeScript = Callable[..., Policy]
Evaluate = Callable[..., RunDirectory]

CALC = "def add(a, b):\n    return a - b\n\n\ndef twice(a):\n    return 2 * a\n"
TEST = "import unittest\nfrom calc import {0}\n\nclass {1}(unittest.TestCase):\n    def test(self):\n        {2}\n"
GOLD = """\
--- a/calc.py
+++ b/calc.py
@@ -1,5 +1,5 @@
 def add(a, b):
-    return a - b
+    return a + b
{blank}
{blank}
 def twice(a):
""".replace("{blank}", " ")
TEST_PATCH = """\
--- /dev/null
+++ b/test_add.py
@@ -0,0 +1,6 @@
+import unittest
+from calc import add
+
+class Add(unittest.TestCase):
+    def test(self):
+        self.assertEqual(add(2, 3), 5)
"""


def row(**changes: Any) -> dict[str, Any]:
    made = {
        "instance_id": "demo__calc-1",
        "repo": "demo/calc",
        "base_commit": "0" * 40,
        "problem_statement": "add(2, 3) returns -1",
        "hints_text": "",
        "patch": GOLD,
        "test_patch": TEST_PATCH,
        "FAIL_TO_PASS": '["test (test_add.Add.test)"]',
        "PASS_TO_PASS": ["test (test_twice.Twice.test)"],
        "image": "demo:latest",
        "test_cmd": "python3 -m unittest -v test_add test_twice",
        **changes,
    }
    return {key: value for key, value in made.items() if value is not None}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def test_a_row_is_a_task(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path / "rows.jsonl", row()))
    (case,) = suite.cases
    task, environment = case.task, case.task.environment
    assert (task.id, case.family) == ("demo__calc-1", "demo/calc") and "add(2, 3) returns -1" in task.instruction
    assert (environment.image, environment.workdir, environment.workdir_from_image) == ("demo:latest", "/testbed", True)
    assert isinstance(task.verifier, TestsConfig) and task.verifier.patch == TEST_PATCH
    assert task.verifier.fail_to_pass == ["test (test_add.Add.test)"]
    assert isinstance(task.solution, SolutionConfig) and GOLD in task.solution.command
    assert task_hash(load_suite(str(tmp_path / "rows.jsonl")).cases[0].task) == task_hash(task)


def test_other_names_of_keys(tmp_path: Path) -> None:
    for changes in (
        {"image": None, "docker_image": "demo:latest"},
        {"image": None, "image_name": "demo:latest"},
        {"test_cmd": ["cd .", "python3 -m unittest -v"]},
        {"PASS_TO_PASS": "[]", "workdir": "/repo", "repo": None},
    ):
        (case,) = load_suite(write(tmp_path / "rows.jsonl", row(**changes))).cases
        assert case.task.environment.image == "demo:latest"
    assert (case.family, case.task.environment.workdir) == ("rows", "/repo")
    # a script brings its own tests
    (case,) = load_suite(write(tmp_path / "rows.jsonl", row(eval_script="#!/bin/bash\npytest -rA\n"))).cases
    assert isinstance(case.task.verifier, TestsConfig)
    assert (case.task.verifier.patch, case.task.verifier.command) == ("", "#!/bin/bash\npytest -rA\n")
    (case,) = load_suite(write(tmp_path / "rows.jsonl", row(patch="x" * 200_000))).cases
    assert case.task.solution is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "no image: expected one of the keys image, docker_image, image_name"),
        ({"image": ""}, "no image"),
        ({"test_cmd": None}, "no command for the tests: expected the key eval_script, or test_cmd"),
        ({"test_cmd": 5}, "no command for the tests"),
        ({"instance_id": 5}, "instance_id: int 5, expected a text"),
        ({"instance_id": "../x"}, "id: found '../x'"),
        ({"problem_statement": None}, 'missing key "problem_statement", expected the text of the issue'),
        ({"FAIL_TO_PASS": None}, 'missing key "FAIL_TO_PASS"'),
        ({"FAIL_TO_PASS": "[broken"}, "FAIL_TO_PASS: '[broken' is not JSON"),
        ({"FAIL_TO_PASS": [1]}, "FAIL_TO_PASS: '[1]', expected a list of names of tests"),
        ({"FAIL_TO_PASS": []}, "fail_to_pass"),
        ({"PASS_TO_PASS": {"a": 1}}, "PASS_TO_PASS: dict"),
        ({"test_patch": 5}, "test_patch: int 5, expected a patch of the tests"),
        ({"patch": 5}, "patch: int 5, expected the gold patch"),
        ({"eval_type": "fail_only"}, "eval_type: 'fail_only', expected pass_and_fail"),
        ({"workdir": "/usr/x"}, "workdir must be outside the system's directories"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "rows.jsonl", row(), row(**{"instance_id": "two", **changes}))
    with pytest.raises(TaskFileError) as caught:
        load_suite(file)
    assert str(caught.value).startswith(f"{file}:2: ") and message in str(caught.value), caught.value


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Docker image with git and a repository that root owns, as the images of SWE-bench are."""
    reason = available_backends()["docker"]
    if reason is not None:
        pytest.skip(f"docker: {reason}")
    import docker

    folder = tmp_path_factory.mktemp("image")
    base = folder / "base.tar"
    from agentkit_environments.images import base as images

    with base.open("wb") as out:
        images.write("host", out)
    repository = folder / "testbed"
    repository.mkdir()
    (repository / "calc.py").write_text(CALC)
    (repository / "test_twice.py").write_text(TEST.format("twice", "Twice", "self.assertEqual(twice(2), 4)"))
    (repository / "dir").mkdir()
    (repository / "dir" / "link").symlink_to("../calc.py")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run([*git, *arguments], cwd=repository, check=True)

    def owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        return member

    with tarfile.open(base, "a") as archive:
        archive.add(repository, "testbed", filter=owned_by_root)
    name = f"agentkit-test-{uuid4().hex[:8]}"
    client = docker.from_env()
    try:
        client.api.import_image_from_file(
            str(base), repository=name, tag="latest", changes=["ENV PATH=/usr/local/bin:/usr/bin:/bin"]
        )
        yield f"{name}:latest"
        client.images.remove(f"{name}:latest", force=True)
    finally:
        client.close()


@pytest.mark.docker
def test_rows_are_checked_and_run_in_their_image(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate: Evaluate, script: MakeScript
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "rows.jsonl", row(image=image))
    runner = typer.testing.CliRunner()
    checked = runner.invoke(app, ["check", file], catch_exceptions=False)
    assert (checked.exit_code, checked.stdout.splitlines()[-1]) == (0, "1/1 tasks are sound"), checked.output
    (case,) = load_suite(file).cases
    look = script(
        [("bash", {"command": "test -O calc.py && test -L dir/link && git status --short && git log --oneline"})],
        [("edit_file", {"path": "calc.py", "old": "a - b", "new": "a + b"})],
        "Done.",
    )
    run = evaluate((case.task, look), backend=None, directory=tmp_path / "fixed")
    (trial,) = run.trials
    assert (trial.reward, trial.backend) == (1.0, "docker"), trial.verifier_output
    trajectory = run.trajectory(trial)
    assert trajectory is not None and not trajectory.results[0].is_error
    assert trajectory.results[0].content.strip().endswith("start")
    idle = evaluate((case.task, script("Nothing to do.")), backend=None, directory=tmp_path / "idle")
    assert (idle.trials[0].reward, idle.trials[0].failure) == (0.0, "model")


@pytest.mark.docker
def test_a_missing_image_or_workdir_is_explained(
    image: str, tmp_path: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = typer.testing.CliRunner()
    for changes, message, code in (  # a missing image is a fault of its task only
        (
            {"image": "agentkit-no-such-image:latest"},
            "image agentkit-no-such-image:latest is missing and could not be",
            1,
        ),
        ({"image": image, "workdir": "/nowhere"}, f"image {image} has no directory /nowhere", 3),
    ):
        file = write(tmp_path / "rows.jsonl", row(**changes))
        found = runner.invoke(app, ["eval", file, "-m", str(untrained)], catch_exceptions=False)
        assert found.exit_code == 3 and message in " ".join(found.output.split()), found.output
        checked = runner.invoke(app, ["check", file], catch_exceptions=False)
        assert checked.exit_code == code and message in " ".join(checked.output.split())
    wrong = runner.invoke(app, ["eval", file, "-m", str(untrained), "--env", "unsafe-local"], catch_exceptions=False)
    assert wrong.exit_code == 3 and "needs the docker backend" in " ".join(wrong.output.split())
