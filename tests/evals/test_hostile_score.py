"""An agent cannot void its trial: whatever it leaves or starts, failed work scores 0.

Each case is one attack, scored by verifiers of several styles on each backend. The quick cases run with the other
tests, one verifier each, in a process sandbox. All combinations run with `make hostile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from agentkit.models.scripted import Policy
from agentkit.task import Task
from agentkit_environments import (
    Environment,
    HostFailureError,
    SandboxLostError,
    SandboxUnavailableError,
    SnapshotError,
    available_backends,
)
from agentkit_environments.docker import DockerEnvironment
from agentkit_environments.local import LocalEnvironment
from agentkit_environments.process import ProcessEnvironment
from agentkit_evals import selfcheck as selfcheck_module
from agentkit_evals.blame import Phase, blame
from agentkit_evals.record import RunDirectory, TrialRecord
from agentkit_evals.verify import Backend

MakeTask = Callable[..., Task]
MakeScript = Callable[..., Policy]
Evaluate = Callable[..., RunDirectory]

VERIFIERS = {
    "shell": 'test "$(sh run.sh 2>/dev/null)" = 42',
    "program": './run.sh > "$HOME/out" && test "$(cat "$HOME/out")" = 42',
    "exec": "exec ./run.sh",
    "import": "python3 -c \"import sys; sys.path.insert(0, '.'); import main; sys.exit(main.answer() != 42)\"",
    "reward": 'sh run.sh > "$HOME/o" || exit; test "$(cat "$HOME/o")" = 42 && echo 1 >$AGENTKIT_REWARD_DIR/reward.txt',
    "read": "grep -q 42 result.txt",
}
SOLUTION = """\
printf '#!/bin/sh\\necho 42\\n' > run.sh; chmod +x run.sh
printf 'def answer():\\n    return 42\\n' > main.py; echo 42 > result.txt
"""

DEEP = "import os\nfor _ in range(30): os.mkdir('d' * 200); os.chdir('d' * 200)\nopen('f', 'w').write('x')"
SIGNALS = """import os, signal, time
if not os.fork():
    os.setsid()
    while True: os.kill(-1, signal.{}); time.sleep(.001)"""
BOTH_FULL = "cat /dev/zero > fill; cat /dev/zero > /tmp/fill; true"


def leaves(run: str, main: str = "raise SystemExit(127)") -> str:
    """Return a command that makes run.sh, main.py and result.txt, none of which does the work."""
    files = f"cat > run.sh <<'END'\n{run}\nEND\ncat > main.py <<'END'\n{main}\nEND\n"
    return files + "chmod +x run.sh; echo no > result.txt"


LOSING = {
    "exit 127": leaves("exit 127", "import os; os._exit(127)"),
    "exit 126": leaves("exit 126", "import os; os._exit(126)"),
    "no interpreter": leaves("#!/no/such/program\nexit 1"),
    "no program": leaves("#!/bin/sh\nexec no-such-program", "import no_such_module"),
    "not executable": leaves("exit 1") + "; chmod 644 run.sh",
    "nothing": "true",
    "binary": "head -c 4096 /dev/urandom > run.sh; cp run.sh main.py; chmod +x run.sh; cp run.sh result.txt",
    "NUL bytes": "printf '\\0\\0\\0' > run.sh; chmod +x run.sh; cp run.sh main.py",
    "a directory": "mkdir run.sh main.py result.txt",
    "a loop of links": "ln -s run.sh run.sh; ln -s main.py main.py",
    "kills its parent": leaves("kill -9 $PPID", "import os; os.kill(os.getppid(), 9)"),
    "kills everything": leaves("kill -9 -1", "import os; os.kill(-1, 9)"),
    "prints what is no text": leaves(
        "head -c 100000 /dev/urandom; exit 127", "import os; os.write(1, b'\\xff\\0' * 9999)"
    ),
    "no reward directory": leaves('rm -rf "$AGENTKIT_REWARD_DIR"; exit 127', "import os; os.kill(os.getpid(), 11)"),
    "a reward directory that is a link": leaves(
        'rm -rf "$AGENTKIT_REWARD_DIR"; ln -s "$AGENTKIT_REWARD_DIR" "$AGENTKIT_REWARD_DIR"; echo no'
    ),
    "a reward that is a pipe": leaves('mkfifo "$AGENTKIT_REWARD_DIR/reward.txt"; echo 41'),
    "an extreme time": "touch -d @9223372036854775807 f; touch -d @-9223372036854775808 .",
    "no permissions": "mkdir d; touch d/f; chmod 000 d/f d .",
    "a path beyond PATH_MAX": f'python3 -c "{DEEP}"',
    "a sparse giant": "python3 -c \"open('f', 'w').truncate(255 << 20)\"",
    "bad names": r"""python3 -c "open(b'\xff\n\x1b[31m', 'w'); open(b'a' * 255, 'w')" """,
}
"""Attacks that must score 0 with every verifier."""

SLOW = {
    "too many files": "mkdir d; python3 -c \"[open(f'd/{n}', 'w') for n in range(60_000)]\"",
    "256 MiB": "head -c 200M /dev/zero > a; head -c 56M /dev/zero > b",
    "both volumes full": BOTH_FULL,
    "a pipe": "mkfifo run.sh main.py result.txt",
    "freezes everything": f'python3 -c "{SIGNALS.format("SIGSTOP")}"',
    "kills in a loop": f'python3 -c "{SIGNALS.format("SIGKILL")}"',
    "floods": leaves("yes", "while True: print('y' * 100)"),
    "freezes the verifier": leaves(f"python3 -c '{SIGNALS.format('SIGSTOP')}'; sleep 60", SIGNALS.format("SIGSTOP")),
    "kills the verifier": leaves(f"python3 -c '{SIGNALS.format('SIGKILL')}'; sleep 60", SIGNALS.format("SIGKILL")),
    "fills the verifier": leaves(
        "cat /dev/zero > f; cat /dev/zero > /tmp/f; exit 127", "open('f', 'w').write('x' * 10**9)"
    ),
    "a bomb": leaves("b() { b | b & }; b; sleep 60", "import os\nwhile True: os.fork()"),
}
"""Attacks that take seconds, which must also score 0."""


def task_of(number_task: MakeTask, verifier: str, **changes: Any) -> Task:
    limits = {"memory_mib": 128, "processes": 64, "disk_mib": 300}
    return number_task(
        environment={"files": {}, "limits": limits},
        verifier={"command": VERIFIERS[verifier], "timeout_s": 5.0},
        solution={"command": SOLUTION},
        agent={"max_turns": 4, "timeout_s": 30.0},
        **changes,
    )


def trial_of(evaluate: Evaluate, task: Task, script: MakeScript, act: str, backend: Backend) -> TrialRecord:
    acts = script([("bash", {"command": act})], [("submit", {"answer": "done"})])
    return evaluate((task, acts), backend=backend).trials[0]


def backends() -> list[Any]:
    marks = {"process": pytest.mark.sandbox, "docker": pytest.mark.docker}
    why = available_backends()
    return [
        pytest.param(name, marks=[mark, pytest.mark.skipif(bool(why[name]), reason=f"{name}: {why[name]}")])
        for name, mark in marks.items()
    ]


def assert_lost(trial: TrialRecord) -> None:
    assert (trial.reward, trial.failure in ("model", "limit")) == (0.0, True), (trial.failure, trial.error)


@pytest.mark.sandbox
@pytest.mark.skipif(available_backends()["process"] is not None, reason="no process sandbox")
@pytest.mark.parametrize("losing", LOSING)
def test_a_losing_agent_cannot_void_its_trial(
    evaluate: Evaluate, number_task: MakeTask, script: MakeScript, losing: str
) -> None:
    verifier = [*VERIFIERS][[*LOSING].index(losing) % len(VERIFIERS)]
    assert_lost(trial_of(evaluate, task_of(number_task, verifier), script, LOSING[losing], "process"))


@pytest.mark.hostile
@pytest.mark.timeout(600)
@pytest.mark.parametrize("verifier", ["shell", "import", "reward"])
@pytest.mark.parametrize("backend", backends())
def test_no_agent_can_void_its_trial(
    evaluate: Evaluate, number_task: MakeTask, script: MakeScript, verifier: str, backend: Backend
) -> None:
    """Run every attack against one verifier on one backend."""
    ways = {f"w{number}": act for number, act in enumerate({**LOSING, **SLOW}.values())}
    names = dict(zip(ways, {**LOSING, **SLOW}, strict=True))
    pairs = [
        (
            task_of(number_task, verifier, task_id=way),
            script([("bash", {"command": act})], [("submit", {"answer": ""})]),
        )
        for way, act in ways.items()
    ]
    run = evaluate(*pairs, backend=backend, concurrency=2)
    voided = {names[t.task]: (t.failure, t.error) for t in run.trials if t.reward != 0 or t.failure == "infrastructure"}
    assert voided == {} and run.complete


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_honest_work_counts(
    evaluate: Evaluate, number_task: MakeTask, script: MakeScript, verifier: str, backend: Backend
) -> None:
    clutter = (
        "ln -s /usr/bin/python3 py; mkfifo p; ln -s loop loop; touch -d @9223372036854775807 old; mkdir v; chmod 0 v"
    )
    trial = trial_of(evaluate, task_of(number_task, verifier), script, f"{SOLUTION}\n{clutter}", backend)
    assert (trial.reward, trial.failure, trial.error) == (1.0, None, None), trial.verifier_output
    assert len(trial.dropped) == 3 and all(line in trial.verifier_output for line in trial.dropped)


DAEMON = """\
import os, time
if os.fork() == 0:
    os.setsid()
    reward = os.environ['AGENTKIT_REWARD_DIR'] + '/reward.txt'
    while True:
        try:
            if '0.25' in open(reward).read():
                time.sleep(0.5)
                open(reward, 'w').write('1.0')
        except OSError:
            pass
        time.sleep(0.001)
