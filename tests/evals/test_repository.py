"""Tasks that are scored by tests: the agent's change to a repository is applied to a fresh one, and tests decide."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.models.scripted import Policy
from agentkit.task import Task, TestsConfig
from agentkit_environments import available_backends, open_environment
from agentkit_evals.record import RunDirectory, patch_path
from agentkit_evals.report import render_report
from agentkit_evals.repository import not_passing, parse_log
from agentkit_evals.selfcheck import selfcheck
from agentkit_evals.verify import Backend, begin

MakeScript = Callable[..., Policy]
Evaluate = Callable[..., RunDirectory]

CALC = "def add(a, b):\n    return a - b\n\n\ndef twice(a):\n    return 2 * a\n"
TEST_TWICE = """\
import unittest
from calc import twice

class Twice(unittest.TestCase):
    def test_twice(self):
        self.assertEqual(twice(2), 4)
"""
ADD_TEST = """\
--- a/tests/test_calc.py
+++ b/tests/test_calc.py
@@ -1,6 +1,9 @@
 import unittest
-from calc import twice
+from calc import add, twice
{blank}
 class Twice(unittest.TestCase):
     def test_twice(self):
         self.assertEqual(twice(2), 4)
+
+    def test_add(self):
+        self.assertEqual(add(2, 3), 5)
""".replace("{blank}", " ")
GIT = "git -c init.defaultBranch=main -c user.name=a -c user.email=a@b"
FIX = "sed -i 's/a - b/a + b/' calc.py"


def a_task(**changes: Any) -> Task:
    """Return a task whose repository is made by its setup, so that it needs no image."""
    return Task.model_validate(
        {
            "id": "calc",
            "instruction": "add(2, 3) returns -1.",
            "environment": {
                "files": {
                    "calc.py": CALC, "tests/test_calc.py": TEST_TWICE, "tests/__init__.py": "", ".gitignore": "*.log\n"
                },
                "setup": [f"{GIT} init -q && {GIT} add -A && {GIT} commit -qm start"],
            },
            "verifier": {
                "fail_to_pass": ["test_add (tests.test_calc.Twice.test_add)"],
                "pass_to_pass": ["test_twice (tests.test_calc.Twice.test_twice)"],
                "patch": ADD_TEST,
                "command": "python3 -m unittest -v tests.test_calc",
                "timeout_s": 60.0,
            },
            "solution": {"command": FIX},
            **changes,
        }
    )  # fmt: skip


@pytest.fixture
def does(evaluate: Evaluate, script: MakeScript, tmp_path: Path) -> Callable[..., Any]:
    """Function that runs an agent which runs one command, and returns the trial and its patch."""

    def run(command: str, task: Task | None = None) -> tuple[Any, str]:
        policy = script([("bash", {"command": command})], "Done.")
        done = evaluate((task or a_task(), policy), directory=tmp_path / "run")
        (trial,) = done.trials
        patch = patch_path(done.path, trial.trial)
        render_report(done)
        return trial, patch.read_text() if patch.exists() else ""

    return run


def test_a_fix_scores_1_and_leaves_its_patch(does: Callable[..., Any]) -> None:
    trial, patch = does(f"{FIX}; echo noise > debug.log; echo new > added.txt; {GIT} commit -qam fix")
    assert (trial.reward, trial.failure, trial.error) == (1.0, None, None), trial.verifier_output
    assert trial.verifier_output.splitlines()[-1] == "2 of 2 tests pass"
    assert "-    return a - b\n+    return a + b" in patch and "+new" in patch and "debug.log" not in patch


def test_a_tracked_file_is_never_ignored(does: Callable[..., Any]) -> None:
    environment = a_task().model_dump(include={"environment"})["environment"]
    environment["files"] |= {"kept.log": "old\n", "gone.log": "old\n", "setup.cfg": ""}
    environment["setup"] = [f"{GIT} init -q && {GIT} add -f . && {GIT} commit -qm start"]
    task = a_task(environment=environment)
    command = (
        f"{GIT} rm -q --cached kept.log; echo new > kept.log; rm gone.log; echo '*.cfg' >> .gitignore; echo > a.log"
    )
    trial, patch = does(f"{FIX}; {command}", task)
    assert trial.reward == 1.0
    assert "-old\n+new" in patch and "a.log" not in patch
    assert patch.count("deleted file") == 1 and "a/gone.log" in patch


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("true", "test_add (tests.test_calc.Twice.test_add): FAIL"),
        (f"{FIX}; sed -i 's/2 \\* a/a/' calc.py", "(tests.test_calc.Twice.test_twice): FAILED (passed before)"),
        # the agent's version of the tests does not count, and neither does a file that is not part of the repository
        ("sed -i 's/4)/4)\\n    def test_add(self): pass/' tests/test_calc.py", "1 of 2 tests pass"),
        ("printf 'def add(a, b): return a + b' > calc.log", "1 of 2 tests pass"),
        ("rm -rf .git", "the changes to the repository cannot be read"),
        (f"{FIX}; rm -rf .git/objects; mkdir .git/objects", "the changes to the repository cannot be read"),
        ("echo 'import os; os._exit(0)' > calc.py", "the output of the tests has no result"),
        ("printf 'raise SystemExit(0)\\n' > unittest.py", "the output of the tests has no result"),
        ("while true; do :; done & echo 'while True: pass' > calc.py", "the tests timed out"),
    ],
)  # fmt: skip
def test_other_work_scores_0(does: Callable[..., Any], command: str, reason: str) -> None:
    task = a_task()
    assert isinstance(task.verifier, TestsConfig)
    if "timed out" in reason:
        task = task.model_copy(update={"verifier": task.verifier.model_copy(update={"timeout_s": 1.0})})
    trial, _ = does(command, task)
    assert (trial.reward, trial.failure) == (0.0, "model")
    assert reason in f"{trial.error}\n{trial.verifier_output}"


def test_git_settings_of_the_agent_do_not_change_the_patch(does: Callable[..., Any]) -> None:
    config = "diff.noprefix true; git config diff.external /bin/false; git config core.quotePath false"
    renamed = (
        "git mv tests/__init__.py tests/renamed.py; printf 'a\\0b' > raw.bin; chmod +x calc.py; ln -s calc.py link"
    )
    trial, patch = does(f"git config {config}; {FIX}; {renamed}; git config color.ui always")
    assert trial.reward == 1.0 and "diff --git a/calc.py b/calc.py" in patch and "GIT binary patch" in patch
    assert "old mode 100644" in patch and "new file mode 120000" in patch


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch": ADD_TEST.replace("twice(2)", "thrice(2)")}, "the patch of the tests does not apply"),
        ({"patch": "nonsense"}, "the patch of the tests does not apply"),
        ({"command": "echo nothing"}, "The same happens on the task's own solution"),
    ],
)
def test_tests_that_cannot_run_are_not_the_models_failure(
    does: Callable[..., Any], changes: dict[str, str], reason: str
) -> None:
    trial, _ = does(FIX, a_task(verifier={**a_task().model_dump()["verifier"], **changes}))
    assert (trial.reward, trial.failure) == (None, "infrastructure") and reason in trial.error


def test_a_workdir_without_a_repository_is_a_task_defect(does: Callable[..., Any]) -> None:
    trial, _ = does(FIX, a_task(environment={"files": {"calc.py": CALC}}))
    assert (trial.reward, trial.failure) == (None, "task")
    assert "must be a git repository of an image with git" in trial.error


@pytest.mark.anyio
@pytest.mark.parametrize("backend", ["unsafe-local", pytest.param("process", marks=pytest.mark.sandbox)])
async def test_a_sound_task_passes_its_check(backend: Backend) -> None:
    """With Docker, test_swebench.py does the same in an image of its own."""
    if reason := available_backends()[backend]:
        pytest.skip(f"{backend}: {reason}")
    found = await selfcheck(a_task(), backend=backend)
    assert found.problems == [] and found.oracle.source == "tests" and found.oracle.tests == 2
    broken = await selfcheck(a_task(solution={"command": "true"}), backend=backend)
    assert "test_add (tests.test_calc.Twice.test_add): FAIL" in broken.problems[0]


@pytest.mark.anyio
async def test_only_tasks_scored_by_tests_are_snapshot(number_task: Callable[..., Task]) -> None:
    async with await open_environment(backend="unsafe-local") as environment:
        assert await begin(number_task(), environment) == ""


PYTEST_FILE = """\
import pytest

