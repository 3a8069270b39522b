"""`agentkit chat`: talk to an agent that has tools and a sandbox."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer

from agentkit.cli import signals
from agentkit.cli.approve import ApproveChoice, ApproveFlag, approval_options
from agentkit.cli.changes import Written, check_flags, is_confirmed, name_host, print_diff, print_written, write
from agentkit.cli.ending import ExitCode, run
from agentkit.cli.live import LiveLines
from agentkit.cli.mcp import MCPFlag, equipped, read_servers
from agentkit.cli.model import load_model
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
    TemperatureFlag,
    ThreadsFlag,
    TopKFlag,
    TopPFlag,
    WorkdirFlag,
)
from agentkit.cli.terminal import console, say

if TYPE_CHECKING:
    from rich.console import Console

    from agentkit.agent import Agent
    from agentkit.cli.workdir import Change
    from agentkit.cli.workspace import Workspace
    from agentkit.events import Event
    from agentkit.model import Usage
    from agentkit.trajectory import Trajectory
    from agentkit_environments import Environment
    from agentkit_tools import MCPServer

HELP = """\
/new        start a new conversation; files are kept
/diff       show the changes to the files of --workdir so far
/thinking   switch between full and folded thoughts
/help       show this help
/quit       quit (or Ctrl-D)
Ctrl-C stops the turn. The up arrow recalls earlier messages."""
SHOWN_LINES = 12
"""Lines of a tool result shown on the terminal; the trajectory keeps all of them."""


def command(
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
    system: Annotated[str | None, typer.Option(help="The system prompt. Default: the agent's own.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Show thoughts in full instead of folded.")] = False,
    seed: SeedFlag = None,
    temperature: TemperatureFlag = None,
    top_p: TopPFlag = None,
    top_k: TopKFlag = None,
    min_p: MinPFlag = None,
    repetition_penalty: PenaltyFlag = None,
    grammar: GrammarFlag = None,
    no_grammar: NoGrammarFlag = False,
    approve: ApproveFlag = ApproveChoice.ALL,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, max=1 << 31, help="Maximum number of sampled tokens per message.")
    ] = None,
    max_cost: MaxCostFlag = None,
    compact_at: CompactAtFlag = None,
    trajectory: Annotated[Path | None, typer.Option(help="Save the trajectory to this new file.")] = None,
    cache_dir: CacheFlag = None,
    no_key: NoKeyFlag = None,
    no_provider: NoProviderFlag = None,
) -> ExitCode:
    """Talk to an agent that has the built-in tools, in one sandbox for the whole conversation.

    Ctrl-C stops the turn, Ctrl-D quits. With --workdir, the changes are shown at the end, and you are asked whether to
    apply them.

    If standard input is not a terminal, each of its lines is one message, and Ctrl-C ends the command. It then exits
    with 3 if the API failed, and with 1 if a message got no answer or reached a limit.
    """
    from agentkit.agent import Agent
    from agentkit.compaction import Compaction
    from agentkit.limits import CostBudget, Limits

    flags = SamplingFlags.of(
        grammar,
        no_grammar,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    check_flags(workdir, include_ignored=include_ignored, copy=copy, apply=apply, patch=patch, branch=branch)
    if trajectory is not None and trajectory.exists():
        raise typer.BadParameter(
            f"{trajectory} already exists and is never overwritten; give a new path", param_hint="--trajectory"
        )
    servers = read_servers(mcp)
    terminal = console()
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
    budget = None if max_cost is None else CostBudget(max_cost)
    limits = Limits(max_tokens=max_tokens)
    approvals = approval_options(approve)
    agent = Agent(
        source,
        system=system,
        effort=effort.value if effort else "high",
        sampling=sampling,
        limits=limits,
        budget=budget,
        compaction=None if compact_at is None else Compaction(at_tokens=compact_at),
        **approvals,
    )
    with tempfile.TemporaryDirectory(prefix="agentkit-chat-") as folder, _history():
        record, backend = trajectory or Path(folder, "chat.jsonl"), env.value if env else "auto"
        chat = Chat(agent, backend, record, terminal, thinking)
        if workdir is None:
            run(lambda: chat.converse(servers))
            return chat.code
        chat.workdir, chat.include_ignored, chat.copy = workdir, include_ignored, copy
        try:
            run(lambda: chat.converse(servers))
        except Exception:
            if chat.changes:  # made by the turns before the failure
                chat.keep(apply=apply, patch=patch, branch=branch)
            raise
        refused = chat.keep(apply=apply, patch=patch, branch=branch).refused
    return max(chat.code, ExitCode.UNSOLVED if refused else ExitCode.OK)


class Chat:
    """One conversation in one sandbox.

    Attributes:
        code: The exit code so far. It stays 0 at a terminal, where the user has seen each failure.
    """

    def __init__(
        self, agent: Agent, backend: str, record: Path, terminal: Console, thinking: bool, *, tty: bool | None = None
    ) -> None:
        self.agent = agent
        self.backend = backend
        self.record = record
        self.terminal = terminal
        self.thinking = thinking
        self.tty = sys.stdin.isatty() if tty is None else tty
        self.history: Trajectory | None = None
        self.number = 0
        self.usages: list[Usage] = []
        self.code = ExitCode.OK
        self.workdir: Path | None = None
        self.include_ignored = self.copy = False
        self._workspace: Workspace | None = None
        self.changes: list[Change] = []
        self._left_out: list[str] = []
        self._first = ""
        self._thought: tuple[float, int] | None = None
        self._live = LiveLines(terminal, asks=agent.approvals.can_ask)

    async def converse(self, servers: Sequence[MCPServer] = ()) -> None:
        """Read and answer messages until the end of the input, with the tools of the MCP servers too.

        Raises:
            MCPServerError, SandboxError, EngineError: A server, the sandbox or the engine failed.
        """
        from agentkit.model import total_usage
        from agentkit.models.embedded import EmbeddedModel
        from agentkit.models.remote.session import RemoteModel
        from agentkit.prices import dollars

        async with AsyncExitStack() as stack:
            self.agent = await stack.enter_async_context(equipped(self.agent, servers))
            environment = await self._open(stack)
            if self.tty:
                self.terminal.print(
                    f"{self.agent.model.name} in a {environment.backend} sandbox. /help for help, Ctrl-D to quit.",
                    style="dim",
                )
            model = self.agent.model
            assert isinstance(model, EmbeddedModel | RemoteModel)
            try:
                async with model:
                    await self._talk(environment)
            except Exception:
                with suppress(Exception):  # report the first failure; without a sandbox, the changes are lost
                    await self._collect(environment)
                raise
            await self._collect(environment)
        if isinstance(model, RemoteModel) and self.usages:
            self.terminal.print(f"cost {dollars(total_usage(self.usages).cost_usd)}", style="dim")

    async def _talk(self, environment: Environment) -> None:
        """Read and answer messages until the end of the input or of the budget."""
        from agentkit.prices import dollars

        while (said := self._read()) is not None:
            if said.startswith("/"):
                if said in ("/quit", "/exit", "/q"):
                    break
                await self._obey(said)
            elif said:
                self._first = self._first or said
                await self._turn(said, environment)
                if self.agent.budget is not None and self.agent.budget.spent:
                    limit = dollars(self.agent.budget.max_cost_usd)
                    self.terminal.print(f"The cost limit of {limit} is reached.", style="yellow")
                    self._failed(ExitCode.UNSOLVED)
                    break

    def _failed(self, code: ExitCode) -> None:
        """Record that a message failed."""
        if not self.tty:
            self.code = max(self.code, code)

    async def _collect(self, environment: Environment) -> None:
        """Find the changes to the user's folder, if there is one."""
        if self._workspace is not None:
            await environment.kill_all()
            self.changes, self._left_out, _ = await self._workspace.changes()

    def keep(self, *, apply: bool, patch: Path | None, branch: str | None) -> Written:
        """Show the changes to the user's folder, and write them where the user wants them."""
        assert self.workdir is not None
        print_diff(self.terminal, self.changes)
        written = Written()
        if self.changes:
            apply = apply or is_confirmed(patch, branch)
            written = write(self.workdir, self.changes, self._first or "Chat", apply=apply, patch=patch, branch=branch)
        print_written(self.terminal, self.workdir, self.changes, self._left_out, written)
        return written

    async def _open(self, stack: AsyncExitStack) -> Environment:
        from agentkit_environments import open_environment

        if self.workdir is None:
            return await stack.enter_async_context(await open_environment(backend=self.backend))  # type: ignore[arg-type]
        from agentkit.cli.workspace import open_workspace
        from agentkit.task import Task

        name_host(self.agent.model, self.workdir)
        workspace = await stack.enter_async_context(
            open_workspace(
                Task(id="chat", instruction="Chat."),
                self.backend,  # type: ignore[arg-type]
                self.workdir.resolve(),
                self.terminal,
                include_ignored=self.include_ignored,
                copy=self.copy,
            )
        )
        self._workspace = workspace
        return workspace.environment

    def _read(self) -> str | None:
        """Return the user's next message; None at the end. This blocks the event loop; only MCP servers wait for it."""

        def at_prompt(number: int) -> bool:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signals.note(number)
            raise EOFError

        signals.answer_with(at_prompt)
        try:
            if self.tty:
                return input("\n> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except KeyboardInterrupt:
            if not self.tty:
                raise
            self.terminal.print("\n(Ctrl-D to quit)", style="dim")
            return ""
        except EOFError:
            if self.tty:
                self.terminal.print()
            return None
        except UnicodeDecodeError as exc:
            self.terminal.print(f"That line is not {exc.encoding} text and was ignored.", style="yellow")
            self._failed(ExitCode.UNSOLVED)
            return ""
        finally:
            signals.answer_with(None)

    async def _obey(self, said: str) -> None:
        from agentkit_environments import UnsafeArchiveError

        if said == "/new":
            self.history = None
            self.number += 1
            self.terminal.print("Started a new conversation.", style="dim")
        elif said == "/diff" and self._workspace is not None:
            try:
                changes, _, _ = await self._workspace.changes()
            except UnsafeArchiveError as exc:
                say(self.terminal, str(exc), "yellow")
                return
            print_diff(self.terminal, changes)
            if not changes:
                self.terminal.print("No files were changed.", style="dim")
        elif said == "/thinking":
            self.thinking = not self.thinking
            self.terminal.print(f"Thoughts are {'shown in full' if self.thinking else 'folded'}.", style="dim")
        else:
            say(self.terminal, HELP if said == "/help" else f"Unknown command {said.split()[0]}.\n{HELP}")

    async def _turn(self, said: str, environment: Environment) -> None:
        from agentkit.errors import ApiError, ApiKeyError, TrajectoryError
        from agentkit.events import RunFinished
        from agentkit.trajectory import Trajectory

        failed: ApiError | None = None
        loop = asyncio.get_running_loop()
        path = self.record if self.number == 0 else self.record.with_suffix(f".{self.number}{self.record.suffix}")
        with anyio.CancelScope() as scope:

            def stop(number: int) -> bool:
                if number != signal.SIGINT or not self.tty:
                    return False
                loop.call_soon_threadsafe(scope.cancel)
                return True

            signals.answer_with(stop)
            try:
                stream = self.agent.stream(
                    said,
                    environment=environment,
                    trajectory=path if self.history is None else None,
                    history=self.history,
                )
                async with aclosing(stream) as events:
                    async for event in events:
                        self._show(event)
                        if isinstance(event, RunFinished):
                            self.history = event.result.trajectory
                            if event.result.status not in ("answered", "submitted"):
                                self._failed(ExitCode.UNSOLVED)
            except ApiError as exc:
                if isinstance(exc, ApiKeyError):
                    raise
                failed = exc
            finally:
                signals.answer_with(None)
                self._live.remove()
                self._end_thought()
        if scope.cancelled_caught or failed:
            say(self.terminal, "\n(stopped)" if failed is None else f"\n{failed}", "yellow")
            self._failed(ExitCode.INFRASTRUCTURE)
            with suppress(TrajectoryError):  # none yet if the turn was stopped before it began
                # The trajectory of a stopped or failed turn is complete, so the next turn continues it.
                self.history = Trajectory.load(path)
                if self.history.outcome is not None:
                    self.usages.append(self.history.outcome.usage)

    def _show(self, event: Event) -> None:
        from agentkit.cli.run import show
        from agentkit.events import CallFinished, RunFinished, TurnStarted
        from agentkit.model import ReasoningDelta

        self._live.hear(event)
        if isinstance(event, ReasoningDelta) and not self.thinking:
            started, count = self._thought or (time.monotonic(), 0)
            self._thought = started, count + 1
            if count == 0 and self.terminal.is_terminal:
                self.terminal.print("thinking …", style="dim italic", end="\r")
            return
        self._end_thought()
        match event:
            case TurnStarted():
                pass
            case CallFinished() if event.result.final:
                pass  # the answer, shown at RunFinished
            case CallFinished():
                lines = event.result.content.splitlines()
                more = [f"… {len(lines) - SHOWN_LINES} more lines"] if len(lines) > SHOWN_LINES else []
                say(self.terminal, "\n".join(lines[:SHOWN_LINES] + more), "red" if event.result.is_error else "dim")
            case RunFinished():
                result = event.result
                self.usages.append(result.usage)
                if result.status == "submitted":
                    say(self.terminal, f"\n{result.answer}", "bold")
                elif not result.answer and result.status != "limit":
                    say(self.terminal, f"(no answer{f': {result.error}' if result.error else ''})", "yellow")
                else:
                    self.terminal.print()
            case _:
                show(self.terminal, event)

    def _end_thought(self) -> None:
        if self._thought is not None:
            started, count = self._thought
            self._thought = None
            self.terminal.print(f"thought for {time.monotonic() - started:.1f} s, {count} chunks", style="dim italic")


@contextmanager
def _history() -> Iterator[None]:
    """Load and save the input history of earlier chats in a file readable by this user only."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # Python was built without readline
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "agentkit")
    file = state / "chat_history"
    with suppress(OSError):
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):
            file.touch(mode=0o600)
            readline.write_history_file(file)