"""


@pytest.mark.parametrize("how", ["plain", "exits"])
def test_a_daemon_cannot_rewrite_the_reward(
    evaluate: Evaluate,
    number_task: MakeTask,
    script: MakeScript,
    backend: Backend,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The daemon waits for half a second, so that a busy machine has time to kill it."""
    kinds: dict[str, Any] = {
        "docker": DockerEnvironment,
        "process": ProcessEnvironment,
        "unsafe-local": LocalEnvironment,
    }
    kind = kinds[backend]
    kill_all, read_file = kind.kill_all, Environment.read_file

    async def late_kill_all(self: Environment) -> None:
        await anyio.sleep(1)  # enough time for a daemon that did not die with the verifier
        await kill_all(self)

    async def late_read_file(self: Environment, path: str, **options: Any) -> bytes:
        await anyio.sleep(1)  # enough time for a daemon that is still alive
        return await read_file(self, path, **options)

    if backend == "unsafe-local":  # nothing dies with the verifier
        monkeypatch.setattr(Environment, "read_file", late_read_file)
    else:
        monkeypatch.setattr(kind, "kill_all", late_kill_all)
    command = 'python3 run.py >/dev/null 2>&1; echo 0.25 > "$AGENTKIT_REWARD_DIR/reward.txt"'
    task = number_task(verifier={"command": command + ("; exit 0" if how == "exits" else ""), "timeout_s": 20.0})
    trial = trial_of(evaluate, task, script, f"cat > run.py <<'END'\n{DAEMON}END", backend)
    assert (trial.reward, trial.failure) == (0.25, "model"), trial.error