def test_ok(): pass
def test_bad(): assert 1 == 2, "x - y"
@pytest.mark.parametrize("text", ["a b", "c"])
def test_each(text): pass
@pytest.mark.skip(reason="later")
def test_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
@pytest.mark.xfail
def test_fixed(): pass
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
def test_prints(): print("PASSED t.py::test_bad")
"""


def test_the_output_of_pytest_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(PYTEST_FILE)
    argv = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--color=yes", "-c", "/dev/null", "t.py"]
    log = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True).stdout
    assert parse_log(log) == {
        "t.py::test_ok": "PASSED",
        "t.py::test_bad": "FAILED",
        "t.py::test_each[a b]": "PASSED",
        "t.py::test_each[a": "PASSED",
        "t.py::test_each[c]": "PASSED",
        "t.py::test_known": "XFAIL",
        "t.py::test_fixed": "XPASS",
        "t.py::test_error": "ERROR",
        "t.py::test_prints": "PASSED",
    }


UNITTEST_FILE = """\
import unittest

class T(unittest.TestCase):
    def test_ok(self): pass
    def test_bad(self): self.fail()
    def test_error(self): raise ValueError
    @unittest.skip("later")
    def test_skipped(self): pass
    @unittest.expectedFailure
    def test_known(self): self.fail()
    def test_text(self):
        \"\"\"A sentence.\"\"\"
