"""Verifiers run in a clean sandbox, and an unusable verdict scores 0 with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import agentkit_evals.verify
from agentkit.task import Task
from agentkit_environments import Environment, ExecResult, HostFailureError, available_backends, open_environment
from agentkit_evals.errors import VerifierError
from agentkit_evals.selfcheck import FORGERY, StartChecks, selfcheck
from agentkit_evals.verify import Backend, Verdict, broken, verify

pytestmark = pytest.mark.anyio
MakeTask = Callable[..., Task]

PROCESS = available_backends().get("process", "not built")


async def score(task: Task, act: str = "true", answer: str | None = None, backend: Backend = "unsafe-local") -> Verdict:
    """Run `act` in the task's environment, then verify the workdir it leaves."""
    async with await open_environment(task.environment.spec(), backend=backend) as environment:
        await task.prepare(environment)
        await environment.exec(act)
        archive = (await environment.export_dir(environment.spec.workdir)).data
    return await verify(task, archive=archive, answer=answer, backend=backend)


def verifier(command: str, **more: Any) -> dict[str, Any]:
    return {"command": command, "timeout_s": 20.0, **more}


async def test_the_verifier_sees_the_answer_and_the_workdir(number_task: MakeTask, backend: Backend) -> None:
    task = number_task(verifier=verifier('test "$AGENTKIT_ANSWER" = yes && test "$(cat made/out.txt)" = 42'))
    act = "mkdir made && cp n.txt made/out.txt"
    assert (await score(task, act, "yes", backend)).reward == 1
    assert (await score(task, act, "no", backend)).reward == 0
    assert (await score(task, "true", "yes", backend)).reward == 0


async def test_the_answer_is_in_a_file_and_a_variable(number_task: MakeTask) -> None:
    task = number_task(verifier=verifier('cat "$AGENTKIT_ANSWER_FILE"; printf "|%s" "$AGENTKIT_ANSWER"'))
    assert (await score(task, answer="two\nlines ü")).output == "two\nlines ü|two\nlines ü"
    assert (await score(task, answer=None)).output == "|"
    assert (await score(task, answer="half \ud800 pair")).output == "half ? pair|half ? pair"
    assert (await score(task, answer="nul \0 byte")).output == "nul \0 byte|"
    assert len((await score(task, answer="x" * 200_000)).output) == 8_000


@pytest.mark.parametrize(("size", "variable"), [(65_536, 65_536), (65_537, 0)])
async def test_an_answer_that_is_too_long_for_a_variable_is_only_a_file(
    number_task: MakeTask, size: int, variable: int
) -> None:
    task = number_task(verifier=verifier('wc -c < "$AGENTKIT_ANSWER_FILE"; printf "%s" "$AGENTKIT_ANSWER" | wc -c'))
    assert (await score(task, answer="x" * size)).output.split() == [str(size), str(variable)]


async def test_verifier_files_are_outside_the_workdir(number_task: MakeTask) -> None:
    command = 'python3 "$AGENTKIT_VERIFIER_DIR/sub/check.py" && test ! -e sub && ls'
    task = number_task(verifier=verifier(command, files={"sub/check.py": "print(open('n.txt').read())"}))
    verdict = await score(task)
    assert (verdict.reward, verdict.output) == (1, "42\n\nn.txt")


