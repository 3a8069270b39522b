"""Run a suite: every task and epoch on one model, several trials at a time, recorded as they happen.

A run that was interrupted, even by SIGKILL, is resumed with the same settings; see `resume.py`.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import anyio

from agentkit.agent import Agent
from agentkit.approval import AskHuman, Policy
from agentkit.checks import check_positive
from agentkit.compaction import Compaction
from agentkit.errors import (
    ApiKeyError,
    MissingDependencyError,
    TaskSetupError,
    TrajectoryError,
    UnknownModelError,
    first_cause,
)
from agentkit.events import CallStarted, LimitName, RunFinished, Status, TurnStarted
from agentkit.harbor import HarborConfig, HarborStep
from agentkit.limits import CostBudget, Limits
from agentkit.model import Model, Usage
from agentkit.prices import Price, check_price, describe_reference, list_cost, price_of, reference_price
from agentkit.saved import remove_snapshots
from agentkit.task import CallsConfig, Task, TestsConfig
from agentkit.trajectory import Trajectory
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import Environment, EnvironmentPool, reap
from agentkit_evals.blame import Phase, blame, describe, well_formed
from agentkit_evals.errors import RunDirectoryError
from agentkit_evals.harbor import episode as harbor
from agentkit_evals.harbor.episode import episode, for_step, prior
from agentkit_evals.harbor.sandbox import settled, specification
from agentkit_evals.record import (
    Failure,
    RunDirectory,
    RunLock,
    TrialLog,
    TrialRecord,
    lock_bytes,
    patch_path,
    trajectory_path,
    write_lock,
)
from agentkit_evals.resume import Begun, prepare
from agentkit_evals.selfcheck import StartChecks
from agentkit_evals.statistics import SOLVED
from agentkit_evals.suite import Case, Suite
from agentkit_evals.verify import Backend, Verdict, answer_of, backend_for, begin, collect, opened, verify
from agentkit_tools import Tool

MAX_LINES_SHOWN = 20
NO_MODEL = (ApiKeyError, MissingDependencyError, UnknownModelError)
"""Errors of a model that would occur in every other trial, too."""
MAX_ANSWER_CHARS = 1_000_000
"""Maximum characters of an answer in a trial's record. The verifier gets the whole answer."""


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A trial has begun, or goes on after `kept_turns` turns in a resumed run; its sandbox is being opened.

    If its agent had ended (`has_ended`), the trial is only scored. `why_again` is the reason why a trial of a resumed
    run starts again.
    """

    trial: str
    attempt: int = 1
    kept_turns: int = 0
    has_ended: bool = False
    why_again: str = ""


@dataclass(frozen=True, slots=True)
class TrialActed:
    """A trial has started a turn or a call, for a progress display."""

    trial: str
    turn: int
    doing: str


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """A trial has ended and its record is written."""

    record: TrialRecord


Update = TrialStarted | TrialActed | TrialFinished


@dataclass(slots=True)
class EvalRun:
    """One evaluation: `epochs` runs of every task of a suite on one model, `concurrency` trials at a time.

    Attributes:
        suite: Tasks to run.
        model: A model for all trials, already entered (`async with`), or a function that returns a model for a case.
        directory: Path of the run directory. `execute` creates it; it must not exist, unless `resume` is set.
        model_name: Name of the model in `run.json`.
        epochs: Number of times that each task is run.
        concurrency: Maximum number of trials at the same time.
        warm: Maximum number of sandboxes that are opened ahead of the trials and verifiers that will need them. Each is
            used once. Images that are built from a folder are built ahead, too.
        backend: Sandbox backend; None uses the one that each task sets.
        seed: Base seed. Each trial derives its sampling seed from this seed, the task and the epoch.
        sampling: Sampling parameters, except the seed; None uses the model's own.
        max_cost_usd: Maximum cost of the run in US dollars. Once it is spent, no trial and no turn starts; trials that
            have not ended by then are not recorded, as after an interruption. None means no limit.
        listener: Function called with each update, on the event loop's thread.
        run_id: Label of the run's sandboxes.
        start_checks: Results for verifiers that did not start, shared by all trials.
        list_price: List price used to estimate what trials of embedded models would have cost.
        resume: True to resume the interrupted run in `directory`. Its finished trials are kept. Trials that had begun
            go on after their last complete turn if the task has `environment.snapshots`, else before their first turn
            that may have changed a file, and those whose agent had ended are scored. If that is the first turn, or the
            files to score are gone, they start again, and so do trials that an infrastructure failure kept from being
            scored; earlier attempts are kept in `attempts/`. Only `concurrency`, `warm`, `max_cost_usd` and
            `model_options` may differ from those of the run; the costs of all attempts count.
        model_options: Options that load the model, recorded for `agentkit eval --resume`.

    Raises:
        PriceError: `max_cost_usd` is given and the price of the model is unknown, or a price table cannot be used.
    """

    suite: Suite
    model: Model | Callable[[Case], Model]
    directory: Path
    model_name: str
    epochs: int = 1
    concurrency: int = 2
    warm: int = 0
    backend: Backend | None = None
    seed: int = 0
    sampling: SamplingParams | None = None
    max_cost_usd: float | None = None
    listener: Callable[[Update], None] = field(default=lambda update: None)
    run_id: str = field(default_factory=lambda: secrets.token_hex(6))
    start_checks: StartChecks = field(default_factory=StartChecks)
    list_price: Price = field(default_factory=reference_price)
    resume: bool = False
    model_options: dict[str, str | int] = field(default_factory=dict)
    budget: CostBudget | None = field(default=None, init=False)
    pool: EnvironmentPool = field(init=False)

    def __post_init__(self) -> None:
        if self.max_cost_usd is not None:
            self.budget = CostBudget(self.max_cost_usd)
            if not callable(self.model):
                check_price(self.model, self.model_name)
        check_positive("EvalRun(epochs=...)", self.epochs, whole=True)
        check_positive("EvalRun(concurrency=...)", self.concurrency, whole=True)
        self.pool = EnvironmentPool(self.warm, run_id=self.run_id)

    @property
    def resolved_sampling(self) -> SamplingParams:
        """Sampling parameters of every trial, except the seed."""
        return self.sampling or (SamplingParams() if callable(self.model) else self.model.sampling)

    async def execute(self) -> RunDirectory:
        """Run every trial, then read the finished run from disk.

        A failed trial is recorded and does not stop the others, unless no trial can use the model. Cancellation stops
        running agents and removes sandboxes; the directory then holds the trials that had finished.

        Raises:
            RunDirectoryError: the directory already exists; or, with `resume`, it is not a run, has other settings
                (the message names the first), or is in use by another process.
            OutputError, OSError: the directory cannot be written.
            ModelError: an error of a type in `NO_MODEL` occurred.
        """
        lock = self._lock()
        if not self.resume:
            data = lock_bytes(lock)
            try:
                self.directory.mkdir(parents=True)
            except FileExistsError as exc:
                raise RunDirectoryError(
                    f"{self.directory} exists already; a run is never overwritten, but resumed if asked to"
                ) from exc
            write_lock(self.directory, data)
        RunDirectory.open(self.directory)  # checks that it is a run before a file is opened for writing
        with TrialLog(self.directory) as log:
            begun: dict[str, Begun] = {}
            finished: set[str] = set()
            if self.resume:
                found = RunDirectory.open(self.directory)  # as it is now that no other process can add to it
                begun = prepare(found, lock)
                finished = {trial.trial for trial in found.trials if not trial.is_retried}
                if self.budget is not None:
                    self.budget.add(found.usage.cost_usd if found.usage.turns else 0.0)
                if found.lock.run_id is not None:
                    await reap(found.lock.run_id)
            trials = [
                _Trial(self, case, epoch, begun.get(trial_name(case.task, epoch), Begun(1)))
                for case in self.suite.cases  # epochs of a task are neighbours: its prompt is in the engine's cache
                for epoch in range(self.epochs)
                if trial_name(case.task, epoch) not in finished
            ]
            plan = iter(trials)
            try:
                async with self.pool, anyio.create_task_group() as workers:
                    for trial in trials:
                        trial.announce()
                    for number in range(min(self.concurrency, len(trials))):
                        workers.start_soon(self._work, plan, log, name=f"eval worker {number}")
            except ExceptionGroup as group:
                raise first_cause(group) from group
        return RunDirectory.open(self.directory)

    def _lock(self) -> RunLock:
        price = None if callable(self.model) else price_of(self.model)
        cases = self.suite.cases
        return RunLock(
            name=self.suite.name,
            model=self.model_name,
            fingerprint=None if callable(self.model) else getattr(self.model, "fingerprint", None),
            model_options=self.model_options,
            backend=self.backend,
            epochs=self.epochs,
            concurrency=self.concurrency,
            warm=self.warm,
            seed=self.seed,
            sampling=self.resolved_sampling,
            tasks=[case.task for case in cases],
            families={case.task.id: case.family for case in cases},
            phrasings={case.task.id: case.phrasing for case in cases if case.phrasing},
            held_out_phrasings=[case.task.id for case in cases if case.held_out_phrasing],
            max_cost_usd=self.max_cost_usd,
            prices_as_of=None if price is None else price.as_of,
            list_price=describe_reference(self.list_price),
            run_id=self.run_id,
        )

    async def _work(self, plan: Iterator[_Trial], log: TrialLog) -> None:
        for trial in plan:
            if self.budget is not None and self.budget.spent:
                return
            record = await trial.run()
            if record is None:
                return
            log.append(record)
            if trial.task.environment.snapshots:
                with suppress(OSError):  # a resumed run removes it, too
                    remove_snapshots(trial.trajectory)
            self.listener(TrialFinished(record))


class _Trial:
    """One epoch of one task: runs its steps in order and returns a record, complete or not."""

    def __init__(self, run: EvalRun, case: Case, epoch: int, begun: Begun) -> None:
        self.eval_run = run
        self.case = case
        self.task: Task = case.task
        self.epoch = epoch
        self.begun = begun
        self.name = trial_name(case.task, epoch)
        self.backend: str | None = None
        self.status: Status | None = None
        self.usage = Usage()
        self.list_cost_usd: float | None = None
        self.answer: str | None = None
        self.session: Trajectory | None = None  # of the steps before, in a task that has several
        self.phase: Phase = "setup"
        self.dropped: tuple[str, ...] = ()
        self.refused: list[str] = []
        self.verifier_output = ""
        self.seconds = {"setup_s": 0.0, "agent_s": 0.0, "verify_s": 0.0}
        self.trajectory = trajectory_path(run.directory, self.name)

    async def run(self) -> TrialRecord | None:
        """Run the trial and return its record; None if the run's budget was spent before the agent was done."""
        begun = self.begun
        self.eval_run.listener(
            TrialStarted(self.name, begun.attempt, begun.kept_turns, begun.has_ended, begun.why_again)
        )
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        failure: Failure | None = None
        error: str | None = None
        reward: float | None = None
        try:
            verdict = await self._scored()
            if verdict is None:
                return None
            reward, error = verdict.reward, verdict.error
        except Exception as exc:  # one failed trial must not stop the others
            if isinstance(first_cause(exc), NO_MODEL):
                raise
            error = str(exc) if isinstance(exc, TaskSetupError) else describe(exc)
            match blame(exc, self.phase):
                case "agent":
                    reward = 0.0
                case "task" | "infrastructure" as broken:
                    failure = broken
        self._recall()
        if failure is None and reward is not None and reward < SOLVED:
            scored_turn = isinstance(self.task.verifier, CallsConfig) and self.answer is not None  # not cut off
            failure = "limit" if self.status == "limit" and not scored_turn else "model"
        return TrialRecord(
            trial=self.name,
            task=self.task.id,
            epoch=self.epoch,
            attempt=self.begun.attempt,
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
            refused=self.refused,
            backend=self.backend,
            usage=self.usage,
            list_cost_usd=self.list_cost_usd,
            started=started,
            **self.seconds,
        )

    def announce(self) -> None:
        """Tell the pool which sandboxes the trial will open."""
        config, verifier = self.task.environment, self.task.verifier
        if isinstance(verifier, CallsConfig):
            return
        count = 1 if isinstance(verifier, HarborConfig) else 2  # the agent's, and the verifier's
        if self.begun.snapshot is not None and not isinstance(verifier, TestsConfig):
            count -= 1
        with suppress(TaskSetupError):  # the trial will raise it
            spec, backend = specification(config), backend_for(self.task, self.eval_run.backend)
            prepare = None if config.build is None else partial(settled, config)
            for _ in range(count):
                self.eval_run.pool.expect(spec, backend=backend, prepare=prepare)

    async def _scored(self) -> Verdict | None:
        """Run the agent, then score its workdir and answer; None if the budget stopped the agent."""
        backend = backend_for(self.task, self.eval_run.backend)
        work = await self._act(backend)
        if work is None:
            return None
        with self._timed("verify_s"):
            run_id = self.eval_run.run_id
            if isinstance(work, Verdict):
                verdict = work
            else:
                pool = self.eval_run.pool
                verdict = await verify(
                    self.task, archive=work, answer=self.answer, backend=backend, run_id=run_id, pool=pool
                )
            self.verifier_output = verdict.output
            self.refused += verdict.refused
            await self.eval_run.start_checks.require(self.task, verdict, backend=backend, run_id=run_id)
        return verdict

    async def _act(self, backend: Backend) -> bytes | Verdict | None:
        """Run the agent in its sandbox and return its work, or the score of a task that is scored there.

        None if the budget stopped the agent.
        """
        async with AsyncExitStack() as stack:
            with self._timed("setup_s"):
                environment, start = await self._open(stack, backend)
            if isinstance(self.task.verifier, HarborConfig):
                return await self._episode(self.task.verifier, environment)
            if self.begun.has_ended:
                assert self.begun.record is not None
                self._note_answer(self.begun.record)
            else:
                self.phase = "agent"
                with self._timed("agent_s"):
                    limit = await self._run_agent(environment)
                if limit == "max_cost_usd":
                    return None
            self.phase = "scoring"
            await environment.kill_all()
            work = await collect(self.task, environment, start)
            self.dropped = work.dropped
            if isinstance(self.task.verifier, TestsConfig):
                patch = patch_path(self.eval_run.directory, self.name)
                patch.parent.mkdir(exist_ok=True)
                patch.write_bytes(work.data)
            return work.data

    async def _open(self, stack: AsyncExitStack, backend: Backend) -> tuple[Environment, str]:
        """Open the agent's sandbox, prepared or with the files of a snapshot; return it with what `begin` returned."""
        run_id, pool, start = self.eval_run.run_id, self.eval_run.pool, ""
        if (snapshot := self.begun.snapshot) is not None:
            if isinstance(self.task.verifier, TestsConfig):  # the snapshot is not the state before the agent started
                async with opened(self.task, backend, run_id, pool=pool) as fresh:
                    await self.task.prepare(fresh)
                    start = await begin(self.task, fresh)
            environment = await stack.enter_async_context(opened(self.task, backend, run_id, snapshot, pool=pool))
            stack.callback(lambda: self.refused.extend(environment.refusals()))
            self.backend = environment.backend
            if isinstance(self.task.verifier, HarborConfig):
                await harbor.prepare(self.task, self.task.verifier, environment, is_restored=True)
            return environment, start
        environment = await stack.enter_async_context(opened(self.task, backend, run_id, pool=pool))
        stack.callback(lambda: self.refused.extend(environment.refusals()))
        if not isinstance(self.task.verifier, CallsConfig):  # a task scored by calls does not use its folder
            self.backend = environment.backend
        await self.task.prepare(environment)
        return environment, await begin(self.task, environment)

    async def _episode(self, config: HarborConfig, environment: Environment) -> Verdict | None:
        """Run the agent on the steps of a Harbor task in one session; None if the budget stopped it."""

        async def act(step: HarborStep, tools: Sequence[Tool]) -> bool:
            if self.begun.has_ended:
                assert self.begun.record is not None
                self._note_answer(self.begun.record)
                self.phase = "scoring"
                return True
            self.phase = "agent"
            with self._timed("agent_s"):
                limit = await self._run_agent(environment, step, tools)
            self.phase = "scoring"
            return limit != "max_cost_usd"

        start, agent_s = time.perf_counter(), self.seconds["agent_s"]
        try:
            return await episode(config, environment, act, run_id=self.eval_run.run_id)
        finally:
            spent = time.perf_counter() - start - (self.seconds["agent_s"] - agent_s)
            self.seconds["verify_s"] = round(self.seconds["verify_s"] + spent, 4)

    def _left_out(self) -> Iterator[str]:
        """Yield lines for the verifier's output that list the entries the verifier did not get, and the connections
        that were refused."""
        for lines, title in (
            (self.dropped, "entries of the work directory were not copied to the verifier"),
            (self.refused, "destinations were refused by the task's network"),
        ):
            if lines:
                yield f"[{len(lines)} {title}:]"
                yield from lines[:MAX_LINES_SHOWN]
                if len(lines) > MAX_LINES_SHOWN:
                    yield "[...]"

    async def _run_agent(
        self, environment: Environment, step: HarborStep | None = None, tools: Sequence[Tool] = ()
    ) -> LimitName | None:
        """Run the agent, on a step of a Harbor task with further tools if given, and return the limit that stopped it,
        if any."""
        sampling = self.eval_run.resolved_sampling.override(seed=trial_seed(self.eval_run.seed, self.name))
        task = self.task if step is None else for_step(self.task, step)
        agent = agent_for(task, self._model(), sampling, budget=self.eval_run.budget, tools=tools)
        metadata = {"trial": self.name, "family": self.case.family, "backend": environment.backend}
        if provenance := self.task.metadata.get("provenance"):
            metadata["provenance"] = provenance
        turn = 0
        limit: LimitName | None = None
        saves = self.task.environment.snapshots  # and the last one is kept until the trial is scored
        if (record := self.begun.record) is not None:
            turns = self.begun.world_turns
            stream = agent.stream(
                None,
                environment=environment,
                history=record,
                world_turns=turns,
                save_snapshots=saves,
                keep_snapshot=saves,
            )
        elif self.session is not None:
            stream = agent.stream(task.instruction, environment=environment, history=self.session)
        else:
            stream = agent.stream(
                task.instruction,
                environment=environment,
                trajectory=self.trajectory,
                metadata=metadata,
                message_history=prior(task),
                save_snapshots=saves,
                keep_snapshot=saves,
            )
        async with aclosing(stream) as events:
            async for event in events:
                match event:
                    case TurnStarted():
                        turn = event.turn + 1
                        self._tell(turn, "thinking" if event.think else "answering")
                    case CallStarted():
                        self._tell(turn, event.call.name)
                    case RunFinished():
                        self.session, limit = event.result.trajectory, event.result.limit
                        self._note_answer(self.session)
        return limit

    def _note_answer(self, trajectory: Trajectory) -> None:
        answer = answer_of(self.task, trajectory)
        self.answer = None if answer is None else well_formed(answer)

    def _model(self) -> Model:
        model = self.eval_run.model
        return model(self.case) if callable(model) else model

    def _recall(self) -> None:
        """Set status, usage and list cost from the trajectory, which has them even if the run failed."""
        with suppress(TrajectoryError):
            trajectory = Trajectory.load(self.trajectory)
            outcome = trajectory.outcome
            if outcome is not None:
                self.status, self.usage = outcome.status, trajectory.usage
                self.list_cost_usd = list_cost(trajectory, self.eval_run.list_price)

    def _tell(self, turn: int, doing: str) -> None:
        self.eval_run.listener(TrialActed(self.name, turn, doing))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(self.seconds[part] + time.perf_counter() - start, 4)


