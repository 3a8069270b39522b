"""Tasks from rows in the format of SWE-bench: a repository in a Docker image, an issue, and tests that score.

| key | value |
|---|---|
| `instance_id`, `problem_statement` | the task's id and instruction |
| `image`, `docker_image` or `image_name` | the image, with the repository at `workdir` (default: /testbed) and git |
| `FAIL_TO_PASS`, `PASS_TO_PASS` | names of tests, as a list or as JSON text of a list |
| `eval_script` | a script that puts the row's tests in place and runs them, as in SWE-bench 5 |
| `test_cmd` | without `eval_script`: a command that runs the tests after `test_patch` was applied |
| `patch` | the gold patch, which `agentkit check` scores |
| `repo` | the family in reports |
| `metadata` | more keys of the task's metadata, such as `provenance` |

The tests must print the output of `pytest -rA` or `python -m unittest -v`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentkit.task import Task
from agentkit_evals.dataset import Row, read_rows

IMAGE_KEYS = ("image", "docker_image", "image_name")
WORKDIR = "/testbed"
INSTRUCTION = """\
The current directory is the git repository {repo}. Change its code so that the issue below is resolved. Do not change \
existing tests: hidden tests decide.

{problem}"""
MAX_GOLD_BYTES = 100_000
"""Maximum bytes of a gold patch: Linux limits one argument of a command to 128 KiB."""
LIMITS = {
    "memory_mib": 4096,
    "disk_mib": 4096,
    "file_size_mib": 1024,
    "processes": 1024,
    "open_files": 4096,
    "cpus": 2.0,
}


def is_swebench(data: dict[str, Any]) -> bool:
    """Return whether a row has the format of SWE-bench."""
    return "instance_id" in data


def read_swebench(path: Path) -> Iterator[tuple[Task, str]]:
    """Yield a task and its repository for each row.

    Raises:
        TaskFileError: a row is malformed, or has no image or test command. The message has file and line.
    """
    for row in read_rows(path):
        name = row.get("instance_id", str, "a text such as django__django-11099")
        repo = row.get("repo", str, "a text such as django/django", default=path.stem)
        problem = row.get("problem_statement", str, "the text of the issue")
        yield (
            row.task(
                id=name,
                instruction=INSTRUCTION.format(repo=repo, problem=problem),
                environment={
                    "image": _image(row),
                    "backend": "docker",
                    "workdir": row.get("workdir", str, "an absolute path", default=WORKDIR),
                    "workdir_from_image": True,
                    "env": {"HOME": "/tmp"},
                    "limits": LIMITS,
                },
                agent={"max_turns": 100, "timeout_s": 3600.0},
                verifier=_tests(row),
                solution=_solution(row),
                metadata={"family": repo, **row.get("metadata", dict, "a mapping", default={})},
            ),
            repo,
        )


def _image(row: Row) -> str:
    for key in IMAGE_KEYS:
        if isinstance(image := row.data.get(key), str) and image:
            return image
    raise row.error(
        f"no image: expected one of the keys {', '.join(IMAGE_KEYS)} with a Docker image that has the repository at "
        f"{WORKDIR}; SWE-bench publishes one per row, swebench/sweb.eval.x86_64.INSTANCE"
    )


def _tests(row: Row) -> dict[str, Any]:
    if (kind := row.data.get("eval_type")) not in (None, "pass_and_fail"):
        raise row.error(f"eval_type: {str(kind)[:60]!r}, expected pass_and_fail")
    script = row.data.get("eval_script")
    command = script or row.data.get("test_cmd")
    if isinstance(command, list) and all(isinstance(line, str) for line in command):
        command = "\n".join(command)
    if not isinstance(command, str) or not command:
        raise row.error(
            "no command for the tests: expected the key eval_script, or test_cmd with a command such as "
            '"python -m pytest -rA tests/test_x.py"'
        )
    return {
        "fail_to_pass": _names(row, "FAIL_TO_PASS"),
        "pass_to_pass": _names(row, "PASS_TO_PASS"),
        "command": command,
        "patch": "" if script else row.get("test_patch", str, "a patch of the tests", default=""),
    }


def _names(row: Row, key: str) -> list[str]:
    names = row.get(key, (str, list), "a list of names of tests, or JSON text of one")
    if isinstance(names, str):
        try:
            names = json.loads(names)
        except ValueError as exc:
            raise row.error(f"{key}: {names[:60]!r} is not JSON, expected a list of names of tests") from exc
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise row.error(f"{key}: {str(names)[:60]!r}, expected a list of names of tests")
    return names


def _solution(row: Row) -> dict[str, Any] | None:
    """Return a command that applies the gold patch; None if there is none, or it is too long for a command."""
    patch = row.get("patch", str, "the gold patch", default="")
    if not patch or len(patch.encode()) > MAX_GOLD_BYTES:
        return None
    end = f"END_{hashlib.sha256(patch.encode()).hexdigest()}"  # the same whenever the row is read
    return {"command": f"git apply --whitespace=nowarn - <<'{end}'\n{patch.rstrip(chr(10))}\n{end}\n"}