@pytest.mark.parametrize(
    ("writes", "reward", "source"),
    [
        ("echo 0.25 > $AGENTKIT_REWARD_DIR/reward.txt", 0.25, "reward.txt"),
        ("echo 0.25 > $AGENTKIT_REWARD_DIR/reward.txt; exit 3", 0.0, "exit"),
        ("cd $AGENTKIT_REWARD_DIR; echo 1 > reward.txt; echo '{\"reward\": 0.5}' > reward.json", 0.5, "reward.json"),
        ('echo \'{"reward": 0.5, "style": 1}\' > $AGENTKIT_REWARD_DIR/reward.json', 0.5, "reward.json"),
        ("echo -1000000 > $AGENTKIT_REWARD_DIR/reward.txt", -1e6, "reward.txt"),
        ("exit 3", 0.0, "exit"),
        ("true", 1.0, "exit"),
    ],
)
async def test_reward_files_count_only_after_exit_status_0(
    number_task: MakeTask, writes: str, reward: float, source: str
) -> None:
    verdict = await score(number_task(verifier=verifier(writes)))
    assert (verdict.reward, verdict.source) == (reward, source)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-program --check", "the verifier 'no-such-program --check' could not start"),
        ("./n.txt", r"the verifier './n.txt' could not start.*\(exit status 126\)"),
        ("echo many > $AGENTKIT_REWARD_DIR/reward.txt", r"reward\.txt must hold a number, got 'many"),
        ("echo nan > $AGENTKIT_REWARD_DIR/reward.txt", r"reward\.txt must hold a number within"),
        ("echo -inf > $AGENTKIT_REWARD_DIR/reward.txt", r"reward\.txt must hold a number within"),
        ("echo 1e300 > $AGENTKIT_REWARD_DIR/reward.txt", r"reward\.txt must hold a number within"),
        ("echo 1000001 > $AGENTKIT_REWARD_DIR/reward.txt", r"reward\.txt must hold a number within"),
        ("printf '\\377\\0' > $AGENTKIT_REWARD_DIR/reward.txt", r"reward\.txt must hold a number"),
        ("echo '{\"reward\": NaN}' > $AGENTKIT_REWARD_DIR/reward.json", r"reward\.json must hold a number within"),
        ("echo '[]' > $AGENTKIT_REWARD_DIR/reward.json", r"reward\.json must hold a number"),
        ("printf '%065000d' 1 | tr 01 '[' > $AGENTKIT_REWARD_DIR/reward.json", r"reward\.json must hold a number"),
        ("printf '{\"reward\": 1%0400d}' 0 > $AGENTKIT_REWARD_DIR/reward.json", r"reward\.json must hold a number"),
        ("mkdir $AGENTKIT_REWARD_DIR/reward.txt", "IsADirectoryError"),
        ("mkfifo $AGENTKIT_REWARD_DIR/reward.txt", "not a regular file"),
        ("cd $AGENTKIT_REWARD_DIR && ln -s reward.txt reward.txt", "loop of links"),
        ("head -c 70000 /dev/zero > $AGENTKIT_REWARD_DIR/reward.txt", "more than 65536 bytes"),
        ("echo 1 > $AGENTKIT_REWARD_DIR/reward.txt; mkfifo $AGENTKIT_REWARD_DIR/reward.json", "not a regular file"),
        ("echo 1 > $AGENTKIT_REWARD_DIR/reward.json", r"reward\.json must hold a number, got '1"),
        ("echo '{}' > $AGENTKIT_REWARD_DIR/reward.json", r"reward\.json must hold a number, got '{}"),
    ],
)
async def test_an_unusable_verdict_scores_0_with_a_reason(number_task: MakeTask, command: str, message: str) -> None:
    verdict = await score(number_task(verifier=verifier(command)))
    assert verdict.reward == 0 and re.search(message, verdict.error or ""), verdict


async def test_a_verifier_that_times_out_scores_0(number_task: MakeTask) -> None:
    task = number_task(verifier={"command": "echo begun; sh run.sh", "timeout_s": 0.3})
    verdict = await score(task, "echo 'sleep 60' > run.sh")
    assert (verdict.reward, verdict.timed_out, verdict.output) == (0, True, "begun")
    assert verdict.error == "the verifier timed out after 0.3 s"
    assert verdict.started


@pytest.mark.parametrize("exit_code", [0, 127])
async def test_the_exit_status_of_a_verifier_that_ran_out_of_time_does_not_count(
    number_task: MakeTask, monkeypatch: pytest.MonkeyPatch, exit_code: int
) -> None:
    """A command that ends in the moment of its deadline may have one."""

    async def open_late(*args: Any, **options: Any) -> Environment:
        environment = await open_environment(*args, **options)
        run = environment.exec

        async def run_late(command: Any, **options: Any) -> ExecResult:
            late = "AGENTKIT_ANSWER" in options.get("env", ())
            result = await run(command, **options)
            return replace(result, timed_out=True) if late else result

        monkeypatch.setattr(environment, "exec", run_late)
        return environment

    monkeypatch.setattr(agentkit_evals.verify, "open_environment", open_late)
    verdict = await score(number_task(verifier=verifier(f"exit {exit_code}")))
    assert (verdict.reward, verdict.exit_code, verdict.started) == (0, exit_code, True)
    assert verdict.error == "the verifier timed out after 20 s"


async def test_a_workdir_that_cannot_be_unpacked_scores_0(number_task: MakeTask) -> None:
    verdict = await verify(number_task(), archive=b"not an archive", answer="42", backend="unsafe-local")
    assert (verdict.reward, verdict.exit_code) == (0.0, None)
    assert verdict.error is not None and verdict.error.startswith("scoring failed: UnsafeArchiveError: ")