def agent_for(
    task: Task,
    model: Model,
    sampling: SamplingParams,
    *,
    max_cost_usd: float | None = None,
    budget: CostBudget | None = None,
    approval: Policy | Sequence[Policy] = (),
    on_ask: AskHuman | None = None,
    tools: Sequence[Tool] = (),
) -> Agent:
    """Return the agent that a task specifies, with a limit on the cost of each run, a budget shared with others,
    approvals, and further tools.

    If the task scores calls, the agent has one turn.

    Raises:
        PriceError: there is a limit on the cost, and the price of the model is unknown.
    """
    max_turns = 1 if isinstance(task.verifier, CallsConfig) else task.agent.max_turns
    compact_at = task.agent.compact_at_tokens
    return Agent(
        model,
        [*task.build_tools(), *tools],
        system=task.system,
        thinking=task.agent.thinking,
        effort=task.agent.effort,
        sampling=sampling,
        output_schema=task.output_schema,
        limits=Limits(
            max_turns=max_turns,
            max_tokens=task.agent.max_tokens,
            max_cost_usd=max_cost_usd,
            wall_time_s=task.agent.timeout_s,
        ),
        budget=budget,
        approval=approval,
        on_ask=on_ask,
        compaction=None if compact_at is None else Compaction(at_tokens=compact_at),
    )


def trial_name(task: Task, epoch: int) -> str:
    """Return the name of a trial."""
    return f"{task.id}.{epoch}"


def trial_seed(seed: int, trial: str) -> int:
    """Return a trial's sampling seed: distinct for each trial of a run, and the same when the trial is repeated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{trial}".encode()).digest()[:4])
