"""`agentkit run`: run an agent on a task file or an instruction, optionally on a copy of your own folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer

from agentkit.cli.approve import ApproveChoice, ApproveFlag, approval_options
from agentkit.cli.changes import Written, check_flags, is_confirmed, name_host, print_diff, print_written, write
from agentkit.cli.ending import ExitCode, run
from agentkit.cli.live import LiveLines
from agentkit.cli.mcp import MCPFlag, equipped, read_servers, with_tools
from agentkit.cli.model import load_model, model_options, recorded_options
from agentkit.cli.options import (
    ApplyFlag,
    BaseUrlFlag,
    BranchFlag,
    CacheFlag,
    CompactAtFlag,
    CopyFlag,
    DeviceFlag,
    DevicesFlag,
    EffortFlag,
    EnvFlag,
    ExpertCacheFlag,
    GrammarFlag,
    IncludeIgnoredFlag,
    JsonFlag,
    KVCacheDtypeFlag,
    MaxCostFlag,
    MinPFlag,
    ModelFlag,
    NoGrammarFlag,
    NoKeyFlag,
    NoProviderFlag,
    PatchFlag,
    PenaltyFlag,
    SamplingFlags,
    SeedFlag,
    SnapshotsFlag,
    TemperatureFlag,
    ThreadsFlag,
    TopKFlag,
    TopPFlag,
    WorkdirFlag,
    foreign_tasks,
    given_parameters,
    is_solved,
    with_snapshots,
)
from agentkit.cli.terminal import console, counted, say

RESCUE_S = 10.0
"""Seconds for reading the changes of a run that failed or was interrupted."""

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.agent import Agent
    from agentkit.cli.workdir import Change
    from agentkit.cli.workspace import Workspace
    from agentkit.events import Event
    from agentkit.harbor import HarborConfig, HarborStep
    from agentkit.messages import Message
    from agentkit.result import RunResult
    from agentkit.task import Task
    from agentkit.trajectory import Trajectory
    from agentkit_environments import Environment
    from agentkit_evals.verify import Backend, Verdict
    from agentkit_tools import MCPServer, Tool


def command(
    ctx: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="TASK", help="A task file (.yaml), a Harbor task directory, or an instruction in words."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="TRAJECTORY",
            exists=True,
            dir_okay=False,
            help="Continue the interrupted run that --trajectory recorded in this file, with its task and settings.",
        ),
    ] = None,
    workdir: WorkdirFlag = None,
    include_ignored: IncludeIgnoredFlag = False,
    copy: CopyFlag = False,
    apply: ApplyFlag = False,
    patch: PatchFlag = None,
    branch: BranchFlag = None,
    model: ModelFlag = "tiny",
    base_url: BaseUrlFlag = None,
    device: DeviceFlag = None,
    devices: DevicesFlag = None,
    threads: ThreadsFlag = None,
    expert_cache_bytes: ExpertCacheFlag = None,
    kv_cache_dtype: KVCacheDtypeFlag = None,
    effort: EffortFlag = None,
    env: EnvFlag = None,
    mcp: MCPFlag = None,
    seed: SeedFlag = None,
    temperature: TemperatureFlag = None,
    top_p: TopPFlag = None,
    top_k: TopKFlag = None,
    min_p: MinPFlag = None,
    repetition_penalty: PenaltyFlag = None,
    grammar: GrammarFlag = None,
    no_grammar: NoGrammarFlag = False,
    output_schema: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A file with a JSON schema for the answer; the agent then has no `submit` tool.",
        ),
    ] = None,
    approve: ApproveFlag = ApproveChoice.ALL,
    max_turns: Annotated[int | None, typer.Option(min=1, max=1 << 31, help="Maximum number of model turns.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, max=1 << 31, help="Maximum number of sampled tokens.")
    ] = None,
    max_cost: MaxCostFlag = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, max=1e7, help="Time limit in seconds.")] = None,
    compact_at: CompactAtFlag = None,
    trajectory: Annotated[Path | None, typer.Option(help="Save the trajectory to this new file.")] = None,
    snapshots: SnapshotsFlag = False,
    history: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A conversation that comes before the task: an ATIF file (.json), or a trajectory of agentkit.",
        ),
    ] = None,
    cache_dir: CacheFlag = None,
    as_json: JsonFlag = False,
    no_key: NoKeyFlag = None,
    no_provider: NoProviderFlag = None,
) -> ExitCode:
    """Run an agent on a task file, a Harbor task directory, or an instruction in words.

    Exits with 0 if solved: the agent gave an answer, and reward 1 if the task has a verifier. Exits with 1 on no
    answer, an answer that does not match --output-schema, a limit, or a reward below 1, and prints the reason.
    """
    from agentkit.prices import reference_price
    from agentkit.task import HarborConfig, VerifierConfig
    from agentkit_evals.run import agent_for

    if resume is not None:
        job = _resumed(ctx, resume)
        return carry_out(job, apply=apply, as_json=as_json, patch=patch, branch=branch)
    if what is None:
        raise typer.BadParameter("give a task, or a trajectory with --resume", param_hint="TASK")
    flags = SamplingFlags.of(
        grammar,
        no_grammar,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    task = _read_task(what)
    if isinstance(task.verifier, HarborConfig) and workdir is not None:
        raise typer.BadParameter(f"{what} runs in the folder of its image; leave it out", param_hint="--workdir")
    if not isinstance(task.verifier, VerifierConfig | HarborConfig | None):
        raise typer.BadParameter(
            f"{what} is scored by calls or tests; run it with `agentkit eval {shlex.quote(what)}`", param_hint="TASK"
        )
    check_flags(workdir, include_ignored=include_ignored, copy=copy, apply=apply, patch=patch, branch=branch)
    if trajectory is not None and trajectory.exists():
        raise typer.BadParameter(
            f"{trajectory} already exists and is never overwritten; give a new path", param_hint="--trajectory"
        )
    if snapshots:
        if trajectory is None:
            raise typer.BadParameter("they are saved beside --trajectory FILE; give that too", param_hint="--snapshots")
        task = with_snapshots(task)
    if task.environment.snapshots and workdir is not None:
        raise typer.BadParameter(
            "the files of --workdir cannot be captured; leave out --snapshots, or `environment.snapshots` of the task",
            param_hint="--snapshots",
        )
    settings = {
        "max_turns": max_turns,
        "max_tokens": max_tokens,
        "timeout_s": timeout,
        "compact_at_tokens": compact_at,
        "effort": effort and effort.value,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    task = task.model_copy(update={"agent": task.agent.model_copy(update=given)})
    if output_schema is not None:
        tools = [tool for tool in task.tools if tool != "submit"]
        task = task.model_copy(update={"output_schema": _read_schema(output_schema), "tools": tools})
    servers = read_servers(mcp)
    before = None if history is None else read_history(history)
    terminal = console(quiet=as_json)
    reference_price()  # reports a broken price table before the run, not after it
    source = load_model(
        model,
        device=device,
        devices=devices,
        threads=threads,
        expert_cache_bytes=expert_cache_bytes,
        kv_cache_dtype=kv_cache_dtype,
        cache_dir=cache_dir,
        base_url=base_url,
    )
    sampling = source.sampling.override(seed=seed, **flags.changes())
    agent = agent_for(task, source, sampling, max_cost_usd=max_cost, **approval_options(approve))
    backend: Backend | None = env.value if env else None
    metadata: dict[str, Any] | None = None
    if trajectory is not None and not (isinstance(task.verifier, HarborConfig) and task.verifier.beside_the_sandbox):
        from agentkit.cli.resume import RunSettings

        settings_of_run = RunSettings(
            task=task,
            load=model_options(model, ctx.params),
            fingerprint=getattr(source, "fingerprint", None),
            env=backend,
            workdir=None if workdir is None else str(workdir.resolve()),
            include_ignored=include_ignored,
            copied=copy,
            mcp=None if mcp is None else str(mcp.resolve()),
            history=None if history is None else str(history.resolve()),
            approve=approve.value,
            max_cost_usd=max_cost,
        )
        metadata = {"run": settings_of_run.model_dump(mode="json", exclude_defaults=True)}
    job = Job(
        task,
        agent,
        backend,
        workdir,
        trajectory,
        terminal,
        servers,
        include_ignored=include_ignored,
        copy=copy,
        metadata=metadata,
        history=before,
    )
    return carry_out(job, apply=apply, as_json=as_json, patch=patch, branch=branch)


def _resumed(ctx: typer.Context, path: Path) -> Job:
    """Return the job that continues a recorded run.

    Raises:
        typer.BadParameter: A parameter is given that the record has fixed.
        TrajectoryError: The record cannot be read or resumed.
    """
    from agentkit.cli.resume import RunSettings, refuse_fixed
    from agentkit.errors import ResumeError
    from agentkit.events import TurnStarted
    from agentkit.prices import reference_price
    from agentkit.task import HarborConfig
    from agentkit.trajectory import Trajectory
    from agentkit_evals.run import agent_for

    given = given_parameters(ctx)
    refuse_fixed(given, path)
    record = Trajectory.load(path)
    settings = RunSettings.of(record)
    verifier = settings.task.verifier
    has_history = settings.history is not None or (isinstance(verifier, HarborConfig) and verifier.history is not None)
    if has_history and not any(isinstance(each, TurnStarted) for each in record.records):
        option = "" if settings.history is None else f", with --history {settings.history}"
        raise ResumeError(f"{path} has no turn of its run yet; start the run again{option}")
    workdir = None if settings.workdir is None else Path(settings.workdir)
    if workdir is not None and not workdir.is_dir():
        raise typer.BadParameter(f"the folder of the run, {workdir}, does not exist", param_hint="--resume")
    check_flags(workdir, apply=ctx.params["apply"], patch=ctx.params["patch"], branch=ctx.params["branch"])
    servers = read_servers(None if settings.mcp is None else Path(settings.mcp))
    reference_price()
    source = load_model(str(settings.load["model"]), **recorded_options(settings.load, ctx, given))
    settings.check_fingerprint(source)
    agent = agent_for(
        settings.task,
        source,
        record.header.sampling,
        max_cost_usd=ctx.params["max_cost"] if "max_cost" in given else settings.max_cost_usd,
        **approval_options(ApproveChoice(settings.approve)),
    )
    return Job(
        settings.task,
        agent,
        settings.env,
        workdir,
        None,
        console(quiet=ctx.params["as_json"]),
        servers,
        include_ignored=settings.include_ignored,
        copy=settings.copied,
        record=record,
    )


def _read_task(what: str) -> Task:
    """Return the task of a task file or directory, or one with the instruction `what`. Raises BadParameter."""
    from agentkit.task import Task, load_task
    from agentkit_evals.harbor import is_task_directory, read_task_directory

    if not what.strip():
        raise typer.BadParameter("it is empty; give a task file or an instruction", param_hint="TASK")
    if "\0" in what or any("\ud800" <= letter <= "\udfff" for letter in what):
        raise typer.BadParameter("it is not UTF-8 text", param_hint="TASK")
    if what.endswith((".yaml", ".yml")):
        return load_task(what)
    if os.path.isdir(what):
        if is_task_directory(Path(what)):
            return read_task_directory(Path(what))
        hint = f"`agentkit eval {shlex.quote(what)}` runs every task in a folder"
    elif os.path.exists(what) or what.endswith(".toml") or ("/" in what and not any(map(str.isspace, what))):
        hint = foreign_tasks(Path(what)) or "task files end in .yaml"
    else:
        return Task(id="run", instruction=what)
    raise typer.BadParameter(f"{what} is not a task file: {hint}. Or give an instruction in words", param_hint="TASK")


def read_history(path: Path) -> Sequence[Message]:
    """Read the messages of an ATIF file or a trajectory.

    Raises:
        TrajectoryError: The file cannot be read, or is neither.
        typer.BadParameter: The messages are not a conversation that a model can continue.
    """
    from agentkit.atif import load_atif
    from agentkit.history import opening_messages
    from agentkit.messages import UserMessage
    from agentkit.trajectory import Trajectory

    messages = load_atif(path) if path.suffix == ".json" else Trajectory.load(path).messages
    try:
        return opening_messages(messages, UserMessage(""), system="", output_schema=None)[:-1]
    except ValueError as exc:
        raise typer.BadParameter(f"{path}: {exc}", param_hint="--history") from exc


def _read_schema(path: Path) -> dict[str, Any]:
    """Read a JSON schema from a file. Raises BadParameter if the file holds none."""
    from agentkit.output import check_output_schema
    from agentkit_engine.untrusted import parse_json, read_regular

    try:
        schema: dict[str, Any] = parse_json(read_regular(path, max_bytes=1 << 20), max_values=20_000)
        check_output_schema(schema)
    except OSError as exc:
        raise typer.BadParameter(f"{path}: cannot be read: {exc.strerror}", param_hint="--output-schema") from exc
    except ValueError as exc:
        raise typer.BadParameter(f"{path}: {exc}", param_hint="--output-schema") from exc
    return schema


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a job.

    Attributes:
        result: The agent's run.
        backend: The sandbox backend it ran in.
        changes: Changes to the user's folder or, without one, to the task's files.
        verdict: The score, if the task has a verifier.
    """

    result: RunResult
    backend: str
    changes: list[Change]
    left_out: list[str]
    """One line for each entry of the folder that was not copied in or out."""
    verdict: Verdict | None
    lost: str | None = None
    """The reason the files could not be taken out of the sandbox, if the agent is at fault."""

    @property
    def failure(self) -> str | None:
        """The reason the job is not solved, in a few words; None if it is solved."""
        match self.result.status:
            case "limit":
                return f"the limit {self.result.limit} was reached"
            case "invalid_output":
                return "the answer does not match the schema"
            case "no_answer":
                return "no answer was given"
        if self.lost is not None:
            return f"the files are lost: {self.lost}"
        if self.verdict is not None:
            return None if is_solved(self.verdict.reward) else f"reward {self.verdict.reward:g} is below 1"
        return None if self.result.answer else "no answer was given"


