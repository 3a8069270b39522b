"""The cost of a model behind an API is that of the tokens that the API reports, each request once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import anyio.from_thread
import pytest
import typer.testing
from servers.chat import ChatServer, calls, chunk, error, event, forever, text
from servers.http import Reply

from agentkit import Agent, Limits, Price, PriceError, Prices, RemoteModel, RunResult, TurnFinished, tool
from agentkit.cli import app
from agentkit_environments import Environment
from agentkit_evals.record import RunDirectory

OURS = Price(host="127.0.0.1:*", models=["toy"], as_of="2026-11", source="a test", input=1, cache_hit=0.1, output=2)
FIRST = {
    "prompt_tokens": 50,
    "completion_tokens": 30,
    "total_tokens": 80,
    "prompt_tokens_details": {"cached_tokens": 40},
    "completion_tokens_details": {"reasoning_tokens": 12},
}
COSTS = ((10 * 1 + 40 * 0.1 + 30 * 2) / 1e6, (20 * 1 + 5 * 2) / 1e6)
"""Costs of a turn with the usage `FIRST`, and of one with the usage that the server reports by default."""


@tool(read_only=True)
def look(at: str) -> str:
    """Look at something."""
    return f"a {at}"


async def run(
    server: ChatServer, environment: Environment, *, price: Price = OURS, limits: Limits | None = None
) -> RunResult:
    async with server.serve() as url:
        model = RemoteModel("openai:toy", base_url=url, api_key="k", prices=Prices([price]))
        return await Agent(model, [look], limits=limits).run("Look.", environment=environment)


@pytest.mark.anyio
async def test_the_cost_of_each_turn(environment: Environment) -> None:
    server = ChatServer(calls(("look", '{"at": "cat"}'), usage=FIRST), text("A cat."))
    result = await run(server, environment)
    turns = [record.usage.cost_usd for record in result.trajectory.records if isinstance(record, TurnFinished)]
    assert turns == pytest.approx([COSTS[0], sum(COSTS)])
    assert result.usage.cost_usd == pytest.approx(sum(COSTS))
    assert result.trajectory.header.prices_as_of == "2026-11"


@pytest.mark.anyio
async def test_a_request_that_is_sent_again_is_counted_once(environment: Environment) -> None:
    broken = Reply(event(chunk({"content": "A c"})), cut=True)
    server = ChatServer(error(429, "slow down"), broken, error(503, "overloaded"), text("A cat."))
    result = await run(server, environment)
    assert len(server.requests) == 4 and result.usage.turns == 1
    assert result.usage.cost_usd == pytest.approx(COSTS[1])


@pytest.mark.anyio
async def test_a_limit_on_the_cost(environment: Environment) -> None:
    server = ChatServer(calls(("look", '{"at": "cat"}'), usage=FIRST))
    result = await run(server, environment, limits=Limits(max_cost_usd=2.5 * COSTS[0]))
    assert (result.limit, result.usage.turns, len(server.requests)) == ("max_cost_usd", 3, 3)


@pytest.mark.anyio
async def test_a_turn_without_counts_has_an_unknown_cost(environment: Environment) -> None:
    """Nor can a limit on the cost be kept then."""
    server = ChatServer(calls(("look", '{"at": "cat"}'), usage=None))
    result = await run(server, environment, limits=Limits(max_cost_usd=1.0))
    assert (result.usage.cost_usd, result.limit, len(server.requests)) == (None, "max_cost_usd", 1)


@pytest.mark.anyio
async def test_cache_hits_without_a_price(environment: Environment) -> None:
    server = ChatServer(calls(("look", '{"at": "cat"}'), usage=FIRST), text("A cat."))
    result = await run(server, environment, price=OURS.model_copy(update={"cache_hit": None}))
    assert result.usage.cost_usd is None and result.answer == "A cat."


@pytest.mark.anyio
@pytest.mark.parametrize("earlier", [0, 1])
async def test_the_cost_of_a_turn_that_was_stopped_is_estimated(environment: Environment, earlier: int) -> None:
    """The API counts nothing then. The estimate has the whole conversation, with the 80 tokens counted last."""
    turns = [calls(("look", '{"at": "cat"}'), usage=FIRST)] * earlier
    result = await run(ChatServer(*turns, Reply(forever())), environment, limits=Limits(wall_time_s=0.5))
    assert (result.limit, result.usage.turns) == ("wall_time_s", earlier + 1)
    assert result.usage.cost_usd is not None
    estimate = result.usage.cost_usd - COSTS[0] * earlier
    assert (80 * earlier + 1) / 1e6 < estimate < 0.01


@pytest.fixture
def priced_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Base URL of a server whose answers each cost 0.00003 dollars, in a folder with its price table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENTKIT_PRICES", "prices.yaml")
    Path("prices.yaml").write_text(f"prices: [{json.dumps(OURS.model_dump(exclude_none=True))}]")
    for name in ("first", "second", "third"):
        Path("suite").mkdir(exist_ok=True)
        Path("suite", f"{name}.yaml").write_text(f"id: {name}\ninstruction: Hi.\nverifier: {{command: 'true'}}\n")
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(ChatServer(text("A cat.")).serve()) as url,
    ):
        yield url


def agentkit(*arguments: str, code: int, said: str | None = None) -> typer.testing.Result:
    common = ["-m", "openai:toy", "--env", "unsafe-local"]
    result = typer.testing.CliRunner().invoke(app, [*arguments, *common], input=said, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_run_shows_the_cost(priced_server: str) -> None:
    shown = agentkit("run", "Hi.", "--base-url", priced_server, "--max-cost", "1", code=0).output
    assert "\ncost $0.000030 at list prices of 2026-11\n" in shown


def test_a_chat_has_one_limit_on_its_cost(priced_server: str) -> None:
    options = ("--base-url", priced_server, "--max-cost", "0.00005")
    shown = agentkit("chat", *options, code=1, said="Hi.\n/new\nHi again.\nNever read.\n").output
    assert shown.count("A cat.") == 2
    assert shown.endswith("The cost limit of $0.000050 is reached.\ncost $0.000060\n")


def test_a_suite_stops_at_its_limit(priced_server: str) -> None:
    options = ("--base-url", priced_server, "--max-cost", "0.00005", "-n", "1")
    result = agentkit("eval", "suite", *options, "--out", "run", code=1)
    assert "--max-cost reached after 2 of 3 trials" in result.stderr
    assert "\ncost $0.000060 at list prices of 2026-11\n" in result.stdout
    assert len(RunDirectory.open("run").trials) == 2


def test_a_limit_needs_a_price(priced_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTKIT_PRICES")
    for command in (("run", "Hi."), ("chat",), ("eval", "suite")):
        result = agentkit(*command, "--base-url", priced_server, "--max-cost", "1", code=2)
        assert "Error: the price of openai:toy is unknown" in result.output
    assert "\ncost unknown\n" in agentkit("run", "Hi.", "--base-url", priced_server, code=0).output


@pytest.mark.anyio
async def test_the_price_belongs_to_the_host(tmp_path: Path) -> None:
    """The same model at another server has no known price, and then no limit on the cost."""
    assert RemoteModel("openai:gpt-4.1", api_key="k", base_url="http://localhost:8000/v1").price is None
    hosted = RemoteModel("deepseek:deepseek-flash", api_key="k")
    assert hosted.price is not None and hosted.price.host == "api.deepseek.com"
    assert RemoteModel("openai:deepseek-flash", api_key="k", base_url="https://api.deepseek.com").price == hosted.price
    with pytest.raises(PriceError, match="the price of openai:toy is unknown"):
        Agent(RemoteModel("openai:toy", api_key="k", base_url="http://localhost:1"), limits=Limits(max_cost_usd=1.0))
    (tmp_path / "own.yaml").write_text("prices: 3")
    with pytest.raises(PriceError, match=r"own\.yaml:1: prices: input should be a valid list"):
        RemoteModel("openai:toy", api_key="k", base_url="http://localhost:1", prices=tmp_path / "own.yaml")
    with pytest.raises(TypeError, match=r"RemoteModel\(prices=\.\.\.\) must be a Prices, a file or None"):
        RemoteModel("openai:toy", api_key="k", base_url="http://localhost:1", prices=3)  # type: ignore[arg-type]