def test_a_verifier_is_tried_on_the_solution_once_per_task(
    evaluate: Evaluate, number_task: MakeTask, script: MakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[str] = []
    probe = selfcheck_module._probe

    async def counted(task: Task, *rest: Any) -> Any:
        probed.append(task.id)
        return await probe(task, *rest)

    monkeypatch.setattr(selfcheck_module, "_probe", counted)
    loses = script([("bash", {"command": "echo 'exit 127' > run.sh"})], [("submit", {"answer": ""})])
    broken = {"command": "no-such-verifier", "timeout_s": 5.0}
    run = evaluate(
        (task_of(number_task, "exec", task_id="sound"), loses),
        (number_task("broken", verifier=broken), loses),
        (number_task("unproven", verifier=broken, solution=None), loses),
        epochs=3,
    )
    assert sorted(probed) == ["broken", "sound"]
    assert {t.task: (t.failure, t.reward) for t in run.trials} == {
        "sound": ("model", 0.0),
        "broken": ("infrastructure", None),
        "unproven": ("model", 0.0),
    }


@pytest.mark.parametrize(
    ("exc", "phase", "expected"),
    [
        (SandboxUnavailableError("x"), "scoring", "infrastructure"),
        (HostFailureError("x"), "agent", "infrastructure"),
        (HostFailureError("x"), "scoring", "infrastructure"),
        (ExceptionGroup("x", [HostFailureError("x")]), "scoring", "infrastructure"),
        (MemoryError(), "scoring", "infrastructure"),
        (SandboxLostError("x"), "agent", "agent"),
        (ExceptionGroup("x", [SandboxLostError("x")]), "agent", "agent"),
        (SandboxLostError("x"), "scoring", "agent"),
        (SandboxLostError("x"), "setup", "task"),
        (SnapshotError("x"), "agent", "task"),
        (RuntimeError("x"), "agent", "infrastructure"),
        (OSError(28, "x"), "agent", "infrastructure"),
        (OSError(28, "x"), "scoring", "agent"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), "scoring", "agent"),
        (RecursionError("x"), "scoring", "agent"),
    ],
)
def test_the_rule_of_blame(exc: BaseException, phase: Phase, expected: str) -> None:
    assert blame(exc, phase) == expected


