"""`agentkit run`: one agent on one task file, or on what you say, in your own folder if you like."""

from __future__ import annotations

import json
import os
import sys
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer

from agentkit.cli.ending import ExitCode
from agentkit.cli.options import CacheFlag, EnvFlag, GrammarFlag, JsonFlag, ModelFlag, SeedFlag, TemperatureFlag
from agentkit.cli.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.agent import Agent
    from agentkit.cli.workdir import Change, File
    from agentkit.events import Event
    from agentkit.result import RunResult
    from agentkit.task import Task
    from agentkit_environments import Environment
    from agentkit_evals.verify import Backend, Verdict


def command(
    what: Annotated[str, typer.Argument(metavar="TASK", help="A task file (.yaml), or what to do, in words.")],
    workdir: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Your folder: the agent works on a copy, you see the diff."),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Accept the changes to --workdir without asking.")] = False,
    model: ModelFlag = "tiny",
    env: EnvFlag = None,
    seed: SeedFlag = None,
    temperature: TemperatureFlag = None,
    grammar: GrammarFlag = None,
    answer_schema: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A JSON schema: the answer is JSON that fits it, else the exit code is 1; there is no `submit` then. "
            "Needs llguidance.",
        ),
    ] = None,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Turns of the model at most.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens sampled at most.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Seconds at most.")] = None,
    trajectory: Annotated[Path | None, typer.Option(help="Where to keep the record of the run; a new file.")] = None,
    cache_dir: CacheFlag = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Run an agent on a task file, or on what you say."""
    from rich.console import Console

    from agentkit.models.embedded import EmbeddedModel
    from agentkit.task import Task, load_task
    from agentkit_evals.run import agent_for

    task = load_task(what) if _names_task_file(what) else Task(id="run", instruction=what)
    bounds = {"max_turns": max_turns, "max_tokens": max_tokens, "timeout_s": timeout}
    given = {name: value for name, value in bounds.items() if value is not None}
    task = task.model_copy(update={"agent": task.agent.model_copy(update=given)})
    schema = None
    if answer_schema is not None:
        schema = _read_schema(answer_schema)
        task = task.model_copy(update={"tools": [tool for tool in task.tools if tool != "submit"]})
    embedded = EmbeddedModel(model, cache_dir=cache_dir)
    sampling = embedded.sampling.override(temperature=temperature, seed=seed, grammar=grammar, answer_schema=schema)
    agent = agent_for(task, embedded, sampling)
    console = Console(quiet=as_json, highlight=False)
    job = Job(task, agent, env.value if env else None, workdir, trajectory, console)
    return carry_out(job, apply=apply, as_json=as_json)


def _names_task_file(what: str) -> bool:
    """Whether `what` is meant as a path, and not as an instruction. Raises BadParameter for one of no task file."""
    if what.endswith((".yaml", ".yml")):
        return True
    if os.path.isdir(what):
        hint = f"`agentkit eval {what}` runs every task in a folder"
    elif os.path.exists(what) or what.endswith(".toml") or ("/" in what and not any(map(str.isspace, what))):
        hint = "the name of a task file ends in .yaml"
    else:
        return False
    raise typer.BadParameter(f"{what} is no task file: {hint}. Or say what to do, in words", param_hint="TASK")


def _read_schema(path: Path) -> dict[str, Any]:
    """The JSON schema in a file. Raises BadParameter for what is none."""
    from agentkit.answer import check_answer_schema
    from agentkit_engine.untrusted import parse_json, read_regular

    try:
        schema: dict[str, Any] = parse_json(read_regular(path, max_bytes=1 << 20), max_values=20_000)
        check_answer_schema(schema)
    except OSError as exc:
        raise typer.BadParameter(f"{path}: cannot be read: {exc.strerror}", param_hint="--answer-schema") from exc
    except ValueError as exc:
        raise typer.BadParameter(f"{path}: {exc}", param_hint="--answer-schema") from exc
    return schema


@dataclass(frozen=True, slots=True)
class Done:
    """What a job gives back: the run, where it was, what it changed of the user's folder, its score if it has one."""

    result: RunResult
    backend: str
    changes: list[Change]
    left_out: list[str]
    """A line for each entry of the folder that did not travel, there or back."""
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Job:
    """One run, from an open sandbox to what it left."""

    task: Task
    agent: Agent
    backend: Backend | None
    workdir: Path | None
    trajectory: Path | None
    console: Console

    async def run(self) -> Done:
        """Copy the user's folder in, run the agent with everything it does on the console, and see what changed.

        Raises:
            SandboxError, TaskSetupError, VerifierError, EngineError: the machine or the task failed.
        """
        from agentkit.cli import workdir as folder
        from agentkit_environments import open_environment
        from agentkit_evals.blame import blame, describe
        from agentkit_evals.selfcheck import StartChecks
        from agentkit_evals.verify import backend_for, broken, verify

        spec, where = self.task.environment.spec(), backend_for(self.task, self.backend)
        before = folder.read_folder(self.workdir) if self.workdir else folder.Folder({})
        async with await open_environment(spec, backend=where) as environment:
            result = await self._run_in(environment, before)
            try:
                await environment.kill_all()
                exported = await environment.export_dir(spec.workdir)
            except Exception as exc:
                if blame(exc, "scoring") == "infrastructure":
                    raise
                lost = describe(exc)
                return Done(result, environment.backend, [], [lost], broken(lost) if self.task.verifier else None)
        verdict = None
        if self.task.verifier is not None:
            verdict = await verify(self.task, archive=exported.data, answer=result.answer, backend=where)
            await StartChecks().require(self.task, verdict, backend=where)
        changed, left_out = (
            folder.compare(self.workdir, before, exported.data, exported.dropped) if self.workdir else ([], [])
        )
        return Done(result, environment.backend, changed, left_out, verdict)

    async def _run_in(self, environment: Environment, files: dict[str, File]) -> RunResult:
        from agentkit.cli import workdir as folder
        from agentkit.events import RunFinished

        await environment.import_dir(environment.spec.workdir, folder.pack(files))
        await self.task.prepare(environment)
        stream = self.agent.stream(self.task.instruction, environment=environment, trajectory=self.trajectory)
        result: RunResult | None = None
        async with aclosing(stream) as events:
            async for event in events:
                _show(self.console, event)
                if isinstance(event, RunFinished):
                    result = event.result
        assert result is not None, "a run that does not raise ends with RunFinished"
        return result