@dataclass(frozen=True, slots=True)
class Job:
    """One agent run, from opening the sandbox to scoring."""

    task: Task
    agent: Agent
    backend: Backend | None
    workdir: Path | None
    trajectory: Path | None
    console: Console
    servers: Sequence[MCPServer] = ()
    include_ignored: bool = False
    """True if the agent sees the files of `workdir` that git ignores."""
    copy: bool = False
    """True if `workdir` is copied even if an overlay is possible."""
    metadata: dict[str, Any] | None = None
    """JSON values for the header of the trajectory."""
    record: Trajectory | None = None
    """The record of an interrupted run that is resumed, instead of a new `trajectory`."""
    history: Sequence[Message] | None = None
    """Messages before the task."""
    refused: list[str] = field(default_factory=list)
    """The connections that the task's network refused, with phase and reason."""
    rescued: list[Change] = field(default_factory=list)
    """The changes to `workdir` before the agent's run failed or was interrupted."""

    async def run(self) -> Done:
        """Show the user's folder to the agent, run it with live output on the console, and collect the changes.

        Raises:
            MCPServerError, SandboxError, TaskSetupError, VerifierError, EngineError: The machine or the task failed.
            typer.BadParameter: The user's folder cannot be listed, or is too large to copy.
        """
        from agentkit.cli import workdir as folder
        from agentkit.saved import saved_snapshot
        from agentkit.task import HarborConfig
        from agentkit_environments import Snapshot
        from agentkit_evals.blame import blame, describe
        from agentkit_evals.selfcheck import StartChecks
        from agentkit_evals.verify import backend_for, broken, opened, verify

        spec, where = self.task.environment.spec(), backend_for(self.task, self.backend)
        async with AsyncExitStack() as stack:
            agent = await stack.enter_async_context(equipped(self.agent, self.servers))
            if isinstance(self.task.verifier, HarborConfig):
                return await self._run_steps(self.task.verifier, where, agent, stack)
            workspace = await stack.enter_async_context(self._workspace(self.workdir)) if self.workdir else None
            environment = (
                workspace.environment if workspace else await stack.enter_async_context(opened(self.task, where))
            )
            stack.callback(lambda: self.refused.extend(environment.refusals()))
            await self.task.prepare(environment)
            # With --workdir the diff is against the user's folder and includes the task's setup.
            # Otherwise it starts after the setup.
            before = {} if workspace else folder.unpack((await environment.export_dir(spec.workdir)).data)
            world_turns = 0
            if self.record is not None and (saved := saved_snapshot(self.record)) is not None:
                await environment.close()
                snapshot, world_turns = Snapshot.load(saved.path), saved.turns
                environment = await stack.enter_async_context(opened(self.task, where, None, snapshot))
            try:
                result = await self._run_in(environment, agent, world_turns, self.history)
            except BaseException:  # also Ctrl-C
                if workspace:  # report the first failure; without a sandbox, the changes are lost
                    with anyio.move_on_after(RESCUE_S, shield=True), suppress(Exception):
                        await environment.kill_all()
                        self.rescued.extend((await workspace.changes())[0])
                raise
            try:
                await environment.kill_all()
                if workspace:
                    changed, left_out, archive = await workspace.changes()
                else:
                    exported = await environment.export_dir(spec.workdir)
                    archive, left_out = exported.data, [*exported.dropped]
                    changed = folder.without_dropped(folder.changes(before, folder.unpack(archive)), left_out)
            except Exception as exc:
                if blame(exc, "scoring") == "infrastructure":
                    raise
                lost = describe(exc)
                verdict = broken(lost) if self.task.verifier else None
                return Done(result, environment.backend, [], [], verdict, lost)
        verdict = None
        if self.task.verifier is not None:
            assert archive is not None, "a task with a verifier gets a copy"
            verdict = await verify(self.task, archive=archive, answer=result.answer, backend=where)
            await StartChecks().require(self.task, verdict, backend=where)
        return Done(result, environment.backend, changed, left_out, verdict)

    async def _run_steps(self, config: HarborConfig, where: Backend, agent: Agent, stack: AsyncExitStack) -> Done:
        """Run the agent on each step of a Harbor task in one session, and score each in the sandbox."""
        from agentkit.saved import saved_snapshot
        from agentkit_environments import Snapshot, reap
        from agentkit_evals.harbor.episode import episode, for_step, prepare, prior
        from agentkit_evals.selfcheck import StartChecks
        from agentkit_evals.verify import opened

        snapshot, world_turns = None, 0
        if self.record is not None:
            await reap()  # the interrupted run may have left a container
            if (saved := saved_snapshot(self.record)) is not None:
                snapshot, world_turns = Snapshot.load(saved.path), saved.turns
        environment = await stack.enter_async_context(opened(self.task, where, None, snapshot))
        stack.callback(lambda: self.refused.extend(environment.refusals()))
        await prepare(self.task, config, environment, is_restored=snapshot is not None)
        last: list[RunResult] = []
        own = agent.tools

        async def act(step: HarborStep, tools: Sequence[Tool]) -> bool:
            task = for_step(self.task, step)
            agent.tools = with_tools(own, tools)
            agent.limits = replace(agent.limits, wall_time_s=task.agent.timeout_s)
            if last:
                stream = agent.stream(task.instruction, environment=environment, history=last[-1].trajectory)
                last.append(await self._follow(stream))
            else:
                last.append(await self._run_in(environment, agent, world_turns, self.history or prior(task)))
            return True

        verdict = await episode(config, environment, act)
        assert verdict is not None, "no run of the agent ends the trial"
        await StartChecks().require(self.task, verdict, backend="docker")
        return Done(last[-1], environment.backend, [], [], verdict)

    def _workspace(self, workdir: Path) -> AbstractAsyncContextManager[Workspace]:
        from agentkit.cli.workspace import open_workspace

        name_host(self.agent.model, workdir)
        how = {"include_ignored": self.include_ignored, "copy": self.copy}
        return open_workspace(self.task, self.backend, workdir.resolve(), self.console, **how)

    async def _run_in(
        self, environment: Environment, agent: Agent, world_turns: int, history: Sequence[Message] | None
    ) -> RunResult:
        if self.record is None:
            stream = agent.stream(
                self.task.instruction,
                environment=environment,
                trajectory=self.trajectory,
                metadata=self.metadata,
                message_history=history,
                save_snapshots=self.task.environment.snapshots and self.trajectory is not None,
            )
        else:
            stream = self._resume_in(environment, agent, self.record, world_turns)
        return await self._follow(stream)

    async def _follow(self, stream: AsyncGenerator[Event, None]) -> RunResult:
        """Show the events of a run and return its result."""
        from agentkit.events import RunFinished

        result: RunResult | None = None
        live = LiveLines(self.console, asks=self.agent.approvals.can_ask)
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    live.hear(event)
                    show(self.console, event)
                    if isinstance(event, RunFinished):
                        result = event.result
        except BaseException:
            live.remove()
            self.console.print()  # end the line of an incomplete text
            raise
        assert result is not None, "a run that does not raise ends with RunFinished"
        return result

    def _resume_in(
        self, environment: Environment, agent: Agent, record: Trajectory, world_turns: int
    ) -> AsyncGenerator[Event, None]:
        """Resume the run in a new sandbox with the effects of `world_turns` turns; print what is done again."""
        from agentkit.events import TurnStarted
        from agentkit.interrupted import interrupted_run

        saves = self.task.environment.snapshots
        begun = sum(isinstance(each, TurnStarted) for each in record.records)
        if not begun:
            record.rewind(0)  # perhaps not all messages were written
            return agent.stream(self.task.instruction, environment=environment, history=record, save_snapshots=saves)
        point = interrupted_run(record, agent.tools, world_turns=world_turns)
        kept = sum(isinstance(each, TurnStarted) for each in record.records[: point.length])
        again = f", with the files from before turn {kept}" if point.files_restored else ""
        if kept < begun:
            again = (
                f"; turns {kept + 1} to {begun} are done again" if kept + 1 < begun else f"; turn {begun} is done again"
            )
        say(self.console, f"resuming {record.path} after {counted(kept, 'turn')}{again}", "dim")
        return agent.stream(
            None, environment=environment, history=record, world_turns=world_turns, save_snapshots=saves
        )