"""


def test_the_output_of_unittest_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(UNITTEST_FILE)
    argv = [sys.executable, "-m", "unittest", "-v", "t"]
    log = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True).stderr
    names = {name.partition(" ")[0]: status for name, status in parse_log(log).items()}
    assert names == {"test_ok": "PASSED", "test_bad": "FAILED", "test_error": "ERROR", "test_skipped": "SKIPPED",
                     "test_known": "XFAIL", "A": "PASSED"}  # fmt: skip


def test_only_the_marked_part_of_a_log_counts() -> None:
    log = "PASSED a\n+ : '>>>>> Start Test Output'\nPASSED b\nFAILED c - no\n+ : '>>>>> End Test Output'\nPASSED c\n"
    assert parse_log(log) == {"b": "PASSED", "c": "FAILED"}


def test_every_test_must_pass() -> None:
    tests = TestsConfig(fail_to_pass=["a", "b"], pass_to_pass=["c", "d"], command="x")
    assert not_passing(tests, {"a": "PASSED", "b": "XFAIL", "c": "SKIPPED", "d": "PASSED"}) == []
    assert not_passing(tests, {"a": "SKIPPED", "c": "FAILED"}) == [
        "a: SKIPPED", "b: no result", "c: FAILED (passed before)", "d: no result (passed before)"
    ]  # fmt: skip


@given(
    st.text(st.characters(categories=None)), st.lists(st.sampled_from(["PASSED a", "FAILED a - x", "a ... ok", " "]))
)
def test_any_output_is_parsed_and_a_failure_wins(text: str, lines: list[str]) -> None:
    parse_log(text)
    found = parse_log("\n".join(lines))
    if "FAILED a - x" in lines:
        assert found["a"] == "FAILED"
    else:
        assert found.get("a", "PASSED") == "PASSED"
