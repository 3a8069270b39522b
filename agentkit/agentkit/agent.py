"""The agent loop: ask the model, run its calls, feed it the results, until it is done."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from copy import copy
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Final, Generic

import anyio
import anyio.to_thread

from agentkit.approval import Approvals, AskHuman, Policy
from agentkit.checks import check_model, check_positive, check_type, run_blocking
from agentkit.compaction import Compaction, make_room
from agentkit.errors import ContextFullError, TrajectoryWriteError, first_cause
from agentkit.events import (
    CallFinished,
    Event,
    LimitName,
    LimitReached,
    Outcome,
    RunFinished,
    Status,
    TurnFinished,
    TurnStarted,
)
from agentkit.forks import (
    BestOf,
    Judge,
    Origin,
    Start,
    Visit,
    World,
    Worlds,
    best_of,
    fork_paths,
    ignore,
    run_all,
    seeded,
)
from agentkit.history import MessageHistory, opening_messages
from agentkit.interrupted import (
    FILES_RESTORED,
    NOTHING,
    ResumePoint,
    check_settings,
    interrupted_run,
    last_turn_changes_files,
)
from agentkit.limits import ConcurrencyLimits, CostBudget, Limits
from agentkit.messages import AssistantMessage, Message, Prompt, ToolMessage, UserMessage, unanswered, user_message
from agentkit.model import (
    CallMalformed,
    CallReady,
    CallsWithdrawn,
    Effort,
    Generated,
    Model,
    ModelSession,
    ReasoningDelta,
    TextDelta,
)
from agentkit.models.embedded import EmbeddedModel
from agentkit.models.remote.session import RemoteModel
from agentkit.output import RETRY, T, output_of
from agentkit.prices import check_price, price_of
from agentkit.progress import shown_progress
from agentkit.result import RunResult
from agentkit.run import Run, RunContext
from agentkit.saved import remove_snapshots, saved_snapshot
from agentkit.subagent import AgentTool
from agentkit.thinking import Thinking, ThinkingPolicy, thinking_policy
from agentkit.trajectory import Header, Trajectory
from agentkit.turn import TurnCalls
from agentkit_engine.errors import ModelNotFoundError
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import (
    DeferredEnvironment,
    Environment,
    EnvironmentSpec,
    SandboxError,
    Snapshot,
    SnapshotError,
    open_environment,
)
from agentkit_tools import BUILTINS, Tool, ToolResult, as_tool
from agentkit_tools.model_texts import DEFAULT_SYSTEM as DEFAULT_SYSTEM

KILL_TIMEOUT_S: Final = 0.8
SPILL_DIR: Final = "/tmp/agentkit"
"""Directory of the environment for the whole text of results that are too long for the model."""


class Agent(Generic[T]):
    """A model with tools, a thinking policy and limits. An agent can run many tasks, also concurrently.

    Type checkers infer the type of `RunResult.output` from `output_type`. A union or `Literal` is not a class; write
    `output_type=cast(Any, int | str)` for it.

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
        output_type: type[T] | None = None,
        output_schema: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        concurrency: ConcurrencyLimits | None = None,
        budget: CostBudget | None = None,
        approval: Policy | Sequence[Policy] = (),
        on_ask: AskHuman | None = None,
        compaction: Compaction | None = None,
    ) -> None:
        """Create an agent.

        Args:
            model: A model, or a name: `"tiny"` or a checkpoint folder (see `EmbeddedModel`), or a model behind an API
                such as `"openai:gpt-5"`, `"anthropic:claude-sonnet-4-5"` or `"deepseek:deepseek-flash"` (see
                `RemoteModel`).
            tools: Tools that the model may call, in prompt order, as tools or plain functions with typed parameters.
                Default: the built-in tools. With an output type or schema, `submit` is left out, because no grammar
                constrains its answer.
            system: The system prompt; `DEFAULT_SYSTEM` by default, none if empty.
            thinking: The turns that think: "always", "never", "auto" (the first turn, and every turn after a failed
                result), or a function of the messages that the turn answers.
            effort: Reasoning effort for the whole session. With "none", the model never thinks.
            sampling: All sampling parameters. Default: `model.sampling`, which the model's folder defines.
                `model.sampling.override(temperature=0)` changes some of them.
            output_type: Type of the answer: a pydantic model, dataclass, TypedDict, `list[int]`, `Literal`, union and
                so on. The model is shown its JSON schema and constrained to it. The answer is validated with pydantic.
                An answer that does not fit is returned to the model once, with the reason.
            output_schema: A JSON schema of the answer, instead of `output_type`. The output is a JSON value.
            limits: The budget of each run.
            concurrency: Limits on calls that run at the same time. An agent that is run by a tool's own code needs
                separate limits, or the two agents may wait for each other. An agent from `as_tool` does not.
            budget: A limit on the cost of all runs of all agents that are given this object.
            approval: Policies that decide on each call before it runs; see `agentkit.approval`.
            compaction: Makes room in the context window when it is nearly full. Default: nothing is removed, and a full
                context ends the run with the limit "context".
            on_ask: Asks a human about a call, for policies that return `Ask()`; a function that is not async runs in a
                thread. Without `on_ask`, such calls are refused.

        Raises:
            TypeError: an argument is of the wrong type.
            ToolDefinitionError: a function cannot be a tool; the message says what to change.
            ValueError: two tools have the same name, the thinking policy or effort is unknown, `output_type` has no
                JSON schema, `output_schema` is not one, or both are given.
            EngineError: see `EmbeddedModel`.
            PriceError: a limit on the cost is given, and the price of the model is unknown.
        """
        check_type("Agent(sampling=...)", sampling, SamplingParams | None, "a SamplingParams or None")
        check_type("Agent(limits=...)", limits, Limits | None, "a Limits or None")
        check_type("Agent(concurrency=...)", concurrency, ConcurrencyLimits | None, "a ConcurrencyLimits or None")
        check_type("Agent(budget=...)", budget, CostBudget | None, "a CostBudget or None")
        check_type("Agent(compaction=...)", compaction, Compaction | None, "a Compaction or None")
        check_type("Agent(system=...)", system, str | None, "a text or None")
        self._thinks = thinking_policy(thinking, effort)
        if output_type is None and output_schema is None and sampling is not None:
            output_schema = sampling.output_schema
        self._output = output_of(output_type, output_schema)
        self.model = model_of(model) if isinstance(model, str | Path) else check_model(model)
        self.sampling = (sampling or self.model.sampling).override(output_schema=self._output.schema)
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
        self.limits = self._bounded(limits or Limits())
        self.concurrency = concurrency or ConcurrencyLimits()
        self.budget = budget
        self.compaction = compaction
        if self.limits.max_cost_usd is not None or budget is not None:
            check_price(self.model, self.model.name)
        policies = [approval] if callable(approval) else approval
        check_type("Agent(approval=...)", policies, list | tuple, "a policy or a list of policies")
        self.approvals = Approvals(policies, on_ask)

    async def run(
        self,
        task: Prompt,
        *,
        environment: Environment | None = None,
        trajectory: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
        message_history: MessageHistory | None = None,
        deps: object = None,
        snapshots: bool = False,
        save_snapshots: bool = False,
    ) -> RunResult[T]:
        """Run a task.

        Args:
            task: The user message: a text, or a list of texts and images (`ImagePart`) for a model that reads images.
            environment: Environment that calls run in; the run does not close it. Default: a new sandbox for this
                run, opened before the first turn if a tool needs one (`Tool.needs_environment`).
            trajectory: New file for the record, written during the run. Default: in memory only.
            metadata: JSON values for the header of the record.
            message_history: Messages that come before the task, or a run whose messages are used. The model reads
                them again, whereas `RunResult.continue_` continues from the exact tokens. A system prompt among them
                replaces the agent's.
            deps: Object for the tools, which they receive as `ToolContext.deps`; it is not shown to the model.
            snapshots: Keep the environment's files from before each turn, so that `RunResult.fork` can return to it.
            save_snapshots: Save the environment's files beside `trajectory`, before the first turn and after each turn
                that may have changed them, so that `resume` goes on there. Only the last ones are kept, until the run
                ends. Processes are not saved.

        Raises:
            TypeError: a tool needs `deps` of another class, or `message_history` has an item that is not a message.
            ValueError: `message_history` is not a conversation (the message has the index), or `save_snapshots` is set
                without `trajectory`.
            SandboxError: no sandbox can be opened, the sandbox was lost, or its files cannot be saved.
            TrajectoryWriteError: the record cannot be written.
            EncodeError: the model's prompt format does not have the effort.
            EngineError: the engine failed.
            ModelError: an API cannot be reached, or refuses the key, the model or the request.
        """
        return await self._run(
            task,
            ignore,
            environment=environment,
            path=trajectory,
            metadata=metadata,
            message_history=message_history,
            deps=deps,
            worlds={} if snapshots else None,
            save_snapshots=save_snapshots,
        )

    async def best_of(
        self,
        task: Prompt,
        *,
        n: int,
        judge: Judge,
        environment: Environment | None = None,
        trajectory: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
        message_history: MessageHistory | None = None,
        deps: object = None,
    ) -> BestOf[T]:
        """Run a task `n` times, score each result, and return all with the best one.

        The runs happen at the same time, with the agent's seed and the numbers after it, if it has one. The engine
        computes the prompt once.

        Args:
            task: See `run`.
            n: Number of runs.
            judge: A function, async or not, of a result and its environment, which is still open. It returns a number.
            environment: Environment whose files each run begins with, in a copy of its own. Default: a new sandbox for
                each run.
            trajectory: New files for the records: `run.fork1.jsonl` and so on for `run.jsonl`.
            metadata: See `run`.
            message_history: See `run`.
            deps: See `run`.

        Raises:
            TypeError, ValueError: the judge returns no number.
            Other errors: see `run` and `Environment.fork`. They stop all runs.
        """
        check_positive("best_of(n=...)", n, whole=True)
        world = None if environment is None else await World.of(environment)
        paths = fork_paths(None if trajectory is None else Path(trajectory), n)

        def start(agent: Agent[T], path: Path | None) -> Start:
            return lambda visit: agent._run(
                task,
                ignore,
                environment=None,
                path=path,
                metadata=metadata,
                message_history=message_history,
                deps=deps,
                world=world,
                visit=visit,
            )

        agents = seeded(self, n, self.sampling.seed)
        return best_of(*await run_all([start(*each) for each in zip(agents, paths, strict=True)], judge))

    def run_sync(
        self,
        task: Prompt,
        *,
        trajectory: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
        message_history: MessageHistory | None = None,
        deps: object = None,
        snapshots: bool = False,
        save_snapshots: bool = False,
        progress: bool | None = None,
    ) -> RunResult[T]:
        """Run a task from synchronous code, in its own sandbox.

        After one second, a progress line is shown on standard error if that is a terminal or `progress` is True.

        Raises:
            RunningLoopError: an event loop is running, as in a notebook. Use `await agent.run(...)` there.
        """
        with shown_progress(progress) as emit:
            return run_blocking(
                lambda: self._run(
                    task,
                    emit,
                    environment=None,
                    path=trajectory,
                    metadata=metadata,
                    message_history=message_history,
                    deps=deps,
                    worlds={} if snapshots else None,
                    save_snapshots=save_snapshots,
                ),
                instead="await agent.run(...)",
            )

    async def resume(
        self,
        trajectory: Trajectory | str | Path,
        *,
        environment: Environment | None = None,
        world_turns: int | None = None,
        deps: object = None,
        save_snapshots: bool = False,
    ) -> RunResult[T]:
        """Resume a run that was interrupted, and continue its record and its file.

        The run goes on after its last complete turn, from exactly the recorded token ids; with a disk cache, the model
        finds their state there. The turn in flight is done again, unless a call of a tool that is not read-only had
        started: then calls without a recorded result get an error result, "outcome unknown". The usage of the run
        counts towards the limits. What is cut from the file moves to a file `.torn` beside it.

        Without the files of the run, it goes on before the first turn that may have changed them: turns are done again
        from the first one in which a tool that needs an environment and is not read-only was called. With a snapshot
        beside the record (see `run`), these are only turns after it, such as the one in flight. If the last turn had
        also started a call with effects elsewhere, it is kept, and the model is told that its files are those from
        before it.

        Args:
            trajectory: The record, or its file. The agent must have the model, tools and other settings of the record.
            environment: Environment for the calls. Default: a new sandbox for this run, with the files of the snapshot
                beside the record, if there is one.
            world_turns: Number of turns of the session whose effects the environment has. Default: all turns if
                `environment` is given, those of the snapshot in a new sandbox.
            deps: As for `run`.
            save_snapshots: As for `run`.

        Raises:
            ResumeError: the run has ended or has no turn yet, the agent has other settings, or doing a turn again would
                repeat a call that may have had effects outside the environment.
            TrajectoryError: see `Trajectory.load`.
            Other errors: see `run`.
        """
        history = trajectory if isinstance(trajectory, Trajectory) else Trajectory.load(trajectory)
        world = None
        if environment is None:
            world_turns = 0
            if (saved := saved_snapshot(history)) is not None:
                world, world_turns = World(None, Snapshot.load(saved.path)), saved.turns
        return await self._run(
            None,
            ignore,
            environment=environment,
            history=history,
            point=interrupted_run(history, self.tools, world_turns=world_turns),
            deps=deps,
            world=world,
            save_snapshots=save_snapshots,
        )

    def resume_sync(
        self, trajectory: Trajectory | str | Path, *, deps: object = None, save_snapshots: bool = False
    ) -> RunResult[T]:
        """Run `resume` from synchronous code.

        Raises:
            RunningLoopError: an event loop is running, as in a notebook. Use `await agent.resume(...)` there.
        """
        return run_blocking(
            lambda: self.resume(trajectory, deps=deps, save_snapshots=save_snapshots),
            instead="await agent.resume(...)",
        )

    async def stream(
        self,
        task: Prompt | None,
        *,
        environment: Environment | None = None,
        trajectory: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
        history: Trajectory | None = None,
        world_turns: int | None = None,
        message_history: MessageHistory | None = None,
        deps: object = None,
        snapshots: bool = False,
        save_snapshots: bool = False,
        keep_snapshot: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Run a task and yield each event as it happens; the last one is `RunFinished`.

        With `history`, the run continues that record and its file, as `RunResult.continue_` does, or without a task as
        `resume` does. `environment` is then required, and `trajectory`, `metadata` and `message_history` are not
        allowed. With `keep_snapshot`, the newest saved snapshot stays beside the record after the end of the run.

        To leave early, close the generator in the task that iterates it: `async with aclosing(agent.stream(...))`. This
        cancels the run.

        Raises:
            ValueError: `history` is given without `environment`, or with an argument that it does not allow.
            Other errors: see `run`.
        """
        new = (trajectory, metadata, message_history)
        if history is not None and (environment is None or any(given is not None for given in new)):
            raise ValueError("history needs an environment, and takes no trajectory, metadata or message_history")
        if task is None and history is None:
            raise ValueError("without a task there is nothing to do; only an interrupted run (history) needs none")
        point = None
        if task is None and history is not None:
            point = interrupted_run(history, self.tools, world_turns=world_turns)
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
                    point=point,
                    message_history=message_history,
                    deps=deps,
                    worlds={} if snapshots else None,
                    save_snapshots=save_snapshots,
                    keep_snapshot=keep_snapshot,
                )

        with send, receive, _one_error():
            async with anyio.create_task_group() as task_group:
                task_group.start_soon(drive, name="agentkit: run")
                async for event in receive:
                    yield event

    def as_tool(
        self, name: str, description: str, *, limits: Limits | None = None, own_sandbox: bool = False
    ) -> AgentTool:
        """Return a tool that runs this agent on a task that the calling model writes. Its result is the answer.

        The agent does not see the caller's conversation. It gets the `deps` of the caller's run, its calls also go
        through the caller's approvals, and cancelling the caller cancels it. If it reaches a limit, gives no answer or
        fails, the call gets an error result. Its usage counts in the caller's `Usage.subagents`. Its record is in
        `Trajectory.subagents`, and in a file beside the caller's (`run.agent1.jsonl` beside `run.jsonl`).

        Args:
            name: Name of the tool.
            description: Tells the calling model when to use the agent.
            limits: The budget of each run. Default: the agent's own limits.
            own_sandbox: Run in a new sandbox rather than in the caller's environment.

        Raises:
            ToolDefinitionError: the name or description is invalid.
        """
        agent = copy(self)
        agent.limits = self._bounded(limits or self.limits)
        return AgentTool(agent, name, description, own_sandbox=own_sandbox)

    def _bounded(self, limits: Limits) -> Limits:
        """Return the limits with the sampling parameter `max_tokens`, which bounds each turn."""
        if self.sampling.max_tokens is None:
            return limits
        bounds = (self.sampling.max_tokens, limits.max_tokens_per_turn or self.sampling.max_tokens)
        return replace(limits, max_tokens_per_turn=min(bounds))

    async def _converse(self, run: Run, news: list[Message], point: ResumePoint | None = None) -> Outcome:
        """Run turns until the model submits or answers, or a limit is reached.

        An answer that does not fit is returned to the model once. A run that goes on at a point begins with the results
        of its last turn, if they have not been answered.
        """
        last = None
        if point is not None:
            last, news = await self._last_turn(run, point), point.news
        else:
            await self.observe(run, news)
            if answered := sum(isinstance(message, AssistantMessage) for message in news):  # a message history
                run.turn = answered
            news = unanswered(news)
        if point is None or not point.is_fork:  # a fork has the files already
            await run.keep_world()
        if run.save_snapshots:
            await run.save_world()
        may_retry = point is None or not point.retried
        while last is not None or (limit := run.spent_limit) is None:
            results, limit = last or await self._turn(run, news)
            last = None
            news = [ToolMessage.of(result) for result in results]
            if submitted := next((result for result in results if result.final), None):
                outcome = await self._conclude(run, "submitted", submitted.content)
            elif limit is not None:
                break
            elif not results:
                outcome = await self._conclude(run, "answered", run.session.messages[-1].content)
            else:
                continue
            if outcome.status != "invalid_output" or not may_retry or limit is not None or run.spent_limit is not None:
                return outcome
            may_retry = False
            news.append(UserMessage(RETRY.format(problem=outcome.error)))
            await self.observe(run, news[-1:])
        run.note(LimitReached(limit))
        return run.outcome("limit", limit=limit)

    async def _last_turn(self, run: Run, point: ResumePoint) -> tuple[list[ToolResult], LimitName | None] | None:
        """Complete the last turn before a point; return its results and limit as `_turn` does, if it had calls."""
        for result in point.unrecorded:
            run.note(CallFinished(result))
        await self.observe(run, [ToolMessage.of(each) for each in point.results if each.call_id in point.unread])
        if point.turn_open:
            run.note(TurnFinished(run.turn - 1, run.usage))
        if point.files_restored:
            await self.observe(run, [UserMessage(FILES_RESTORED)])
        return (point.results, point.limit) if point.results else None

    async def _conclude(self, run: Run, status: Status, answer: str) -> Outcome:
        """Return the outcome of a run that has an answer. An empty answer or one that does not fit the schema is
        refused."""
        if status == "answered" and not answer.strip():
            refused = "the provider refused to answer: its filter stopped the last turn"
            error = refused if run.refused else "the last turn has no call, and no text outside its reasoning"
            return run.outcome("no_answer", error=error)
        answer = self._output.bare(answer)
        problem = await self._output.misfit(answer)
        return run.outcome(status, answer) if problem is None else run.outcome("invalid_output", error=problem)

    async def _turn(self, run: Run, news: list[Message]) -> tuple[list[ToolResult], LimitName | None]:
        """Run one turn: ask, act, observe.

        Returns:
            The results of the turn's calls in call order, and the limit that stopped the turn, if any.
        """
        if self.compaction is not None:
            await make_room(run, self.compaction)
        think = self._thinks(news) and run.generation_limits.max_thinking_tokens != 0
        run.note(TurnStarted(run.turn, think))
        calls = TurnCalls(
            self.tools,
            run.context,
            self.concurrency,
            run.note,
            run.emit,
            approvals=run.approvals,
            max_calls=self.limits.max_calls_per_turn,
        )
        limit: LimitName | None = None
        stopped_by = "the run broke off"
        try:
            async with anyio.create_task_group() as task_group:
                calls.open(task_group, deadline=run.deadline, time_left_s=run.tool_time_left_s)
                limit = await self.ask(run, calls, think=think)
                run.charge()  # sub-agents that its calls run must not spend it again
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
        if run.save_snapshots and last_turn_changes_files(run.trajectory.records, self.tools):
            with suppress(SnapshotError):  # too many files; the ones from before stay
                await run.save_world()
        run.note(TurnFinished(run.turn - 1, run.usage))
        await run.keep_world()
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
        """Run the calls that have not been started yet, and wait for all calls of the turn.

        Meanwhile a model in this process computes the results in call order, as far as they are there.
        """
        if calls.count < 2:
            await calls.finish()
            return
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(_prefill, run.session, calls, name="agentkit: prefill of results")
            await calls.finish()
            task_group.cancel_scope.cancel()

    async def observe(self, run: Run, news: Sequence[Message]) -> None:
        """Add messages to the session and record them; the model reads them in its next turn."""
        await run.session.append(news)
        run.note_session()

    async def _run(
        self,
        task: Prompt | None,
        emit: Callable[[Event], None],
        *,
        environment: Environment | None,
        path: str | Path | None = None,
        metadata: dict[str, Any] | None = None,
        history: Trajectory | None = None,
        point: ResumePoint | None = None,
        message_history: MessageHistory | None = None,
        deps: object = None,
        above: RunContext | None = None,
        world: World | None = None,
        worlds: Worlds | None = None,
        save_snapshots: bool = False,
        keep_snapshot: bool = False,
        visit: Visit | None = None,
    ) -> RunResult[T]:
        """Open the sandbox, session and trajectory that are not given, converse, and close them again.

        Args:
            task: The user message; None if the run goes on at `point`.
            emit: Called with each event.
            environment: See `run`.
            path: See `run`.
            metadata: See `run`.
            history: The record that the run continues.
            point: The place in `history` at which the run goes on, if it is resumed or a fork.
            message_history: See `run`.
            deps: See `run`.
            above: The context of the call that runs this agent as a sub-agent.
            world: The files that a new sandbox starts with.
            worlds: Receives the files before each turn.
            save_snapshots: See `run`.
            keep_snapshot: See `stream`.
            visit: Called with the result while the environment is open.
        """
        self._check_deps(deps)
        if save_snapshots and path is None and (history is None or history.path is None):
            raise ValueError("save_snapshots=True needs a file beside which to save them; give trajectory=...")
        news: list[Message] = []
        before = history
        if point is not None:
            assert history is not None
            before = history.branch(history.header, None, point.length)
        else:
            assert task is not None
            asked = user_message(task)
            news = [asked]
            if history is None or not history.messages:
                news = opening_messages(message_history, asked, system=self.system, output_schema=self.output_schema)
        async with AsyncExitStack() as stack:
            tools = list(self.tools.values())
            opener, spec = (open_environment, EnvironmentSpec()) if world is None else (world.open, world.spec)
            own = await stack.enter_async_context(DeferredEnvironment(spec, opener))
            here = own if environment is None else environment
            if environment is None and any(tool.needs_environment for tool in tools):
                await own.open()
            if here.phase == "setup":
                await here.enter_phase("agent")
            opening = self.model.open(tools=tools, effort=self.effort, sampling=self.sampling, history=before)
            session = await stack.enter_async_context(opening)
            if history is None:
                if above is not None and above.call is not None:
                    path = above.run.subagent_path()
                    metadata = {"parent": above.run.trajectory.header.id, "call_id": above.call.id}
                trajectory = Trajectory(self._header(session, metadata), path)
            else:
                trajectory = history
                if point is not None and not point.is_fork:
                    check_settings(trajectory.header, self._header(session, None))
                    trajectory.rewind(point.length)
                trajectory.reopen()
            stack.callback(trajectory.close)
            approvals, budget = self.approvals, self.budget
            if above is not None:
                approvals = approvals.below(above.run.approvals)
                if budget is None and price_of(self.model) is not None:
                    budget = above.run.budget
                if above.call is not None:
                    stack.enter_context(above.run.subagent(above.call, trajectory))
            run = Run(
                session,
                trajectory,
                here,
                self.limits,
                emit,
                budget,
                agent=self,
                approvals=approvals,
                deps=deps,
                spill_dir=SPILL_DIR if any(tool.needs_environment for tool in tools) else None,
                above=above,
                shared=NOTHING if point is None else point.shared,
                spent=NOTHING if point is None else point.spent,
                start=world,
                worlds=worlds,
                save_snapshots=save_snapshots,
            )
            outcome = await self._to_the_end(run, news, point)
            if trajectory.path is not None and not keep_snapshot:  # there is nothing to resume
                with suppress(OSError):
                    await anyio.to_thread.run_sync(remove_snapshots, trajectory.path)
            is_saved = False
            if environment is None and above is None:
                # only `continue_` needs the files, and it reports that they are missing
                with suppress(SandboxError, OSError):
                    world = await run.world() if worlds is None else worlds[run.turn]
                    is_saved = True
            output = None if outcome.answer is None else self._output.value(outcome.answer)
            origin = Origin(
                agent=self,
                trajectory=trajectory,
                environment=environment,
                world=world,
                is_saved=is_saved,
                worlds=worlds,
                deps=deps,
            )
            result = RunResult(outcome, output, trajectory, origin)
            if visit is not None:
                await visit(result, here)
        emit(RunFinished(result))
        return result

    def _header(self, session: ModelSession, metadata: dict[str, Any] | None) -> Header:
        price = price_of(self.model)
        return Header(
            model=self.model.name,
            dialect=session.dialect,
            effort=self.effort,
            thinking=self.thinking,
            sampling=self.sampling,
            grammar_off=session.grammar_off,
            prices_as_of=None if price is None else price.as_of,
            tools=tuple(tool.spec for tool in self.tools.values()),
            metadata=metadata or {},
        )

    async def _to_the_end(self, run: Run, news: list[Message], point: ResumePoint | None) -> Outcome:
        """Converse, and record an outcome in every case. If the run fails or is cancelled, kill its processes."""
        try:
            with _one_error():
                outcome = await self._converse(run, news, point)
        except BaseException as exc:
            cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
            with suppress(TrajectoryWriteError):
                run.note(
                    run.outcome("cancelled")
                    if cancelled
                    else run.outcome("error", error=f"{type(exc).__name__}: {exc}")
                )
            if not run.is_guest:
                with anyio.move_on_after(KILL_TIMEOUT_S, shield=True), suppress(SandboxError):
                    await run.context.environment.kill_all()
            raise
        run.note(outcome)
        return outcome

    def _check_deps(self, deps: object) -> None:
        for tool in self.tools.values():
            for needed in tool.deps_types:
                if not isinstance(deps, needed):
                    raise TypeError(
                        f"tool {tool.name!r} needs deps of type {needed.__name__}, got {deps!r:.100}; "
                        f"pass deps=... to the run"
                    )


def model_of(name: str | Path) -> Model:
    """Return the model behind an API, the packaged model or the checkpoint folder of this name.

    Raises:
        ModelError: see `RemoteModel`.
        EngineError: see `EmbeddedModel`.
    """
    remote = isinstance(name, str) and ":" in name and not Path(name).exists()
    if remote:
        return RemoteModel(str(name))
    try:
        return EmbeddedModel(name)
    except ModelNotFoundError as error:
        hint = "a model behind an API is named with its provider, such as openai:MODEL"
        raise ModelNotFoundError(f"{error}; {hint}") from None


async def _prefill(session: ModelSession, calls: TurnCalls) -> None:
    results: list[ToolResult] = []
    while True:
        results = await calls.more_in_order(len(results))
        if len(results) == calls.count:  # `observe` follows at once
            return
        await session.prefill([ToolMessage.of(result) for result in results])


@contextmanager
def _one_error() -> Iterator[None]:
    """Re-raise the first exception of a task group without the group around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_cause(group)
        raise error from error.__cause__
