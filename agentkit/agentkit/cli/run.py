"""`agentkit run`: run an agent on a task file or an instruction, optionally on a copy of your own folder."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.cli.approve import ApproveChoice, ApproveFlag, approval_options
from agentkit.cli.ending import ExitCode, run
from agentkit.cli.mcp import MCPFlag, equipped, read_servers
from agentkit.cli.model import load_model
from agentkit.cli.options import (
    BaseUrlFlag,
    CacheFlag,
    DeviceFlag,
    EnvFlag,
    GrammarFlag,
    JsonFlag,
    MaxCostFlag,
    MinPFlag,
    ModelFlag,
    NoGrammarFlag,
    NoKeyFlag,
    NoProviderFlag,
    PenaltyFlag,
    SamplingFlags,
    SeedFlag,
    TemperatureFlag,
    TopKFlag,
    TopPFlag,
    finite,
    foreign_tasks,
    is_solved,
)
from agentkit.cli.terminal import console, visible

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.agent import Agent
    from agentkit.cli.workdir import Change
    from agentkit.events import Event
    from agentkit.result import RunResult
    from agentkit.task import Task
    from agentkit.trajectory import Trajectory
    from agentkit_environments import Environment
    from agentkit_evals.verify import Backend, Verdict
    from agentkit_tools import MCPServer


def command(
    what: Annotated[str, typer.Argument(metavar="TASK", help="A task file (.yaml), or an instruction in words.")],
    workdir: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder to work on: the agent gets a copy, you get a diff."),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Apply the changes to --workdir without asking.")] = False,
    model: ModelFlag = "tiny",
    base_url: BaseUrlFlag = None,
    device: DeviceFlag = None,
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
    max_turns: Annotated[int | None, typer.Option(min=1, help="Maximum number of model turns.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum number of sampled tokens.")] = None,
    max_cost: MaxCostFlag = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, callback=finite, help="Time limit in seconds.")] = None,
    trajectory: Annotated[Path | None, typer.Option(help="Save the trajectory to this new file.")] = None,
    cache_dir: CacheFlag = None,
    as_json: JsonFlag = False,
    no_key: NoKeyFlag = None,
    no_provider: NoProviderFlag = None,
) -> ExitCode:
    """Run an agent on a task file or on an instruction in words.

    Exits with 0 if solved: the agent gave an answer, and reward 1 if the task has a verifier. Exits with 1 on no
    answer, an answer that does not match --output-schema, a limit, or a reward below 1, and prints the reason.
    """
    from agentkit.prices import reference_price
    from agentkit.task import Task, VerifierConfig, load_task
    from agentkit_evals.run import agent_for

    flags = SamplingFlags.of(
        grammar,
        no_grammar,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    task = load_task(what) if _names_task_file(what) else Task(id="run", instruction=what)
    if not isinstance(task.verifier, VerifierConfig | None):
        raise typer.BadParameter(
            f"{what} is scored by calls or tests; run it with `agentkit eval {shlex.quote(what)}`", param_hint="TASK"
        )
    if apply and workdir is None:
        raise typer.BadParameter("no folder to apply changes to; also give --workdir", param_hint="--apply")
    if trajectory is not None and trajectory.exists():
        raise typer.BadParameter(
            f"{trajectory} already exists and is never overwritten; give a new path", param_hint="--trajectory"
        )
    bounds = {"max_turns": max_turns, "max_tokens": max_tokens, "timeout_s": timeout}
    given = {name: value for name, value in bounds.items() if value is not None}
    task = task.model_copy(update={"agent": task.agent.model_copy(update=given)})
    schema = None
    if output_schema is not None:
        schema = _read_schema(output_schema)
        task = task.model_copy(update={"tools": [tool for tool in task.tools if tool != "submit"]})
    servers = read_servers(mcp)
    terminal = console(quiet=as_json)
    reference_price()  # reports a broken price table before the run, not after it
    source = load_model(model, device=device, cache_dir=cache_dir, base_url=base_url)
    sampling = source.sampling.override(seed=seed, output_schema=schema, **flags.changes())
    agent = agent_for(task, source, sampling, max_cost_usd=max_cost, **approval_options(approve))
    job = Job(task, agent, env.value if env else None, workdir, trajectory, terminal, servers)
    return carry_out(job, apply=apply, as_json=as_json)


def _names_task_file(what: str) -> bool:
    """Return whether `what` is a task file rather than an instruction. Raises BadParameter for any other path."""
    if not what.strip():
        raise typer.BadParameter("it is empty; give a task file or an instruction", param_hint="TASK")
    if "\0" in what or any("\ud800" <= letter <= "\udfff" for letter in what):
        raise typer.BadParameter("it is not UTF-8 text", param_hint="TASK")
    if what.endswith((".yaml", ".yml")):
        return True
    if os.path.isdir(what):
        hint = foreign_tasks(Path(what)) or f"`agentkit eval {shlex.quote(what)}` runs every task in a folder"
    elif os.path.exists(what) or what.endswith(".toml") or ("/" in what and not any(map(str.isspace, what))):
        hint = foreign_tasks(Path(what)) or "task files end in .yaml"
    else:
        return False
    raise typer.BadParameter(f"{what} is not a task file: {hint}. Or give an instruction in words", param_hint="TASK")


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

    async def run(self) -> Done:
        """Copy the user's folder in, run the agent with live output on the console, and collect the changes.

        Raises:
            MCPServerError, SandboxError, TaskSetupError, VerifierError, EngineError: The machine or the task failed.
        """
        from agentkit.cli import workdir as folder
        from agentkit_evals.blame import blame, describe
        from agentkit_evals.selfcheck import StartChecks
        from agentkit_evals.verify import backend_for, broken, opened, verify

        spec, where = self.task.environment.spec(), backend_for(self.task, self.backend)
        mine = folder.read_folder(self.workdir) if self.workdir else folder.Folder({})
        async with equipped(self.agent, self.servers) as agent, opened(self.task, where) as environment:
            await environment.import_dir(spec.workdir, folder.pack(mine))
            await self.task.prepare(environment)
            # With --workdir the diff is against the user's folder and includes the task's setup.
            # Otherwise it starts after the setup.
            before = mine if self.workdir else folder.unpack((await environment.export_dir(spec.workdir)).data)
            result = await self._run_in(environment, agent)
            try:
                await environment.kill_all()
                exported = await environment.export_dir(spec.workdir)
            except Exception as exc:
                if blame(exc, "scoring") == "infrastructure":
                    raise
                lost = describe(exc)
                verdict = broken(lost) if self.task.verifier else None
                return Done(result, environment.backend, [], [], verdict, lost)
        verdict = None
        if self.task.verifier is not None:
            verdict = await verify(self.task, archive=exported.data, answer=result.answer, backend=where)
            await StartChecks().require(self.task, verdict, backend=where)
        if self.workdir:
            changed, left_out = folder.compare(self.workdir, mine, exported.data, exported.dropped)
        else:
            after = folder.unpack(exported.data)
            changed = folder.without_dropped(folder.changes(before, after), exported.dropped)
            left_out = [*exported.dropped]
        return Done(result, environment.backend, changed, left_out, verdict)

    async def _run_in(self, environment: Environment, agent: Agent) -> RunResult:
        from agentkit.events import RunFinished

        stream = agent.stream(self.task.instruction, environment=environment, trajectory=self.trajectory)
        result: RunResult | None = None
        async with aclosing(stream) as events:
            async for event in events:
                show(self.console, event)
                if isinstance(event, RunFinished):
                    result = event.result
        assert result is not None, "a run that does not raise ends with RunFinished"
        return result


def carry_out(job: Job, *, apply: bool, as_json: bool) -> ExitCode:
    """Run the job, print how it ended, and apply the changes to the user's folder with `apply` or after confirmation.

    Raises:
        SandboxError, TaskSetupError, VerifierError, EngineError: See `Job.run`.
    """
    from agentkit.cli.workdir import apply as apply_changes

    done = run(job.run)
    refused: list[str] = []
    applied = False
    if job.workdir and done.changes:
        print_diff(job.console, done.changes)
        applied = apply or (not as_json and sys.stdin.isatty() and typer.confirm("Apply these changes?", default=False))
        refused = apply_changes(job.workdir, done.changes) if applied else []
        applied = applied and not refused
    if as_json:
        typer.echo(json.dumps(_as_json(done, applied=applied, refused=refused), indent=2))
    else:
        if not job.workdir:
            print_diff(job.console, done.changes)
        print_end(job.console, job.task, done)
        _print_folder(job.console, done, job.workdir, applied=applied, refused=refused)
    if done.failure is None:
        return ExitCode.UNSOLVED if refused else ExitCode.OK
    typer.echo(f"Not solved: {done.failure}.", err=True)
    return ExitCode.UNSOLVED


def say(console: Console, text: str, style: str = "", end: str = "\n") -> None:
    """Print text written by a model, a tool or a task, without markup or control characters."""
    from rich.text import Text

    console.print(Text(visible(text), style), end=end, soft_wrap=True)


def show(console: Console, event: Event) -> None:
    """Print one event of a run."""
    from agentkit.events import CallDecided, CallFinished, CallStarted, LimitReached, TurnStarted
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
        case LimitReached():
            console.print(f"\n[yellow]limit reached: {event.limit}[/]")


def print_diff(console: Console, changes: list[Change]) -> None:
    """Print changes as a unified diff."""
    if changes:
        console.print()
    for change in changes:
        for line in change.diff():
            say(console, line, {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], ""))


def print_end(console: Console, task: Task, done: Done) -> None:
    """Print the answer, the reward, the reason if it is below 1, and the usage of the run."""
    from agentkit_evals.expected import why_not

    usage = done.result.usage
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
        f"{done.result.status} after {usage.turns} turns, {usage.calls} calls, {usage.sampled_tokens} tokens "
        f"({usage.forced_tokens} forced), {usage.wall_time_s:.1f} s, in a {done.backend} sandbox",
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


def _print_folder(console: Console, done: Done, workdir: Path | None, *, applied: bool, refused: list[str]) -> None:
    if workdir is None:
        return
    if not done.changes:
        console.print("No files were changed.")
    elif applied:
        say(console, f"Applied {len(done.changes)} changes to {workdir}.")
    elif refused:
        say(console, f"Nothing was applied; {workdir} is unchanged:", "yellow")
    else:
        say(console, f"{workdir} is unchanged; use `--apply` to apply the changes above.")
    for sentence in refused:
        say(console, f"  {sentence}", "yellow")
    for line in done.left_out:
        say(console, f"Left out: {line}", "dim")


def _as_json(done: Done, *, applied: bool, refused: list[str]) -> dict[str, Any]:
    from agentkit.prices import describe_reference, list_cost, reference_price

    price = reference_price()
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
        "list_cost_usd": list_cost(done.result.trajectory, price),
        "list_price": describe_reference(price),
        "changes": [
            {"path": change.path, "change": change.verb, "diff": list(change.diff())} for change in done.changes
        ],
        "applied": applied,
        "refused": refused,
        "left_out": done.left_out,
        "trajectory": str(done.result.trajectory.path) if done.result.trajectory.path else None,
    }