def carry_out(job: Job, *, apply: bool, as_json: bool) -> ExitCode:
    """Run the job, say how it ended, and change the user's folder when that is accepted: by `apply`, or when asked.

    Where the answer has a schema, an end without one that fits is BELOW_THRESHOLD.

    Raises:
        SandboxError, TaskSetupError, VerifierError, EngineError: as `Job.run`.
    """
    from agentkit.cli.workdir import apply as apply_changes

    done = anyio.run(job.run)
    refused: list[str] = []
    applied = False
    if job.workdir and done.changes:
        _print_diff(job.console, done.changes)
        applied = apply or (not as_json and sys.stdin.isatty() and typer.confirm("Apply these changes?", default=False))
        refused = apply_changes(job.workdir, done.changes) if applied else []
        applied = applied and not refused
    if as_json:
        typer.echo(json.dumps(_as_json(done, applied=applied, refused=refused), indent=2))
    else:
        _print_end(job.console, done, job.workdir, applied=applied, refused=refused)
    missing = job.agent.answer_schema is not None and done.result.answer is None
    return ExitCode.BELOW_THRESHOLD if missing or refused else ExitCode.OK


def _say(console: Console, text: str, style: str = "", end: str = "\n") -> None:
    from rich.text import Text

    console.print(Text(visible(text), style), end=end, soft_wrap=True)


def _show(console: Console, event: Event) -> None:
    from agentkit.events import CallFinished, CallStarted, LimitReached, TurnStarted
    from agentkit.model import ReasoningDelta, TextDelta

    say = partial(_say, console)
    match event:
        case TurnStarted():
            console.print(f"\n[dim]turn {event.turn + 1}{', thinking' if event.think else ''}[/]")
        case ReasoningDelta():
            say(event.text, "italic dim", end="")
        case TextDelta():
            say(event.text, end="")
        case CallStarted():
            say(f"\n→ {event.call.name} {event.call.arguments}", "cyan")
        case CallFinished():
            say(event.result.content, "red" if event.result.is_error else "dim")
        case LimitReached():
            console.print(f"\n[yellow]limit reached: {event.limit}[/]")


def _print_diff(console: Console, changes: list[Change]) -> None:
    console.print()
    for change in changes:
        for line in change.diff():
            _say(console, line, {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], ""))


def _print_end(console: Console, done: Done, workdir: Path | None, *, applied: bool, refused: list[str]) -> None:
    usage = done.result.usage
    _say(console, f"\nanswer   {done.result.answer or '(none)'}", "bold")
    if done.result.error:
        _say(console, done.result.error, "yellow")
    if done.verdict is not None:
        console.print(f"reward   {done.verdict.reward:g}")
        if done.verdict.error:
            _say(console, done.verdict.error, "yellow")
    console.print(
        f"{done.result.status} after {usage.turns} turns, {usage.calls} calls, {usage.sampled_tokens} tokens "
        f"({usage.forced_tokens} forced), {usage.wall_time_s:.1f} s, in a {done.backend} sandbox",
        style="dim",
    )
    if workdir is None:
        return
    if not done.changes:
        console.print("No file was changed.")
    elif applied:
        _say(console, f"Applied {len(done.changes)} changes to {workdir}.")
    elif refused:
        _say(console, f"Nothing was applied; {workdir} is as it was:", "yellow")
    else:
        _say(console, f"{workdir} is as it was; `--apply` accepts the changes above.")
    for sentence in refused:
        _say(console, f"  {sentence}", "yellow")
    for line in done.left_out:
        _say(console, f"Left out: {line}", "dim")


def _as_json(done: Done, *, applied: bool, refused: list[str]) -> dict[str, Any]:
    return {
        "status": done.result.status,
        "answer": done.result.answer,
        "limit": done.result.limit,
        "error": done.result.error,
        "reward": done.verdict.reward if done.verdict else None,
        "backend": done.backend,
        "usage": asdict(done.result.usage),
        "changes": [
            {"path": change.path, "change": change.verb, "diff": list(change.diff())} for change in done.changes
        ],
        "applied": applied,
        "refused": refused,
        "left_out": done.left_out,
        "trajectory": str(done.result.trajectory.path) if done.result.trajectory.path else None,
    }