async def test_a_failure_of_the_host_during_scoring_is_no_score(
    number_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Environment, path: str, data: str | bytes) -> None:
        raise HostFailureError("the engine is gone")

    monkeypatch.setattr(Environment, "write_file", fail)
    empty = bytes(10_240)  # an archive without entries
    with pytest.raises(HostFailureError, match="the engine is gone"):
        await verify(number_task(), archive=empty, answer="42", backend="unsafe-local")


async def test_a_task_without_a_verifier_cannot_be_scored(number_task: MakeTask) -> None:
    with pytest.raises(VerifierError, match="task number has no verifier; add"):
        await verify(number_task(verifier=None), archive=b"", answer=None)


async def test_a_forged_reward_file_changes_nothing(number_task: MakeTask, backend: Backend) -> None:
    assert (await score(number_task(), FORGERY, "41", backend)).reward == 0
    assert (await score(number_task(), FORGERY, "42", backend)).source == "exit"


@pytest.mark.parametrize(
    "command",
    [
        "python3 -c 'import sys; sys.exit(1)'",
        "python3 -c 'import json, re; raise SystemExit(1)'",
        "bash -lc 'exit 1'",
        "bash -ic 'exit 1'",
        'python3 "$AGENTKIT_VERIFIER_DIR/check.py"',
    ],
)
async def test_code_planted_in_the_workdir_is_not_run(number_task: MakeTask, command: str, backend: Backend) -> None:
    task = number_task(verifier=verifier(command, files={"check.py": "import subprocess\nraise SystemExit(1)\n"}))
    verdict = await score(task, FORGERY, "42", backend)
    assert (verdict.reward, verdict.exit_code) == (0, 1), verdict.output


@pytest.mark.sandbox
@pytest.mark.skipif(PROCESS is not None, reason=f"no process sandbox: {PROCESS}")
async def test_code_in_a_user_site_inside_the_workdir_is_not_run(number_task: MakeTask) -> None:
    base = {"files": {}, "env": {"PYTHONUSERBASE": "/workspace/site"}}
    task = number_task(environment=base, verifier=verifier("python3 -c 'raise SystemExit(1)'"))
    verdict = await score(task, FORGERY, "42", "process")
    assert (verdict.reward, verdict.exit_code) == (0, 1), verdict.output


async def test_the_verifiers_home_is_empty_and_new_each_time(number_task: MakeTask) -> None:
    task = number_task(verifier=verifier('ls -A "$HOME"; echo "$AGENTKIT_REWARD_DIR $HOME"'))
    first, second = [(await score(task, "touch .profile")).output.split() for _ in range(2)]
    assert len(first) == len(second) == 2 and not {*first} & {*second}


async def test_processes_of_the_agent_do_not_survive(number_task: MakeTask) -> None:
    task = number_task(verifier=verifier("sleep 0.3; test ! -e /tmp/late && test ! -e late"))
    assert (await score(task, "(sleep 0.2; touch /tmp/late late) >/dev/null 2>&1 &")).reward == 1


async def test_selfcheck_accepts_a_sound_task(number_task: MakeTask) -> None:
    assert (await selfcheck(number_task(), backend="unsafe-local")).problems == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"solution": {"command": "echo 41"}}, "the oracle solution scores 0, expected 1"),
        ({"verifier": verifier("true")}, "doing nothing scores 1, expected 0"),
        (
            {"verifier": verifier("test -e reward.txt || test $AGENTKIT_ANSWER = 42")},
            "a forged reward scores 1, expected 0",
        ),
    ],
)
async def test_selfcheck_reports_unsound_tasks(number_task: MakeTask, changes: dict[str, Any], problem: str) -> None:
    checked = await selfcheck(number_task(**changes), backend="unsafe-local")
    assert [problem in found for found in checked.problems] == [True]


@pytest.mark.anyio
async def test_a_lost_sandbox_is_not_a_verifier_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores 0 without a try on the solution, whose own loss would make it infrastructure."""
    task = Task.model_validate(
        {"id": "t", "instruction": "Say it.", "verifier": {"command": "true"}, "solution": {"command": "true"}}
    )

    async def never(*arguments: object) -> None:
        raise AssertionError("the solution was tried")

    checks = StartChecks()
    monkeypatch.setattr(checks, "_problem", never)
    await checks.require(task, broken("SandboxLostError: it was killed"), backend="process")
    with pytest.raises(AssertionError, match="tried"):
        await checks.require(task, replace(broken("x"), exit_code=127), backend="process")
