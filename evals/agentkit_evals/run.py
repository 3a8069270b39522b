"""Running a suite: every task, every epoch, a few at a time, on one model; written down as it happens."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import anyio

from agentkit.agent import Agent
from agentkit.checks import check_positive
from agentkit.errors import TaskSetupError, TrajectoryError, first_cause
from agentkit.events import CallStarted, RunFinished, Status, TurnStarted
from agentkit.limits import Limits
from agentkit.model import Model, Usage
from agentkit.task import Task
from agentkit.trajectory import Trajectory
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import Environment
from agentkit_evals.blame import Phase, blame, describe, well_formed
from agentkit_evals.errors import RunDirectoryError
from agentkit_evals.record import Failure, RunDirectory, RunLock, TrialRecord, trajectory_path
from agentkit_evals.selfcheck import StartChecks
from agentkit_evals.statistics import SOLVED
from agentkit_evals.suite import Case, Suite
from agentkit_evals.verify import Backend, Verdict, backend_for, opened, verify

MAX_DROPS_SHOWN = 20
MAX_ANSWER_CHARS = 1_000_000
"""Of an answer in a trial's record, so that the record can be read back; the verifier gets all of it."""


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A trial began: its sandbox is being opened."""

    trial: str


@dataclass(frozen=True, slots=True)
class TrialActed:
    """A trial did something worth a word in a progress display."""

    trial: str
    turn: int
    doing: str


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """A trial is over and in the run directory."""

    record: TrialRecord


Update = TrialStarted | TrialActed | TrialFinished


@dataclass(slots=True)
class EvalRun:
    """One evaluation: a suite times `epochs` on one model, `concurrency` trials at a time.

    Attributes:
        suite: the tasks.
        model: the model all trials share, which then must be entered, or what gives each case its own.
        directory: where the run is written; made by `execute`, must not exist.
        backend: where trials run; None leaves it to each task.
        seed: each trial samples with a seed of its own that is derived from this one, the task and the epoch.
        sampling: None is the model's own; its seed is not used.
        listener: told what happens, on the event loop's thread.
        start_checks: what is known of the tasks whose verifiers did not start.
    """

    suite: Suite
    model: Model | Callable[[Case], Model]
    directory: Path
    model_name: str
    epochs: int = 1
    concurrency: int = 2
    backend: Backend | None = None
    seed: int = 0
    sampling: SamplingParams | None = None
    listener: Callable[[Update], None] = field(default=lambda update: None)
    run_id: str = field(default_factory=lambda: secrets.token_hex(6))
    start_checks: StartChecks = field(default_factory=StartChecks)

    def __post_init__(self) -> None:
        check_positive("EvalRun(epochs=...)", self.epochs, whole=True)
        check_positive("EvalRun(concurrency=...)", self.concurrency, whole=True)

    @property
    def resolved_sampling(self) -> SamplingParams:
        """What trials sample with, but for the seed."""
        return self.sampling or (SamplingParams() if callable(self.model) else self.model.sampling)

    async def execute(self) -> RunDirectory:
        """Run every trial and read the finished run back.

        Whatever happens to one trial is in its record and stops no other. When this is cancelled, running agents are
        stopped, sandboxes are removed, and the directory is the valid run of the trials that had finished.

        Raises:
            RunDirectoryError: the directory exists already.
            OSError: the directory cannot be written.
        """
        self._begin()
        plan = ((case, epoch) for epoch in range(self.epochs) for case in self.suite.cases)
        try:
            async with anyio.create_task_group() as workers:
                for number in range(min(self.concurrency, len(self.suite.cases) * self.epochs)):
                    workers.start_soon(self._work, plan, name=f"eval worker {number}")
        except ExceptionGroup as group:
            raise first_cause(group) from group
        return RunDirectory.open(self.directory)

    def _begin(self) -> None:
        try:
            self.directory.mkdir(parents=True)
        except FileExistsError as exc:
            raise RunDirectoryError(f"{self.directory} exists already; a run is never overwritten") from exc
        lock = RunLock(
            name=self.suite.name,
            model=self.model_name,
            backend=self.backend or "auto",
            epochs=self.epochs,
            concurrency=self.concurrency,
            seed=self.seed,
            sampling=self.resolved_sampling,
            tasks=[case.task for case in self.suite.cases],
            families={case.task.id: case.family for case in self.suite.cases},
        )
        (self.directory / "run.json").write_text(lock.model_dump_json(indent=1), encoding="utf-8")

    async def _work(self, plan: Iterator[tuple[Case, int]]) -> None:
        for case, epoch in plan:
            record = await _Trial(self, case, epoch).run()
            self._write(record)
            self.listener(TrialFinished(record))

    def _write(self, record: TrialRecord) -> None:
        with (self.directory / "trials.jsonl").open("ab") as file:
            file.write(record.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


class _Trial:
    """One task, once: its parts in order, and a record of however far it came."""

    def __init__(self, run: EvalRun, case: Case, epoch: int) -> None:
        self.eval_run = run
        self.case = case
        self.task: Task = case.task
        self.epoch = epoch
        self.name = f"{case.task.id}.{epoch}"
        self.backend: str | None = None
        self.status: Status | None = None
        self.usage = Usage()
        self.answer: str | None = None
        self.phase: Phase = "setup"
        self.dropped: tuple[str, ...] = ()
        self.verifier_output = ""
        self.seconds = {"setup_s": 0.0, "agent_s": 0.0, "verify_s": 0.0}
        self.trajectory = trajectory_path(run.directory, self.name)

    async def run(self) -> TrialRecord:
        self.eval_run.listener(TrialStarted(self.name))
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        failure: Failure | None = None
        error: str | None = None
        reward: float | None = None
        try:
            verdict = await self._scored()
            reward, error = verdict.reward, verdict.error
        except Exception as exc:  # the failure of one trial stops no other
            error = str(exc) if isinstance(exc, TaskSetupError) else describe(exc)
            match blame(exc, self.phase):
                case "agent":
                    reward = 0.0
                case "task" | "infrastructure" as broken:
                    failure = broken
        self._recall()
        if failure is None and reward is not None and reward < SOLVED:
            failure = "limit" if self.status == "limit" else "model"
        return TrialRecord(
            trial=self.name,
            task=self.task.id,
            epoch=self.epoch,
            family=self.case.family,
            phrasing=self.case.phrasing,
            held_out_phrasing=self.case.held_out_phrasing,
            status=self.status,
            failure=failure,
            reward=reward,
            answer=self.answer if self.answer is None else self.answer[:MAX_ANSWER_CHARS],
            error=error,
            verifier_output="\n".join(filter(None, [self.verifier_output, *self._left_out()])),
            dropped=list(self.dropped),
            backend=self.backend,
            usage=self.usage,
            started=started,
            **self.seconds,
        )

    async def _scored(self) -> Verdict:
        """Let the agent act, and score what it left."""
        backend = backend_for(self.task, self.eval_run.backend)
        archive = await self._act(backend)
        with self._timed("verify_s"):
            run_id = self.eval_run.run_id
            verdict = await verify(self.task, archive=archive, answer=self.answer, backend=backend, run_id=run_id)
            self.verifier_output = verdict.output
            await self.eval_run.start_checks.require(self.task, verdict, backend=backend, run_id=run_id)
        return verdict

    async def _act(self, backend: Backend) -> bytes:
        """The agent's part: what its workdir holds afterwards, as an archive."""
        async with AsyncExitStack() as stack:
            with self._timed("setup_s"):
                environment = await stack.enter_async_context(opened(self.task, backend, self.eval_run.run_id))
                self.backend = environment.backend
                await self.task.prepare(environment)
            self.phase = "agent"
            with self._timed("agent_s"):
                await self._run_agent(environment)
            self.phase = "scoring"
            await environment.kill_all()
            exported = await environment.export_dir(environment.spec.workdir)
            self.dropped = exported.dropped
            return exported.data

    def _left_out(self) -> Iterator[str]:
        """What did not reach the verifier, for the reader of its output."""
        if self.dropped:
            yield f"[{len(self.dropped)} entries of the work directory could not be carried over to the verifier:]"
            yield from self.dropped[:MAX_DROPS_SHOWN]
            if len(self.dropped) > MAX_DROPS_SHOWN:
                yield "[...]"

    async def _run_agent(self, environment: Environment) -> None:
        sampling = self.eval_run.resolved_sampling.override(seed=trial_seed(self.eval_run.seed, self.name))
        agent = agent_for(self.task, self._model(), sampling)
        metadata = {"trial": self.name, "family": self.case.family, "backend": environment.backend}
        turn = 0
        async with aclosing(
            agent.stream(self.task.instruction, environment=environment, trajectory=self.trajectory, metadata=metadata)
        ) as events:
            async for event in events:
                match event:
                    case TurnStarted():
                        turn = event.turn + 1
                        self._tell(turn, "thinking" if event.think else "answering")
                    case CallStarted():
                        self._tell(turn, event.call.name)
                    case RunFinished():
                        answer = event.result.answer
                        self.answer = None if answer is None else well_formed(answer)

    def _model(self) -> Model:
        model = self.eval_run.model
        return model(self.case) if callable(model) else model

    def _recall(self) -> None:
        """How the agent's run ended and what it used, from its record, which is complete also when it failed."""
        with suppress(TrajectoryError):
            outcome = Trajectory.load(self.trajectory).outcome
            if outcome is not None:
                self.status, self.usage = outcome.status, outcome.usage

    def _tell(self, turn: int, doing: str) -> None:
        self.eval_run.listener(TrialActed(self.name, turn, doing))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(self.seconds[part] + time.perf_counter() - start, 4)


def agent_for(task: Task, model: Model, sampling: SamplingParams) -> Agent:
    """The agent that a task asks for."""
    return Agent(
        model,
        task.build_tools(),
        system=task.system,
        thinking=task.agent.thinking,
        effort=task.agent.effort,
        sampling=sampling,
        limits=Limits(
            max_turns=task.agent.max_turns, max_tokens=task.agent.max_tokens, wall_time_s=task.agent.timeout_s
        ),
    )


def trial_seed(seed: int, trial: str) -> int:
    """The sampling seed of one trial: any two trials of a run differ, and the same trial of the same run repeats."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{trial}".encode()).digest()[:4])
