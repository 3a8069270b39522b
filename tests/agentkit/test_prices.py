"""A cost is the sum of known list prices of billed tokens, or it is unknown."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit import (
    Agent,
    AssistantTurn,
    CostBudget,
    EmbeddedModel,
    Limits,
    Price,
    PriceError,
    Prices,
    RemoteModel,
    ScriptedModel,
    Trajectory,
    Usage,
)
from agentkit.events import MessageAdded, Outcome, TurnFinished, TurnStarted
from agentkit.messages import UserMessage
from agentkit.model import TokenSegment, total_usage
from agentkit.models.remote.provider import TokenCounts
from agentkit.prices import REFERENCE, describe_reference, dollars, list_cost, reference_price, requests_of
from agentkit.trajectory import Header
from agentkit_engine.sampling_params import SamplingParams
from agentkit_environments import Environment

MILLION = 1_000_000
NIGHT = datetime(2026, 11, 30, 20, 0, tzinfo=UTC)  # Monday, outside DeepSeek's peak hours
ROW = """\
prices:
- host: localhost:8000
  models: [llama-*]
  as_of: 2026-11
  source: our own server
  input: 1
  output: 2
"""


def cost_of(prices: Prices, model: str, tokens: TokenCounts, *, host: str, at: datetime = NIGHT) -> float | None:
    price = prices.find(model, host=host)
    return None if price is None else price.request_cost(tokens, at=at)


@pytest.fixture(autouse=True)
def no_table_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTKIT_PRICES", raising=False)


def test_every_packaged_price_is_dated_and_has_a_source() -> None:
    prices = Prices.load()
    assert len(prices.rows) > 30
    for row in prices.rows:
        assert row.as_of.startswith("2026-") and row.source.startswith("https://"), row
        for model in row.models:
            if not set(model) & set("*?["):
                assert prices.find(model, host=row.host) is row, f"{model} has two prices"
        for rates in (row, *row.tiers):
            assert 0 < rates.input < rates.output
            assert rates.cache_hit is not None and rates.cache_hit < rates.input
            assert rates.cache_write is None or rates.cache_write >= rates.input


def test_the_price_depends_on_host_and_model() -> None:
    tokens = TokenCounts(MILLION, output_tokens=MILLION)
    prices = Prices.load()
    assert cost_of(prices, "gpt-5", tokens, host="api.openai.com") == pytest.approx(11.25)
    assert cost_of(prices, "gpt-5-2025-08-07", tokens, host="api.openai.com") == pytest.approx(11.25)
    assert cost_of(prices, "GLM-5.3", tokens, host="api.z.ai") == pytest.approx(5.8)
    for model, host in [
        ("gpt-5", "localhost:8000"),
        ("gpt-5", "eu.api.openai.com"),
        ("gpt-5-pro", "api.openai.com"),
        ("gpt-5-2025", "api.openai.com"),
        ("deepseek-v2", "api.deepseek.com"),
        ("", ""),
    ]:
        assert prices.find(model, host=host) is None
        assert cost_of(prices, model, tokens, host=host) is None


@pytest.mark.parametrize(
    ("name", "priced"), [("deepseek:deepseek-chat", True), ("anthropic:claude-opus-5-5", True), ("openai:gpt-5", False)]
)
def test_a_company_has_its_prices_behind_a_gateway_too(name: str, priced: bool) -> None:
    """`openai:` at another URL is any server, so the name of its model says nothing of the price."""
    model = RemoteModel(name, base_url="http://gateway:8000/v1", api_key="none")
    assert (model.price is not None) is priced


def test_each_kind_of_token_has_its_price() -> None:
    """`input_tokens` includes the cached ones, and no token is charged twice."""
    cost = cost_of(
        Prices.load(),
        "claude-opus-5-5",
        TokenCounts(MILLION, cache_hit_tokens=600_000, cache_write_tokens=300_000, output_tokens=50_000),
        host="api.anthropic.com",
    )
    assert cost == pytest.approx(0.1 * 4 + 0.6 * 0.2 + 0.3 * 5 + 0.05 * 20)


@pytest.mark.parametrize(
    ("at", "peak"),
    [
        ("2026-11-30T00:59:59Z", False),
        ("2026-11-30T01:00:00Z", True),
        ("2026-11-30T03:59:59Z", True),
        ("2026-11-30T04:00:00Z", False),
        ("2026-11-30T06:00:00Z", True),
        ("2026-11-30T10:00:00Z", False),
        ("2026-11-29T02:00:00Z", False),  # a Sunday
        ("2026-11-30T09:30:00+08:00", True),
        ("2026-11-29T20:30:00-06:00", True),  # Monday 02:30 UTC
    ],
)
def test_peak_hours(at: str, peak: bool) -> None:
    tokens = TokenCounts(MILLION, cache_hit_tokens=500_000, output_tokens=MILLION)
    cost = cost_of(Prices.load(), "deepseek-flash", tokens, host="api.deepseek.com", at=datetime.fromisoformat(at))
    assert cost == pytest.approx((2 if peak else 1) * (0.5 * 0.15 + 0.5 * 0.003 + 0.6))


def test_a_long_prompt_prices_the_whole_request() -> None:
    prices = Prices.load()
    short = cost_of(prices, "gpt-6-sol", TokenCounts(272_000, output_tokens=1000), host="api.openai.com")
    long = cost_of(prices, "gpt-6-sol", TokenCounts(272_001, output_tokens=1000), host="api.openai.com")
    assert short == pytest.approx((272_000 * 2 + 1000 * 10) / MILLION)
    assert long == pytest.approx((272_001 * 4 + 1000 * 15) / MILLION)


def test_a_part_without_a_price_makes_the_cost_unknown(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(ROW)
    prices = Prices.load(tmp_path / "own.yaml")
    known = TokenCounts(10, output_tokens=5)
    assert cost_of(prices, "llama-3", known, host="localhost:8000") == pytest.approx(20 / MILLION)
    for counts in (TokenCounts(10, cache_hit_tokens=1), TokenCounts(10, cache_write_tokens=1)):
        assert cost_of(prices, "llama-3", counts, host="localhost:8000") is None


def test_a_table_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = ROW.replace("localhost:8000", "api.openai.com").replace("llama-*", "gpt-5*")
    (tmp_path / "own.yaml").write_text(free)
    monkeypatch.setenv("AGENTKIT_PRICES", str(tmp_path / "own.yaml"))
    tokens = TokenCounts(MILLION)
    assert cost_of(Prices.load(), "gpt-5", tokens, host="api.openai.com") == 1
    assert cost_of(Prices.load(), "gpt-4.1", tokens, host="api.openai.com") == 2
    monkeypatch.setenv("AGENTKIT_PRICES", "")
    assert cost_of(Prices.load(), "gpt-5", tokens, host="api.openai.com") == 1.25


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("input: 1", "input: -1"), "6: prices.0.input: input should be greater than or equal to 0"),
        (("input: 1", "input: '1'"), "6: prices.0.input: input should be a valid number, got str '1'"),
        (("input: 1", "input: .nan"), "6: not valid YAML: .nan is not a finite number"),
        (("input: 1", "inputs: 1"), '6: unknown key "prices.0.inputs"; did you mean "input"?'),
        (("output: 2", "input: 2"), '7: not valid YAML: duplicate key "input"'),
        (("  output: 2\n", ""), '2: missing key "prices.0.output"'),
        (("2026-11", "last week"), "4: prices.0.as_of: 'last week' is not a date; write YYYY-MM-DD or YYYY-MM"),
        (("2026-11", "2026-13-01"), "4: prices.0.as_of: '2026-13-01' is not a date"),
        (("[llama-*]", "[]"), "3: prices.0.models: list should have at least 1 item"),
        (("output: 2", "output: 2\n  tiers: [{input: 1, output: 2}]"), "a tier needs a condition"),
        (("output: 2", "output: 2\n  tiers: [{days: [monday], input: 1, output: 2}]"), "input should be 'mon', 'tue'"),
        (
            ("output: 2", 'output: 2\n  tiers: [{utc_hours: ["22:00-02:00"], input: 1, output: 2}]'),
            "'22:00-02:00' must be hours of one day such as \"01:00-04:00\"",
        ),
        (("output: 2", "output: 2\n  tiers: [{utc_hours: [1-4], input: 1, output: 2}]"), "'1-4' must be hours"),
        ((ROW, "- 1"), "1: expected keys and values (prices), got list [1]"),
        ((ROW, ""), "1: expected keys and values (prices), got nothing"),
    ],
)
def test_mistakes_in_a_table_are_shown_with_their_line(tmp_path: Path, change: tuple[str, str], problem: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(ROW.replace(*change))
    with pytest.raises(PriceError) as caught:
        Prices.load(file)
    assert f"{file}:" in str(caught.value) and problem in str(caught.value)


def test_a_missing_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_PRICES", str(tmp_path / "none.yaml"))
    with pytest.raises(PriceError, match=r"none\.yaml: cannot be read: No such file"):
        Prices.load()


rates = st.one_of(st.none(), st.floats(0, 1e3))
counts = st.builds(TokenCounts, *[st.integers(0, 10**9)] * 4)


@given(st.floats(0, 1e3), rates, rates, st.floats(0, 1e3), counts)
def test_a_cost_is_unknown_or_a_sum(
    plain: float, hit: float | None, write: float | None, out: float, tokens: TokenCounts
) -> None:
    """Also if an API reports more cached tokens than tokens."""
    row: dict[str, Any] = {"host": "*", "models": ["*"], "as_of": "2026-11", "source": "a test"}
    price = Price(**row, input=plain, cache_hit=hit, cache_write=write, output=out)
    cost = price.request_cost(tokens, at=NIGHT)
    if (hit is None and tokens.cache_hit_tokens) or (write is None and tokens.cache_write_tokens):
        assert cost is None
        return
    new = max(0, tokens.input_tokens - tokens.cache_hit_tokens - tokens.cache_write_tokens)
    expected = new * plain + tokens.cache_hit_tokens * (hit or 0) + tokens.cache_write_tokens * (write or 0)
    assert cost == pytest.approx((expected + tokens.output_tokens * out) / MILLION)


def test_the_sum_of_usages() -> None:
    paid, free, unknown = Usage(prompt_tokens=9, turns=1, cost_usd=0.5), Usage(), Usage(prompt_tokens=1)
    assert total_usage([]) == Usage()
    assert total_usage([paid, free, paid]) == Usage(prompt_tokens=18, turns=2, cost_usd=1.0)
    assert total_usage([paid, unknown]).cost_usd is None
    assert total_usage([unknown, unknown]) == Usage(prompt_tokens=2)
    assert total_usage([Usage(cost_usd=0.0)]).cost_usd == 0.0


@pytest.mark.parametrize(
    ("cost", "shown"),
    [
        (None, "unknown"),
        (0.0, "$0.00"),
        (1234.5, "$1,234.50"),
        (1.0, "$1.00"),
        (0.12345, "$0.1235"),
        (0.0012, "$0.0012"),
        (0.000123, "$0.00012"),
        (1e-7, "$0.00000010"),
    ],
)
def test_dollars(cost: float | None, shown: str) -> None:
    assert dollars(cost) == shown


def _record(*turns: tuple[int, int, int], runs: int = 1) -> Trajectory:
    """Return a record with turns of (prompt, sampled, cumulative cache hits) tokens in each of `runs` runs."""
    header = Header("m", "v4-0731", "high", SamplingParams(), (), "never", created="2026-11-30T20:00:00+00:00")
    trajectory = Trajectory(header)
    for _ in range(runs):
        trajectory.append(MessageAdded(UserMessage("Go on.")))
        usage = Usage()
        for number, (prompt, sampled, hits) in enumerate(turns):
            trajectory.append(TurnStarted(number, False))
            trajectory.append(TokenSegment("prompt", (1,) * prompt))
            trajectory.append(TokenSegment("sampled", (2,) * (sampled - 1), (0.0,) * (sampled - 1)))
            trajectory.append(TokenSegment("forced", (3,)))
            usage = Usage(prompt_tokens=usage.prompt_tokens + prompt, cache_hit_tokens=hits, turns=number + 1)
            trajectory.append(TurnFinished(number, usage))
        trajectory.append(Outcome("answered", "Done.", usage))
    return trajectory


def test_an_api_is_sent_the_whole_conversation_in_every_turn() -> None:
    """The engine found 60 of the first 100 tokens in its cache, and nothing later."""
    requests = [tokens for _, tokens in requests_of(_record((100, 10, 60), (20, 5, 60)))]
    assert requests == [
        TokenCounts(100, cache_hit_tokens=60, output_tokens=10),
        TokenCounts(130, cache_hit_tokens=110, output_tokens=5),
    ]
    again = [tokens for _, tokens in requests_of(_record((100, 10, 60), (20, 5, 60), runs=2))]
    assert again[2:] == [
        TokenCounts(235, cache_hit_tokens=195, output_tokens=10),
        TokenCounts(265, cache_hit_tokens=245, output_tokens=5),
    ]


def test_a_turn_that_was_cut_off_is_a_request_too() -> None:
    trajectory = _record((100, 10, 60))
    trajectory.append(TurnStarted(1, False))
    trajectory.append(TokenSegment("prompt", (1,) * 7))
    assert list(requests_of(trajectory))[1][1] == TokenCounts(117, cache_hit_tokens=110)
    trajectory.append(TurnStarted(2, False))
    assert len(list(requests_of(trajectory))) == 2


def test_the_list_cost_of_a_record() -> None:
    price = reference_price()
    assert (price.host, price.models[0]) == REFERENCE
    assert describe_reference(price) == f"deepseek-flash list prices ({price.as_of})"
    cost = list_cost(_record((100, 10, 60)), price)
    assert cost == pytest.approx((40 * 0.15 + 60 * 0.003 + 10 * 0.6) / MILLION)


def test_the_usage_of_all_runs_of_a_record() -> None:
    trajectory = _record((100, 10, 60), runs=2)
    assert (trajectory.usage.prompt_tokens, trajectory.usage.turns) == (200, 2)
    trajectory.append(TurnStarted(2, False))
    trajectory.append(TurnFinished(2, Usage(prompt_tokens=7, turns=1)))
    assert (trajectory.usage.prompt_tokens, trajectory.usage.turns) == (207, 3)


@pytest.mark.anyio
async def test_a_real_run_of_the_embedded_model(tiny: EmbeddedModel, environment: Environment) -> None:
    """Each id is sent or generated; the second turn sends everything before it again, as cache hits."""
    result = await Agent(tiny, sampling=SamplingParams(temperature=0)).run("Say hello.", environment=environment)
    assert result.usage.cost_usd is None
    requests = [tokens for _, tokens in requests_of(result.trajectory)]
    assert len(requests) == result.usage.turns
    last = requests[-1]
    assert last.input_tokens + last.output_tokens == len(result.trajectory.token_ids)
    new = sum(tokens.input_tokens - tokens.cache_hit_tokens for tokens in requests)
    assert new <= result.usage.prompt_tokens
    assert list_cost(result.trajectory, reference_price())


def test_a_limit_on_the_cost_needs_a_price(tiny: EmbeddedModel) -> None:
    scripted = ScriptedModel(lambda messages, think: AssistantTurn(None, "Done."))
    for model, options in (
        (tiny, {"limits": Limits(max_cost_usd=1.0)}),
        (scripted, {"limits": Limits(max_cost_usd=1.0)}),
        (tiny, {"budget": CostBudget(1.0)}),
    ):
        with pytest.raises(PriceError, match="nothing is charged for it; leave out the limit on cost"):
            Agent(model, **options)