@pytest.mark.parametrize(
    ("method", "error", "failure"),
    [
        ("kill_all", SandboxLostError("its processes would not die"), "model"),
        ("export_dir", SandboxLostError("gone"), "model"),
        ("export_dir", OSError(5, "Input/output error"), "model"),
        ("export_dir", HostFailureError("the engine is gone"), "infrastructure"),
        ("import_dir", OSError(28, "No space left on device"), "model"),
        ("import_dir", SandboxLostError("gone"), "model"),
        ("import_dir", HostFailureError("the engine is gone"), "infrastructure"),
        ("read_file", HostFailureError("the engine is gone"), "infrastructure"),  # raised while the agent runs
        ("read_file", SandboxLostError("gone"), "model"),
        ("exec", SandboxLostError("gone"), "model"),
        ("exec", HostFailureError("the engine is gone"), "infrastructure"),
        ("close", OSError(5, "the connection was closed"), None),
        ("close", SandboxLostError("gone"), None),
    ],
)
def test_failures_after_the_agent_has_started(
    evaluate: Evaluate,
    number_task: MakeTask,
    solves: Policy,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    error: Exception,
    failure: str | None,
) -> None:
    from agentkit_environments.local import LocalEnvironment

    original = getattr(LocalEnvironment, method)

    async def broken(self: LocalEnvironment, *args: Any, **options: Any) -> Any:
        if method == "close":
            await original(self)
        raise error

    monkeypatch.setattr(LocalEnvironment, method, broken)
    reads = {"verifier": {"command": 'test "$AGENTKIT_ANSWER" = 42', "timeout_s": 20.0}, "solution": None}
    trial = evaluate((number_task(**reads), solves)).trials[0]
    expected = {None: 1.0, "model": 0.0, "infrastructure": None}[failure]
    assert (trial.failure, trial.reward) == (failure, expected), trial.error
    assert failure is None or str(error) in str(trial.error)


HOSTILE_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("read_file", {"path": ""}),
    ("read_file", {"path": "a\0b"}),
    ("read_file", {"path": "\ud800"}),
    ("read_file", {"path": "loop"}),
    ("read_file", {"path": "/dev/zero"}),
    ("read_file", {"path": "x" * 10_000}),
    ("write_file", {"path": "\udc80", "content": "\ud800"}),
    ("write_file", {"path": "f", "content": "a\0\ud800b"}),
    ("edit_file", {"path": "\ud800", "old": "\ud800", "new": "\udfff"}),
    ("list_dir", {"path": "\ud800"}),
    ("list_dir", {"path": "loop"}),
    ("search", {"pattern": "\ud800", "path": "\0"}),
    ("search", {"pattern": "("}),
    ("python", {"code": "print('\ud800')"}),
    ("python", {"code": "\0"}),
    ("bash", {"command": "echo \ud800"}),
    ("bash", {"command": "echo \0"}),
    ("bash", {"command": "x" * 300_000}),
    ("bash", {"command": "printf '\\377\\0\\355\\240\\200'"}),
    ("no_such_tool_\ud800", {"\ud800": "\ud800"}),
    ("submit", {"answer": "\ud800"}),
    ("submit", {"answer": "\0" * 100}),
]


@pytest.mark.parametrize("number", range(len(HOSTILE_CALLS)))
def test_no_call_breaks_a_run(evaluate: Evaluate, number_task: MakeTask, script: MakeScript, number: int) -> None:
    acts = script([("bash", {"command": "ln -s loop loop"})], [HOSTILE_CALLS[number]], [("submit", {"answer": "41"})])
    trial = evaluate((number_task(), acts)).trials[0]
    assert_lost(trial)


def test_an_answer_of_any_size_is_scored(evaluate: Evaluate, number_task: MakeTask, script: MakeScript) -> None:
    acts = script([("submit", {"answer": "x" * 1_200_000})])
    count = {"command": 'test "$(wc -c < "$AGENTKIT_ANSWER_FILE")" -gt 1100000', "timeout_s": 20.0}
    trial = evaluate((number_task(verifier=count), acts)).trials[0]
    assert trial.answer is None or len(trial.answer) <= 1_000_000
    assert trial.reward == (0.0 if trial.answer is None else 1.0)
