"""The cost of a hosted model per turn, run and suite, and the limits on it."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from rich.console import Console

from agentkit import Agent, CostBudget, Limits, Price, PriceError, Usage
from agentkit.cli.ending import ExitCode, code_of
from agentkit.cli.evaluation import Finished, as_json, ending
from agentkit.cli.progress import LiveProgress, result_table
from agentkit.cli.run import Job, carry_out
from agentkit.events import LimitReached, TurnFinished
from agentkit.messages import AssistantMessage, Message
from agentkit.model import (
    CallReady,
    Effort,
    Generated,
    GenerationLimits,
    History,
    ModelEvent,
    ModelSession,
    TextDelta,
    TokenSegment,
    total_cost,
)
from agentkit.models.remote.provider import TokenCounts
from agentkit.task import Task
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import open_environment
from agentkit_evals.record import RunDirectory
from agentkit_evals.report import cost_facts, render_report, render_trajectory
from agentkit_evals.run import EvalRun, TrialFinished
from agentkit_evals.suite import Case, Suite
from agentkit_tools import Tool, ToolCall

from .conftest import agentkit

MakeTask = Callable[..., Task]
Turn = Sequence[tuple[str, dict[str, Any]]] | str
LOOK: Turn = [("list_dir", {})]
SUBMIT: Turn = [("submit", {"answer": "42"})]
A_DOLLAR = Price(
    host="api.test",
    models=["*"],
    as_of="2026-11",
    source="a test",
    input=1.0,
    cache_hit=0.1,
    cache_write=1.25,
    output=2.0,
)
"""With this price a turn of `HostedModel` costs one dollar."""


class HostedModel:
    """A model behind an API without the API: it follows a script, the last turn of which repeats, and bills each turn
    as 600,000 new tokens, a million cache hits and 150,000 generated tokens."""

    def __init__(
        self, *turns: Turn, price: Price | None = A_DOLLAR, started: Callable[[], None] = lambda: None
    ) -> None:
        self.name = "hosted"
        self.sampling = SamplingParams()
        self.price = price
        self.turns = turns
        self.started = started

    @asynccontextmanager
    async def open(
        self, *, tools: Sequence[Tool], effort: Effort, sampling: SamplingParams, history: History | None = None
    ) -> AsyncIterator[ModelSession]:
        yield HostedSession(self, history)


class HostedSession:
    dialect = None
    grammar_off = "the model is behind an API"
    context_window = None
    context_tokens = 0

    def __init__(self, model: HostedModel, history: History | None) -> None:
        self.model = model
        self.messages: list[Message] = [] if history is None else list(history.messages)
        self.segments: list[TokenSegment] = []
        self.usage = Usage(cost_usd=None if model.price is None else 0.0)

    @property
    def turns(self) -> int:
        return sum(message.role == "assistant" for message in self.messages)

    async def append(self, messages: Sequence[Message]) -> None:
        self.messages.extend(messages)

    async def restart(self, messages: Sequence[Message]) -> None:
        self.messages[:] = messages

    async def prefill(self, messages: Sequence[Message]) -> None:
        pass

    async def generate(self, *, think: bool, limits: GenerationLimits) -> AsyncGenerator[ModelEvent, None]:
        number = sum(isinstance(message, AssistantMessage) for message in self.messages)
        turn = self.model.turns[min(number, len(self.model.turns) - 1)]
        self.model.started()
        text, calls = (turn, []) if isinstance(turn, str) else ("", turn)
        ready = [ToolCall(f"call_{number}_{i}", name, json.dumps(given)) for i, (name, given) in enumerate(calls)]
        message = AssistantMessage(text, calls=tuple(ready))
        if text:
            yield TextDelta(text)
        for index, call in enumerate(ready):
            yield CallReady(index, call)
        self.messages.append(message)
        tokens = TokenCounts(1_600_000, cache_hit_tokens=1_000_000, output_tokens=150_000)
        price = self.model.price
        cost = None if price is None else price.request_cost(tokens, at=datetime.now(UTC))
        self.usage = replace(
            self.usage,
            prompt_tokens=self.usage.prompt_tokens + tokens.input_tokens,
            cache_hit_tokens=self.usage.cache_hit_tokens + tokens.cache_hit_tokens,
            cache_miss_tokens=self.usage.cache_miss_tokens + tokens.input_tokens - tokens.cache_hit_tokens,
            sampled_tokens=self.usage.sampled_tokens + tokens.output_tokens,
            turns=self.usage.turns + 1,
            cost_usd=total_cost([self.usage.cost_usd, cost]),
        )
        yield Generated(message, "stop")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., EvalRun]:
    """Function that makes an evaluation of one hosted model on some tasks, one trial at a time."""

    def make(*tasks: Task, model: HostedModel, **options: Any) -> EvalRun:
        suite = Suite("tests", tuple(Case(task, str(task.metadata["family"])) for task in tasks))
        settings: dict[str, Any] = {"concurrency": 1, "backend": "unsafe-local", "model_name": model.name, **options}
        return EvalRun(suite, model, tmp_path / "run", **settings)

    return make


@pytest.mark.anyio
async def test_the_cost_of_each_turn_and_of_each_run() -> None:
    """A continued run counts anew, and the record has the sum."""
    agent = Agent(HostedModel(LOOK, "Done.", LOOK, "Done again."), thinking="never")
    async with await open_environment(backend="unsafe-local") as environment:
        result = await agent.run("Look.", environment=environment)
        again = await result.continue_("Again.", environment=environment)
    costs = [record.usage.cost_usd for record in again.trajectory.records if isinstance(record, TurnFinished)]
    assert costs == pytest.approx([1.0, 2.0, 1.0, 2.0])
    assert (result.usage.cost_usd, again.usage.cost_usd) == pytest.approx((2.0, 2.0))
    assert again.trajectory.usage.cost_usd == pytest.approx(4.0)
    page = render_trajectory(again.trajectory, "both")
    assert page.count('"cost":"$1.00"') == 4 and '"cost":"$4.00"' in page


@pytest.mark.anyio
@pytest.mark.parametrize(("limit", "turns"), [(0.5, 1), (1.0, 1), (1.01, 2), (2.5, 3)])
async def test_no_turn_starts_once_the_cost_is_reached(limit: float, turns: int) -> None:
    agent = Agent(HostedModel(LOOK), thinking="never", limits=Limits(max_cost_usd=limit))
    async with await open_environment(backend="unsafe-local") as environment:
        result = await agent.run("Look.", environment=environment)
        assert (result.status, result.limit, result.usage.turns) == ("limit", "max_cost_usd", turns)
        assert LimitReached("max_cost_usd") in result.trajectory.records
        assert len(result.trajectory.results) == turns, "the calls of the last turn are run"
        again = await result.continue_("Go on.", environment=environment)
    assert again.usage.turns == turns, "each run has its own budget"


@pytest.mark.anyio
async def test_an_answer_at_the_limit_counts() -> None:
    agent = Agent(HostedModel("42"), thinking="never", limits=Limits(max_cost_usd=0.01))
    async with await open_environment(backend="unsafe-local") as environment:
        assert (await agent.run("Answer.", environment=environment)).answer == "42"


@pytest.mark.anyio
async def test_a_budget_is_shared_by_all_runs_of_all_agents() -> None:
    budget = CostBudget(3.0)
    agents = [Agent(HostedModel(LOOK, LOOK, "Done."), thinking="never", budget=budget) for _ in range(2)]
    async with await open_environment(backend="unsafe-local") as environment:
        first = await agents[0].run("Look.", environment=environment)
        assert first.status == "answered" and budget.cost_usd == pytest.approx(3.0) and budget.spent
        second = await agents[1].run("Look.", environment=environment)
    assert (second.limit, second.usage.turns) == ("max_cost_usd", 0)


@pytest.mark.anyio
async def test_a_cost_that_becomes_unknown_ends_the_run() -> None:
    """The price of cache hits is missing, so the limit can no longer be kept."""
    price = A_DOLLAR.model_copy(update={"cache_hit": None})
    for options in ({"limits": Limits(max_cost_usd=100.0)}, {"budget": CostBudget(100.0)}):
        agent = Agent(HostedModel(LOOK, price=price), thinking="never", **options)
        async with await open_environment(backend="unsafe-local") as environment:
            result = await agent.run("Look.", environment=environment)
        assert (result.limit, result.usage.turns, result.usage.cost_usd) == ("max_cost_usd", 1, None)


def test_a_limit_on_an_unknown_price_is_refused_before_the_run(
    make: Callable[..., EvalRun], number_task: MakeTask
) -> None:
    unknown = HostedModel(LOOK, price=None)
    for refused in (
        partial(Agent, unknown, limits=Limits(max_cost_usd=1.0)),
        partial(Agent, unknown, budget=CostBudget(1.0)),
        partial(make, number_task(), model=unknown, max_cost_usd=1.0),
    ):
        with pytest.raises(PriceError, match=r"the price of hosted is unknown.*AGENTKIT_PRICES") as caught:
            refused()
        assert "\n" not in str(caught.value) and code_of(caught.value) == ExitCode.USAGE
    assert not Path("run").exists()


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
def test_a_limit_is_a_positive_number(wrong: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Limits(max_cost_usd=wrong)
    with pytest.raises(ValueError, match="must be positive"):
        CostBudget(wrong)
    with pytest.raises(TypeError, match="must be a number"):
        CostBudget("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a CostBudget or None"):
        Agent(HostedModel(LOOK), budget=1.0)  # type: ignore[arg-type]


def test_the_cost_of_a_suite(make: Callable[..., EvalRun], number_task: MakeTask) -> None:
    """One task is solved in two turns, the sandbox of the other cannot be set up and costs nothing."""
    broken = number_task("broken", environment={"setup": ["exit 3"]})
    run = anyio.run(make(number_task(), broken, model=HostedModel(LOOK, SUBMIT)).execute)
    assert run.complete and not run.out_of_budget
    assert {trial.task: trial.usage.cost_usd for trial in run.trials} == {"number": pytest.approx(2.0), "broken": None}
    assert run.usage.cost_usd == pytest.approx(2.0)
    found = as_json(Finished(run, Path("report.html"), False))
    assert (found["cost_usd"], found["list_cost_usd"], found["max_cost_usd"]) == (pytest.approx(2.0), None, None)
    assert found["list_price"] is None
    assert found["prices_as_of"] == "2026-11"
    assert cost_facts(run) == [("cost", "$2.00", "at list prices of 2026-11")]
    page = render_report(run)
    assert "<th>cost</th>" in page and '"cost":"$2.00"' in page and "<dt>cost</dt><dd>$2.00</dd>" in page
    console = Console(file=io.StringIO(), width=200)
    console.print(result_table(run))
    with LiveProgress(console, 1, {"number": number_task()}) as progress:
        progress.running["number.0"] = progress.progress.add_task("number.0")
        progress(TrialFinished(next(trial for trial in run.trials if trial.solved)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "cost" in shown.splitlines()[1] and "$2.00" in shown.splitlines()[2]
    assert " s, $2.00" in shown.splitlines()[-1]


def test_an_unknown_cost_is_shown_as_unknown(make: Callable[..., EvalRun], number_task: MakeTask) -> None:
    run = anyio.run(make(number_task(), model=HostedModel(LOOK, SUBMIT, price=None)).execute)
    assert as_json(Finished(run, Path("report.html"), False))["cost_usd"] is None
    assert cost_facts(run) == [("cost", "unknown", "")]


@pytest.mark.parametrize(("limit", "spent"), [(4.0, 4.0), (4.5, 5.0)])
def test_the_limit_of_a_suite(
    make: Callable[..., EvalRun],
    number_task: MakeTask,
    limit: float,
    spent: float,
) -> None:
    """Two trials take two turns each. A third one that may begin is stopped and not recorded, but its cost counts."""
    tasks = [number_task(f"task-{number}") for number in range(4)]
    run = anyio.run(make(*tasks, model=HostedModel(LOOK, SUBMIT), max_cost_usd=limit).execute)
    assert [trial.task for trial in run.trials if trial.solved] == ["task-0", "task-1"] and len(run.trials) == 2
    assert run.out_of_budget and run.usage.cost_usd == pytest.approx(spent)
    rest = ", $1.00 of it in unfinished trials" if spent > 4 else ""
    assert cost_facts(run) == [("cost", f"${spent:.2f}", f"at list prices of 2026-11{rest}")]
    assert f"stopped at the cost limit of ${limit:.2f}: 2 of 4 trials" in render_report(run)
    finished = Finished(run, Path("report.html"), False)
    assert ending(finished) == ExitCode.UNSOLVED and as_json(finished)["out_of_budget"]
    assert ending(Finished(run, Path("report.html"), False), threshold=0.5) == ExitCode.UNSOLVED


def test_a_suite_that_ends_at_its_limit_is_complete(make: Callable[..., EvalRun], number_task: MakeTask) -> None:
    run = anyio.run(make(number_task(), model=HostedModel(LOOK, SUBMIT), max_cost_usd=2.0).execute)
    assert run.complete and not run.out_of_budget
    assert ending(Finished(run, Path("report.html"), False)) == ExitCode.OK


def test_concurrent_trials_share_the_limit(make: Callable[..., EvalRun], number_task: MakeTask) -> None:
    """No turn starts after the limit is reached; the turns in progress go on, so at most two more are paid for."""
    spent: list[bool] = []
    model = HostedModel(LOOK, started=lambda: spent.append(run.budget is not None and run.budget.spent))
    run = make(*[number_task(f"task-{number}") for number in range(6)], model=model, max_cost_usd=5.0, concurrency=3)
    finished = anyio.run(run.execute)
    assert not any(spent) and 5 <= len(spent) <= 7
    assert finished.usage.cost_usd == pytest.approx(len(spent)) and finished.out_of_budget


def test_a_run_without_prices_has_no_facts_on_costs(
    make: Callable[..., EvalRun], number_task: MakeTask, tmp_path: Path
) -> None:
    """As one that was recorded before there were costs."""
    run = anyio.run(make(number_task(), model=HostedModel(SUBMIT, price=None)).execute)
    lock = json.loads((run.path / "run.json").read_text())
    del lock["list_price"], lock["max_cost_usd"], lock["prices_as_of"]
    (run.path / "run.json").write_text(json.dumps(lock))
    assert cost_facts(RunDirectory.open(run.path)) == []


@pytest.mark.parametrize(
    ("price", "shown"), [(A_DOLLAR, "cost $2.00 at list prices of 2026-11"), (None, "cost unknown")]
)
def test_a_run_shows_its_cost(
    number_task: MakeTask, price: Price | None, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(file=io.StringIO(), width=200)
    agent = Agent(HostedModel(LOOK, SUBMIT, price=price), thinking="never")
    assert carry_out(Job(number_task(), agent, "unsafe-local", None, None, console), apply=False, as_json=False) == 0
    assert console.file.getvalue().splitlines()[-1] == shown  # type: ignore[attr-defined]
    assert carry_out(Job(number_task(), agent, "unsafe-local", None, None, console), apply=False, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prices_as_of"] == (price and price.as_of)
    assert (found["usage"]["cost_usd"], found["list_cost_usd"]) == (price and pytest.approx(2.0), None)
    assert found["list_price"] is None


def test_a_run_stopped_by_its_cost_is_not_solved(number_task: MakeTask, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(HostedModel(LOOK), thinking="never", limits=Limits(max_cost_usd=1.5))
    job = Job(number_task(), agent, "unsafe-local", None, None, Console(file=io.StringIO()))
    assert carry_out(job, apply=False, as_json=False) == ExitCode.UNSOLVED
    assert capsys.readouterr().err == "Not solved: the limit max_cost_usd was reached.\n"


def test_what_the_embedded_model_would_have_cost(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text(
        "id: t\ninstruction: Hi.\nagent: {effort: none, max_turns: 2, max_tokens: 12}\nverifier: {command: 'true'}\n"
    )
    common = ("--env", "unsafe-local", "-m", untrained, "--no-grammar", "--seed", "1")
    shown = agentkit("run", "task.yaml", *common, code=1).output
    assert "would have cost $0.0" in shown and "at deepseek-flash list prices (2026-" in shown
    found = json.loads(agentkit("run", "task.yaml", *common, "--json", code=1).stdout)
    assert 0 < found["list_cost_usd"] < 0.01 and found["usage"]["cost_usd"] is None
    assert found["list_price"].startswith("deepseek-flash list prices (2026-")
    shown = agentkit("eval", "task.yaml", *common, "--out", "run", code=0).output
    assert "would have cost $0.0" in shown and "\ncost" not in shown
    run = RunDirectory.open("run")
    assert all(trial.list_cost_usd and 0 < trial.list_cost_usd < 0.01 for trial in run.trials)
    assert "<dt>would have cost</dt><dd>$0.0" in Path("run/report.html").read_text()


@pytest.mark.parametrize("command", [("run", "Hello."), ("chat",), ("eval", "task.yaml")])
def test_a_limit_on_the_cost_of_the_embedded_model_is_refused(
    command: tuple[str, ...], untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text("id: t\ninstruction: Hi.\nverifier: {command: 'true'}\n")
    result = agentkit(*command, "-m", untrained, "--max-cost", "1", code=2)
    assert "nothing is charged for it; leave out the limit on cost" in result.output
    assert not Path("runs").exists()


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "a dollar"])
def test_max_cost_is_a_positive_number(wrong: str) -> None:
    for command in (("run", "Hello."), ("chat",), ("eval", "synth")):
        assert "--max-cost" in agentkit(*command, "--max-cost", wrong, code=2).output


@pytest.mark.parametrize("command", [("run", "Hello."), ("eval", "task.yaml")])
def test_a_broken_price_table_is_reported_before_the_run(
    command: tuple[str, ...], untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text("id: t\ninstruction: Hi.\nverifier: {command: 'true'}\n")
    Path("prices.yaml").write_text("prices:\n- host: localhost\n")
    monkeypatch.setenv("AGENTKIT_PRICES", "prices.yaml")
    assert 'prices.yaml:2: missing key "prices.0.' in agentkit(*command, "-m", untrained, code=2).output
    assert not Path("runs").exists()
