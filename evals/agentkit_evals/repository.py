"""Scoring of a patch by named tests in a fresh sandbox, as in SWE-bench.

Results are parsed here, outside the sandbox, from the output alone. The tests run the agent's code, which can print
anything: as in SWE-bench itself, a change that prints false results is not detected.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Literal

from agentkit.errors import TaskSetupError
from agentkit.task import Task, TestsConfig
from agentkit_environments import Environment, ExecResult
from agentkit_evals.errors import VerifierError

TestStatus = Literal["PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS"]
PASSES = ("PASSED", "XFAIL", "XPASS")

MAX_LOG_BYTES = 16 << 20
MAX_NAMED = 20
START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
"""Markers that SWE-bench's evaluation scripts print around the part of the output that counts."""

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PYTEST = re.compile(r"(PASSED|FAILED|ERROR|XFAIL|XPASS) ([^\s(].*)")
_UNITTEST = re.compile(r"(\S.*?) \.\.\. (ok|FAIL|ERROR|skipped\b.*|expected failure|unexpected success)")
_UNITTEST_STATUS: Mapping[str, TestStatus] = {
    "ok": "PASSED",
    "FAIL": "FAILED",
    "ERROR": "ERROR",
    "expected failure": "XFAIL",
    "unexpected success": "FAILED",
}


def parse_log(log: str) -> dict[str, TestStatus]:
    """Return the status of each test in the output of `pytest -rA` or `python -m unittest -v`.

    A test with several results has failed if one of them has. A pytest name that contains spaces is also listed up to
    its first space, as in SWE-bench. pytest lists skipped tests without their names, so they have no status.
    """
    log = _ANSI.sub("", log)
    if START in log and END in log:
        log = log.partition(START)[2].rpartition(END)[0]
    found: dict[str, TestStatus] = {}

    def add(name: str, status: TestStatus) -> None:
        if found.get(name) not in ("FAILED", "ERROR"):
            found[name] = status

    for line in map(str.rstrip, log.splitlines()):
        if match := _PYTEST.fullmatch(line):
            status: TestStatus = match[1]  # type: ignore[assignment]
            name = match[2].partition(" - ")[0] if status != "PASSED" else match[2]
            for each in {name, name.split()[0]}:
                add(each, status)
        elif match := _UNITTEST.fullmatch(line):
            add(match[1], _UNITTEST_STATUS.get(match[2], "SKIPPED"))
    return found


def not_passing(tests: TestsConfig, found: Mapping[str, TestStatus]) -> list[str]:
    """Return one line for each test that must pass but does not: its name and its status."""
    failing = [name for name in tests.fail_to_pass if found.get(name) not in PASSES]
    broken = [name for name in tests.pass_to_pass if found.get(name) not in (*PASSES, "SKIPPED")]
    return [f"{name}: {found.get(name, 'no result')}" for name in failing] + [
        f"{name}: {found.get(name, 'no result')} (passed before)" for name in broken
    ]


async def apply_and_test(task: Task, tests: TestsConfig, environment: Environment, patch: bytes) -> ExecResult | str:
    """Apply a patch in a fresh sandbox of `task`, and run the tests.

    Returns:
        The result of the test command, with both streams in `stdout`; or the reason why the patch does not apply.

    Raises:
        VerifierError: the task's own setup or patch fails.
    """
    try:
        await task.prepare(environment)
    except TaskSetupError as exc:
        raise VerifierError(str(exc)) from exc
    await environment.enter_phase("verifier")
    place = f"/tmp/agentkit-{secrets.token_hex(8)}"
    kept: list[str] = []
    if tests.patch:
        await environment.write_file(f"{place}/tests.patch", tests.patch)
        listed = await environment.exec(["git", "apply", "--numstat", "-z", f"{place}/tests.patch"], timeout_s=60)
        applied = await environment.exec(_apply(f"{place}/tests.patch"), timeout_s=60)
        if problem := _failure(listed) or _failure(applied):
            raise VerifierError(f"task {task.id}: the patch of the tests does not apply: {problem}")
        names = (line.split("\t", 2)[2] for line in listed.stdout.split("\0") if line.count("\t") >= 2)
        kept = ["--exclude=" + re.sub(r"([*?\[\\])", r"\\\1", name) for name in names]
    if patch:
        await environment.write_file(f"{place}/change.patch", patch)
        applied = await environment.exec(_apply(f"{place}/change.patch", *kept), timeout_s=60)
        if problem := _failure(applied):
            return f"the change does not apply to the repository: {problem}"
    await environment.write_file(f"{place}/tests.sh", tests.command)
    await environment.write_file(f"{place}/home/.keep", "")
    return await environment.exec(
        f"if command -v bash >/dev/null; then bash {place}/tests.sh; else sh {place}/tests.sh; fi 2>&1",
        env={"HOME": f"{place}/home"},
        timeout_s=tests.timeout_s,
        max_output_bytes=MAX_LOG_BYTES,
    )


def _apply(patch: str, *options: str) -> Sequence[str]:
    return ["git", "apply", "--whitespace=nowarn", *options, patch]


def _failure(result: ExecResult) -> str:
    return "" if result.exit_code == 0 else result.stderr.strip()[-500:] or f"git exited with {result.exit_code}"
