"""The agent loop: ask the model, run its calls, feed it the results, until it is done."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Final

import anyio

from agentkit.checks import check_model, check_type, run_blocking
from agentkit.errors import ContextFullError, TrajectoryWriteError, first_cause
from agentkit.events import Event, LimitName, LimitReached, Outcome, RunFinished, Status, TurnFinished, TurnStarted
from agentkit.limits import ConcurrencyLimits, CostBudget, Limits
from agentkit.messages import Message, SystemMessage, ToolMessage, UserMessage
from agentkit.model import (
    CallMalformed,
    CallReady,
    CallsWithdrawn,
    Effort,
    Generated,
    Model,
    ReasoningDelta,
    TextDelta,
)
from agentkit.models.embedded import EmbeddedModel
from agentkit.models.remote.resolve import is_remote
from agentkit.models.remote.session import RemoteModel
from agentkit.output import check_output_schema, misfit
from agentkit.prices import check_price, price_of
from agentkit.progress import shown_progress
from agentkit.result import Continue, RunResult
from agentkit.run import Run
from agentkit.thinking import Thinking, ThinkingPolicy, thinking_policy
from agentkit.trajectory import Header, Trajectory
from agentkit.turn import TurnCalls
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import DeferredEnvironment, Environment, EnvironmentSpec, SandboxError, open_environment
from agentkit_tools import BUILTINS, Tool, ToolContext, ToolResult, as_tool
from agentkit_tools.model_texts import DEFAULT_SYSTEM as DEFAULT_SYSTEM

KILL_TIMEOUT_S: Final = 0.8


class Agent:
    """A model with tools, a thinking policy and limits. An agent can run many tasks, also concurrently.

    Override `ask`, `act` or `observe` to change what a turn does.
    """

    def __init__(
        self,
        model: Model | str | Path,
        tools: Sequence[Tool | Callable[..., Any]] | None = None,
        *,
        system: str | None = None,
        thinking: Thinking | ThinkingPolicy = "auto",
        effort: Effort = "high",
        sampling: SamplingParams | None = None,
        output_schema: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        concurrency: ConcurrencyLimits | None = None,
        budget: CostBudget | None = None,
    ) -> None:
        """Create an agent.

        Args:
            model: A model; an argument of `EmbeddedModel`: `"tiny"` or a checkpoint folder; or one of `RemoteModel`:
                `"openai:gpt-5"`, `"anthropic:claude-sonnet-4-5"`, `"deepseek:deepseek-chat"`.
            tools: Tools that the model may call, in prompt order, as tools or plain functions with typed parameters.
                Default: the built-in tools; with an output schema all except `submit`, whose answer no grammar
                constrains.
            system: The system prompt; `DEFAULT_SYSTEM` by default, none if empty.
            thinking: Turns that think: "always", "never", "auto" (the first, and after any failed result), or a
                function of the messages that the turn answers.
            effort: Reasoning effort for the whole session; "none" never thinks.
            sampling: All sampling parameters. Default: `model.sampling`, which the model's folder defines.
                `model.sampling.override(temperature=0)` changes some of them.
            output_schema: JSON schema of the answer. The model is shown the schema and constrained to it.
            limits: The budget of each run.
            concurrency: Limits on calls that run at the same time. An agent that runs inside a call of another agent
                needs its own.
            budget: A limit on the cost of all runs of all agents that are given this object.

        Raises:
            TypeError: an argument is of the wrong type.
            ToolDefinitionError: a function cannot be a tool; the text has the remedy.
            ValueError: two tools have the same name, the thinking policy or effort is unknown, or `output_schema` is
                not a JSON schema.
            EngineError: as `EmbeddedModel`.
            PriceError: a limit on the cost is given, and the price of the model is unknown.
        """
        check_type("Agent(sampling=...)", sampling, SamplingParams | None, "a SamplingParams or None")
        check_type("Agent(limits=...)", limits, Limits | None, "a Limits or None")
        check_type("Agent(concurrency=...)", concurrency, ConcurrencyLimits | None, "a ConcurrencyLimits or None")
        check_type("Agent(budget=...)", budget, CostBudget | None, "a CostBudget or None")
        check_type("Agent(system=...)", system, str | None, "a text or None")
        self._thinks = thinking_policy(thinking, effort)
        if output_schema is not None:
            check_output_schema(output_schema)
        elif sampling is not None and sampling.output_schema is not None:
            check_output_schema(sampling.output_schema)
        self.model = model_of(model) if isinstance(model, str | Path) else check_model(model)
        self.sampling = (sampling or self.model.sampling).override(output_schema=output_schema)
        self.output_schema = self.sampling.output_schema
        if tools is None:
            tools = [tool for tool in BUILTINS.values() if self.output_schema is None or tool.name != "submit"]
        check_type("Agent(tools=...)", tools, list | tuple, "a list of tools or functions")
        self.tools: dict[str, Tool] = {}
        for tool in map(as_tool, tools):
            if tool.name in self.tools:
                raise ValueError(f'two tools are named "{tool.name}"; rename one of them')
            self.tools[tool.name] = tool
        self.system = DEFAULT_SYSTEM if system is None else system
        self.thinking = thinking if isinstance(thinking, str) else getattr(thinking, "__name__", repr(thinking))
        self.effort: Effort = effort
        self.limits = limits or Limits()
        self.concurrency = concurrency or ConcurrencyLimits()
        self.budget = budget
        if self.limits.max_cost_usd is not None or budget is not None:
            check_price(self.model, self.model.name)
        if self.sampling.max_tokens is not None:
            bounds = (self.sampling.max_tokens, self.limits.max_tokens_per_turn or self.sampling.max_tokens)
            self.limits = replace(self.limits, max_tokens_per_turn=min(bounds))

    async def run(
        self,
        task: str,
        *,
        environment: Environment | None = None,
        trajectory: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> RunResult:
        """Run a task.

        Args:
            task: The user message.
            environment: Environment that calls run in; it stays open. Default: a sandbox of this run, which is opened
                before the first turn if a tool needs it (`Tool.needs_environment`).
            trajectory: New file for the record, written during the run. Default: in memory only.
            metadata: JSON values for the header of the record.

        Raises:
            SandboxError: no sandbox can be opened, or the sandbox was lost.
            TrajectoryWriteError: the record cannot be written.
            EncodeError: the model's dialect does not have the effort.
            EngineError: the engine failed.
        """
        return await self._run(task, _unheard, environment=environment, path=trajectory, metadata=metadata)

    def run_sync(
        self,
        task: str,
        *,
        trajectory: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
        progress: bool | None = None,
    ) -> RunResult:
        """Run a task from synchronous code, in its own sandbox.

        After one second, a progress line is shown on standard error if that is a terminal or `progress` is True.

        Raises:
            RunningLoopError: an event loop is running, as in a notebook. Use `await agent.run(...)` there.
        """
        with shown_progress(progress) as emit:
            return run_blocking(
                lambda: self._run(task, emit, environment=None, path=trajectory, metadata=metadata),
                instead="await agent.run(...)",
            )

    async def stream(
        self,
        task: str,
        *,
        environment: Environment | None = None,
        trajectory: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
        history: Trajectory | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Run a task and yield each event as it happens; the last one is `RunFinished`.

        With `history`, the run continues that record and its file, as `RunResult.continue_` does. `environment` is then
        required, and `trajectory` and `metadata` are not allowed.

        To leave early, close the generator in the task that iterates it: `async with aclosing(agent.stream(...))`. This
        cancels the run.

        Raises:
            ValueError: `history` is given without `environment`, or with `trajectory` or `metadata`.
            Other errors: as `run`.
        """
        if history is not None and (environment is None or trajectory is not None or metadata is not None):
            raise ValueError("history needs an environment, and takes neither trajectory nor metadata")
        send, receive = anyio.create_memory_object_stream[Event](inf)

        async def drive() -> None:
            with send:
                await self._run(
                    task,
                    send.send_nowait,
                    environment=environment,
                    path=trajectory,
                    metadata=metadata,
                    history=history,
                )

        with send, receive, _one_error():
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(drive, name="agentkit: run")
                async for event in receive:
                    yield event

    async def _converse(self, run: Run, text: str) -> Outcome:
        """Run turns until the model submits or answers, or a limit is reached."""
        news: list[Message] = [UserMessage(text)]
        if (self.system or self.output_schema is not None) and not run.session.messages:
            news.insert(0, SystemMessage(self.system, self.output_schema))
        await self.observe(run, news)
        while (limit := run.spent_limit) is None:
            results, limit = await self._turn(run, news)
            if submitted := next((result for result in results if result.final), None):
                return await self._conclude(run, "submitted", submitted.content)
            if limit is not None:
                break
            if not results:
                return await self._conclude(run, "answered", run.session.messages[-1].content)
            news = [ToolMessage.of(result) for result in results]
        run.note(LimitReached(limit))
        return run.outcome("limit", limit=limit)

    async def _conclude(self, run: Run, status: Status, answer: str) -> Outcome:
        """Return the outcome of a run that has an answer. An empty answer or one that does not fit the schema is
        refused."""
        if status == "answered" and not answer.strip():
            refused = "the provider refused to answer: its filter stopped the last turn"
            error = refused if run.refused else "the last turn has no call, and no text outside its reasoning"
            return run.outcome("no_answer", error=error)
        problem = None if self.output_schema is None else await misfit(answer, self.output_schema)
        return run.outcome(status, answer) if problem is None else run.outcome("invalid_output", error=problem)

    async def _turn(self, run: Run, news: list[Message]) -> tuple[list[ToolResult], LimitName | None]:
        """Run one turn: ask, act, observe.

        Returns:
            The results of the turn's calls in call order, and the limit that stopped the turn, if any.
        """
        think = self._thinks(news) and run.generation_limits.max_thinking_tokens != 0
        run.note(TurnStarted(run.turn, think))
        calls = TurnCalls(self.tools, run.context, self.concurrency, run.note, max_calls=self.limits.max_calls_per_turn)
        limit: LimitName | None = None
        stopped_by = "the run broke off"
        try:
            async with anyio.create_task_group() as task_group:
                calls.open(task_group, deadline=run.deadline, time_left_s=run.tool_time_left_s)
                limit = await self.ask(run, calls, think=think)
                if limit is None:
                    await self.act(run, calls)
                else:
                    task_group.cancel_scope.cancel()
            if limit is None and task_group.cancel_scope.cancelled_caught:
                limit = "wall_time_s" if anyio.current_time() >= run.deadline else "tool_time_s"
            stopped_by = f"the run's limit {limit} was reached"
        finally:
            results = calls.results(stopped_by)
            run.turn += 1
            run.calls += len(results)
            run.tool_time_s += calls.time_s
            run.charge()
            if results:
                with anyio.CancelScope(shield=True):
                    await self.observe(run, [ToolMessage.of(result) for result in results])
        run.note(TurnFinished(run.turn - 1, run.usage))
        return results, limit

    async def ask(self, run: Run, calls: TurnCalls, *, think: bool) -> LimitName | None:
        """Generate one turn, and pass each call to `calls` as soon as it is complete.

        Returns:
            The limit that stopped the generation, if any.
        """
        generation = run.session.generate(think=think, limits=run.generation_limits)
        try:
            async with aclosing(generation):
                async for event in generation:
                    if isinstance(event, Generated):
                        return run.limit_of(event.reason)
                    if isinstance(event, ReasoningDelta | TextDelta):
                        run.emit(event)
                        continue
                    run.note(event)
                    if isinstance(event, CallReady):
                        calls.ready(event.index, event.call)
                    elif isinstance(event, CallMalformed):
                        calls.malformed(event, f"call_{run.turn}_{event.index}")
                    elif isinstance(event, CallsWithdrawn):
                        calls.withdraw()
        except ContextFullError:
            return "context"
        finally:
            run.note_session()
        raise AssertionError("the generation ended without a Generated event")

    async def act(self, run: Run, calls: TurnCalls) -> None:
        """Run the calls that have not been started yet, and wait for all calls of the turn."""
        await calls.finish()

    async def observe(self, run: Run, news: Sequence[Message]) -> None:
        """Add messages to the session and record them; the model reads them in its next turn."""
        await run.session.append(news)
        run.note_session()

    async def _run(
        self,
        text: str,
        emit: Callable[[Event], None],
        *,
        environment: Environment | None,
        path: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
        history: Trajectory | None = None,
        files: bytes | None = None,
    ) -> RunResult:
        """Open the sandbox, session and trajectory that are not given, converse, and close them again.

        `files` is an archive that is unpacked into the work directory first; empty bytes are an empty directory.
        """
        async with AsyncExitStack() as stack:
            tools = list(self.tools.values())
            own = await stack.enter_async_context(DeferredEnvironment(EnvironmentSpec(), open_environment))
            here = own if environment is None else environment
            if environment is None and any(tool.needs_environment for tool in tools):
                await own.open()
            if files:
                await here.import_dir(here.spec.workdir, files)
            opening = self.model.open(tools=tools, effort=self.effort, sampling=self.sampling, history=history)
            session = await stack.enter_async_context(opening)
            if history is None:
                header = Header(
                    model=self.model.name,
                    dialect=session.dialect,
                    effort=self.effort,
                    thinking=self.thinking,
                    sampling=self.sampling,
                    grammar_off=session.grammar_off,
                    prices_as_of=price.as_of if (price := price_of(self.model)) else None,
                    tools=tuple(tool.spec for tool in tools),
                    metadata=metadata or {},
                )
                trajectory = Trajectory(header, path)
            else:
                trajectory = history
                trajectory.reopen()
            stack.callback(trajectory.close)
            context = ToolContext(here, timeout_s=self.limits.call_timeout_s)
            run = Run(session, trajectory, context, self.limits, emit, self.budget)
            outcome = await self._to_the_end(run, text)
            if environment is None:
                files = None
                # only `continue_` needs the files, and it reports that they are missing
                with suppress(SandboxError, OSError):
                    files = (await own.export_dir(own.spec.workdir)).data if own.is_open else b""
        result = RunResult(outcome, trajectory, self._continuation(trajectory, environment, files))
        emit(RunFinished(result))
        return result

    async def _to_the_end(self, run: Run, text: str) -> Outcome:
        """Converse, and record an outcome in every case. If the run fails or is cancelled, kill its processes."""
        try:
            with _one_error():
                outcome = await self._converse(run, text)
        except BaseException as exc:
            cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
            with suppress(TrajectoryWriteError):
                run.note(
                    run.outcome("cancelled")
                    if cancelled
                    else run.outcome("error", error=f"{type(exc).__name__}: {exc}")
                )
            with anyio.move_on_after(KILL_TIMEOUT_S, shield=True), suppress(SandboxError):
                await run.context.environment.kill_all()
            raise
        run.note(outcome)
        return outcome

    def _continuation(self, trajectory: Trajectory, environment: Environment | None, files: bytes | None) -> Continue:
        """Return the implementation of `RunResult.continue_`."""
        end = len(trajectory.records)

        async def go_on(text: str, elsewhere: Environment | None) -> RunResult:
            if len(trajectory.records) != end:
                raise ValueError("this result was already continued; continue the newer result")
            here = elsewhere or environment
            if here is None and files is None:
                raise ValueError("the work directory of that run was not saved; pass environment= to continue")
            return await self._run(text, _unheard, environment=here, history=trajectory, files=None if here else files)

        return go_on


def model_of(name: str | Path) -> Model:
    """Return the model behind an API, the packaged model or the checkpoint folder of this name.

    Raises:
        ModelError: as `RemoteModel`.
        EngineError: as `EmbeddedModel`.
    """
    return RemoteModel(name) if isinstance(name, str) and is_remote(name) else EmbeddedModel(name)


def _unheard(event: Event) -> None:
    """Discard an event of a run that is not streamed."""


@contextmanager
def _one_error() -> Iterator[None]:
    """Re-raise the first exception of a task group without the group around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_cause(group)
        raise error from error.__cause__
