"""Does a task measure what it says? The oracle solves it, doing nothing does not, a forged reward changes nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from agentkit.task import Task
from agentkit_environments import Environment, open_environment
from agentkit_evals.errors import SuiteError
from agentkit_evals.statistics import SOLVED
from agentkit_evals.verify import Backend, Verdict, backend_for, verify

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
"""What an agent might do that has read this project: a full reward wherever one could be looked for, and code that
gives one and exits with 0 wherever a shell or Python could pick it up from the workdir or from HOME."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What the three probes scored, and what that says against the task; nothing when it is sound."""

    task: str
    oracle: Verdict
    nothing: Verdict
    forged: Verdict

    @property
    def problems(self) -> list[str]:
        """One sentence per thing wrong with the task."""
        found = []
        if self.oracle.reward < SOLVED:
            found.append(f"the oracle solution scores {self.oracle.reward:g}, expected 1: {self.oracle.output}")
        if self.nothing.reward > 0:
            found.append(f"doing nothing scores {self.nothing.reward:g}, expected 0")
        if self.forged.reward != self.nothing.reward:
            found.append(f"a forged reward file scores {self.forged.reward:g} where doing nothing scores 0")
        return found


async def selfcheck(task: Task, *, backend: Backend | None = None) -> SelfCheck:
    """Probe a task three times, each in a fresh environment and with a real verification.

    Raises:
        SuiteError: the task has no solution to check.
        VerifierError, TaskSetupError, SandboxError: a probe could not be carried out.
    """
    if task.solution is None:
        raise SuiteError(f"task {task.id} has no solution; add `solution: {{command: ...}}` to check it")
    solution = task.solution

    async def solve(environment: Environment) -> str:
        result = await environment.exec(solution.command, timeout_s=solution.timeout_s)
        return result.stdout.strip()

    async def nothing(environment: Environment) -> None:
        return None

    async def forge(environment: Environment) -> None:
        await environment.exec(FORGERY)

    return SelfCheck(
        task.id,
        oracle=await _probe(task, solve, backend),
        nothing=await _probe(task, nothing, backend),
        forged=await _probe(task, forge, backend),
    )


async def _probe(task: Task, act: Callable[[Environment], Awaitable[str | None]], backend: Backend | None) -> Verdict:
    where = backend_for(task, backend)
    async with await open_environment(task.environment.spec(), backend=where) as environment:
        await task.prepare(environment)
        answer = await act(environment)
        await environment.kill_all()
        archive = await environment.export_dir(environment.spec.workdir)
    return await verify(task, archive=archive, answer=answer, backend=where)