def carry_out(
    job: Job, *, apply: bool, as_json: bool, patch: Path | None = None, branch: str | None = None
) -> ExitCode:
    """Run the job, print how it ended, and write the changes to the user's folder where the user wants them.

    Args:
        job: The job.
        apply: Apply the changes to the folder. Without this, `patch` and `branch`, a user at a terminal is asked.
        as_json: Print one JSON object instead of text.
        patch: A new file for the changes, in the form of `git apply`.
        branch: A new branch for a commit of the changes.

    Raises:
        SandboxError, TaskSetupError, VerifierError, EngineError: See `Job.run`.
    """

    def keep(changes: list[Change], *, apply: bool = apply) -> Written:
        print_diff(job.console, changes)
        if not job.workdir or not changes:
            return Written()
        into_folder = apply or (not as_json and is_confirmed(patch, branch))
        return write(job.workdir, changes, job.task.instruction, apply=into_folder, patch=patch, branch=branch)

    try:
        done = run(job.run)
    except (Exception, KeyboardInterrupt) as exc:
        if job.workdir and job.rescued:  # changes of an interrupted run are applied only if the user now agrees
            written = keep(job.rescued, apply=apply and not isinstance(exc, KeyboardInterrupt))
            print_written(job.console, job.workdir, job.rescued, [], written)
        raise
    written = keep(done.changes)
    refused = [*job.refused, *(done.verdict.refused if done.verdict else ())]
    if as_json:
        typer.echo(json.dumps({**_as_json(done, written), "refused_connections": refused}, indent=2))
    else:
        print_end(job.console, job.task, done)
        for line in refused:
            say(job.console, f"refused by the network: {line}", "yellow")
        if job.workdir:
            print_written(job.console, job.workdir, done.changes, done.left_out, written)
    if done.failure is None:
        return ExitCode.UNSOLVED if written.refused else ExitCode.OK
    typer.echo(f"Not solved: {done.failure}.", err=True)
    return ExitCode.UNSOLVED


