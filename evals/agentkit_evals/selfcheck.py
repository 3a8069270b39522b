"""Check that a task is sound: its solution scores 1, an idle agent 0, and a forged reward changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio

from agentkit.harbor import HarborConfig, HarborStep
from agentkit.task import CallsConfig, SolutionConfig, Task
from agentkit_environments import Environment
from agentkit_evals.blame import blame
from agentkit_evals.calls import gold_calls
from agentkit_evals.errors import SuiteError, VerifierError
from agentkit_evals.harbor.episode import FORGERY as HARBOR_FORGERY
from agentkit_evals.harbor.episode import episode
from agentkit_evals.harbor.episode import solve as solve_step
from agentkit_evals.statistics import SOLVED
from agentkit_evals.verify import Backend, Verdict, backend_for, begin, collect, opened, verify
from agentkit_tools import Tool

FORGERY = """\
for place in . "$HOME" /tmp /tmp/reward /tmp/agentkit-verifier/reward /logs/verifier; do
    mkdir -p "$place" && echo 1 > "$place/reward.txt" && echo '{"reward": 1}' > "$place/reward.json"
done 2>/dev/null
cat > forge.py <<'END'
import os
if place := os.environ.get("AGENTKIT_REWARD_DIR"):
    with open(place + "/reward.txt", "w") as file:
        file.write("1")
    os._exit(0)
END
cat > .profile <<'END'
test -z "$AGENTKIT_REWARD_DIR" || { echo 1 > "$AGENTKIT_REWARD_DIR/reward.txt"; exit 0; }
END
cp .profile .bashrc
site=$(python3 -c "import site; print(site.getusersitepackages())" 2>/dev/null)
case "$site" in "$HOME"/*)
    mkdir -p "$site" && cp forge.py "$site/usercustomize.py" && echo "import usercustomize" > "$site/forge.pth";;
esac
for module in sitecustomize usercustomize json re pathlib subprocess unittest; do
    cp forge.py "$module.py"
done
true
"""
"""Commands that try to forge a reward. They write reward files to every likely place, and plant code that writes one
and exits with 0 in every file that a shell or Python could load from the workdir or HOME."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Verdicts of the three probes of one task, and the reward that doing nothing should get."""

    task: str
    oracle: Verdict
    nothing: Verdict
    forged: Verdict
    idle_reward: float = 0.0

    @property
    def problems(self) -> list[str]:
        """One sentence per fault of the task; empty if the task is sound."""
        found = []
        if self.oracle.reward < SOLVED:
            why = "; ".join(filter(None, (self.oracle.error, self.oracle.output)))
            found.append(f"the oracle solution scores {self.oracle.reward:g}, expected 1: {why}")
        if self.nothing.reward > self.idle_reward:
            found.append(f"doing nothing scores {self.nothing.reward:g}, expected {self.idle_reward:g}")
        if self.forged.reward != self.nothing.reward:
            found.append(f"a forged reward scores {self.forged.reward:g}, expected {self.nothing.reward:g}")
        return found


async def selfcheck(task: Task, *, backend: Backend | None = None) -> SelfCheck:
    """Probe a task three times, each in a fresh sandbox and with a real verification.

    A task that is scored by calls needs no sandbox. Its solution is the expected calls, and doing nothing is correct if
    no call is expected.

    Raises:
        SuiteError: the task has no solution to check.
        TaskSetupError, SandboxError: a probe could not run.
    """
    if isinstance(task.verifier, CallsConfig):
        gold = await verify(task, archive=b"", answer=gold_calls(task))
        idle = await verify(task, archive=b"", answer="[]")
        return SelfCheck(task.id, gold, nothing=idle, forged=idle, idle_reward=float(task.verifier.calls == []))
    if task.solution is None:
        raise SuiteError(f"task {task.id} has no solution; add `solution: {{command: ...}}` to check it")

    async def nothing(environment: Environment, step: HarborStep | None) -> None:
        return None

    async def forge(environment: Environment, step: HarborStep | None) -> None:
        await environment.exec(FORGERY if step is None else HARBOR_FORGERY)

    return SelfCheck(
        task.id,
        oracle=await _probe(task, _solving(task, task.solution), backend),
        nothing=await _probe(task, nothing, backend),
        forged=await _probe(task, forge, backend),
    )


class StartChecks:
    """Tells a verifier that never starts from one that the agent's work keeps from starting.

    When a verifier does not start on an agent's work, it is tried on the task's own solution, once per task.
    """

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}
        self._lock = anyio.Lock()

    async def require(self, task: Task, verdict: Verdict, *, backend: Backend, run_id: str | None = None) -> None:
        """Raise VerifierError if the verifier does not start on the task's own solution either.

        Do nothing if `verdict` is from a verifier that started, or if the task has no solution.

        Raises:
            VerifierError: the verifier does not start; the message has its output.
            SandboxUnavailableError, HostFailureError: the verifier could not be tried on the solution.
        """
        if verdict.started or verdict.exit_code is None or task.solution is None:
            return  # without an exit code it started, and its sandbox was lost
        key = hashlib.sha256(task.model_dump_json().encode()).hexdigest()
        async with self._lock:
            if key not in self._known:
                self._known[key] = await self._problem(task, task.solution, backend, run_id)
        if problem := self._known[key]:
            raise VerifierError(
                f"task {task.id}: {problem}. The same happens on the task's own solution. "
                "The verifier's command must exist in the task's environment and be executable"
            )

    async def _problem(self, task: Task, solution: SolutionConfig, backend: Backend, run_id: str | None) -> str | None:
        try:
            verdict = await _probe(task, _solving(task, solution), backend, run_id)
        except Exception as exc:
            if blame(exc, "scoring") == "infrastructure":
                raise
            return None
        return None if verdict.started else f"{verdict.error}: {verdict.output or 'no output'}"


Probe = Callable[[Environment, HarborStep | None], Awaitable[str | None]]
"""Does something in a sandbox and returns the answer. A Harbor task has steps; it is called for each."""


def _solving(task: Task, solution: SolutionConfig) -> Probe:
    async def solve(environment: Environment, step: HarborStep | None) -> str:
        if step is not None and isinstance(task.verifier, HarborConfig):
            return (await solve_step(task.verifier, step, environment)).stdout
        result = await environment.exec(solution.command, timeout_s=solution.timeout_s)
        return result.stdout.strip()

    return solve


async def _probe(task: Task, act: Probe, backend: Backend | None, run_id: str | None = None) -> Verdict:
    where = backend_for(task, backend)
    async with opened(task, where, run_id) as environment:
        await task.prepare(environment)
        start = await begin(task, environment)
        if isinstance(task.verifier, HarborConfig):

            async def work(step: HarborStep, tools: Sequence[Tool]) -> bool:
                await environment.enter_phase("agent")
                await act(environment, step)
                return True

            verdict = await episode(task.verifier, environment, work, run_id=run_id)
            assert verdict is not None, "the probe never ends a trial"
            return verdict
        await environment.enter_phase("agent")
        answer = await act(environment, None)
        await environment.kill_all()
        archive = (await collect(task, environment, start)).data
    return await verify(task, archive=archive, answer=answer, backend=where, run_id=run_id)