def show(console: Console, event: Event) -> None:
    """Print one event of a run."""
    from agentkit.events import CallDecided, CallFinished, CallStarted, Compacted, LimitReached, TurnStarted
    from agentkit.model import ReasoningDelta, Retried, TextDelta

    match event:
        case TurnStarted():
            console.print(f"\n[dim]turn {event.turn + 1}{', thinking' if event.think else ''}[/]")
        case ReasoningDelta():
            say(console, event.text, "italic dim", end="")
        case TextDelta():
            say(console, event.text, end="")
        case CallDecided(decision="refused"):
            say(console, f"\n✗ {event.name} {event.arguments}", "red")
        case CallStarted():
            say(console, f"\n→ {event.call.name} {event.call.arguments}", "cyan")
        case CallFinished():
            say(console, event.result.content, "red" if event.result.is_error else "dim")
        case Retried():
            say(console, f"\nretrying in {event.wait_s:.1f} s: {event.reason}", "yellow")
        case Compacted():
            console.print(f"\n[yellow]compacted: {event.tokens_before:,} to {event.tokens_after:,} tokens[/]")
        case LimitReached():
            console.print(f"\n[yellow]limit reached: {event.limit}[/]")


def print_end(console: Console, task: Task, done: Done) -> None:
    """Print the answer, the reward, the reason if it is below 1, and the usage of the run."""
    from agentkit_evals.expected import why_not

    usage = done.result.usage
    forced = f" ({usage.forced_tokens} forced)" if usage.forced_tokens else ""
    say(console, f"\nanswer    {done.result.answer or '(none)'}", "bold")
    if done.result.error:
        say(console, done.result.error, "yellow")
    if done.verdict is not None:
        say(console, f"reward    {done.verdict.reward:g}", "green" if is_solved(done.verdict.reward) else "red")
        if not is_solved(done.verdict.reward):
            for label, text in why_not(task, done.result.answer, done.verdict.output):
                say(console, f"{label:9} {text}", "yellow")
        if done.verdict.error:
            say(console, done.verdict.error, "yellow")
    say(
        console,
        f"{done.result.status} after {counted(usage.turns, 'turn')}, {counted(usage.calls, 'call')}, "
        f"{counted(usage.sampled_tokens, 'token')}{forced}, {usage.wall_time_s:.1f} s, in a {done.backend} sandbox",
        "dim",
    )
    say(console, cost_line(done.result.trajectory), "dim")


def cost_line(trajectory: Trajectory) -> str:
    """Return one line with the cost of a record's runs or, for an embedded model, what they would have cost."""
    from agentkit.prices import describe_reference, dollars, list_cost, reference_price

    if trajectory.header.dialect is None:
        dated = f" at list prices of {as_of}" if (as_of := trajectory.header.prices_as_of) else ""
        return f"cost {dollars(trajectory.usage.cost_usd)}{dated}"
    price = reference_price()
    return f"would have cost {dollars(list_cost(trajectory, price))} at {describe_reference(price)}"


def _as_json(done: Done, written: Written) -> dict[str, Any]:
    from agentkit.prices import describe_reference, list_cost, reference_price

    price = reference_price()
    listed = list_cost(done.result.trajectory, price)
    return {
        "status": done.result.status,
        "answer": done.result.answer,
        "limit": done.result.limit,
        "error": done.result.error,
        "reward": done.verdict.reward if done.verdict else None,
        "failure": done.failure,
        "backend": done.backend,
        "usage": asdict(done.result.usage),
        "prices_as_of": done.result.trajectory.header.prices_as_of,
        "list_cost_usd": listed,
        "list_price": None if listed is None else describe_reference(price),
        "changes": [
            {"path": change.path, "change": change.verb, "diff": list(change.diff())} for change in done.changes
        ],
        "applied": written.applied,
        "patch": None if written.patch is None else str(written.patch),
        "branch": written.branch,
        "notes": written.sentences,
        "refused": written.refused,
        "left_out": done.left_out,
        "trajectory": str(done.result.trajectory.path) if done.result.trajectory.path else None,
    }
