"""Public constructors check their arguments at once, and the error names the remedy."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentkit import Agent, AssistantTurn, ConcurrencyLimits, EmbeddedModel, Limits, SamplingParams, ScriptedModel
from agentkit.errors import RunningLoopError
from agentkit_engine import Engine
from agentkit_environments import Environment
from agentkit_tools import ToolDefinitionError

from .conftest import get_weather

pytestmark = pytest.mark.anyio
Script = Callable[..., ScriptedModel]
DONE = AssistantTurn(None, "done")


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"model": 3}, TypeError, "must be a model, a checkpoint folder"),
        ({"model": None}, TypeError, "must be a model"),
        ({"model": EmbeddedModel}, TypeError, "must be a model"),
        ({"tools": get_weather}, TypeError, "tools=.* must be a list"),
        ({"tools": "bash"}, TypeError, "tools=.* must be a list"),
        ({"tools": {"bash": get_weather}}, TypeError, "tools=.* must be a list"),
        ({"tools": [3]}, (TypeError, ToolDefinitionError), "given 3, expected"),
        ({"system": 3}, TypeError, "system=.* must be a text or None, got 3"),
        ({"thinking": "sometimes"}, ValueError, "always, never, auto or a function"),
        ({"thinking": True}, ValueError, "always, never, auto or a function"),
        ({"thinking": ["auto"]}, ValueError, "always, never, auto or a function"),
        ({"thinking": "sometimes", "effort": "none"}, ValueError, "always, never, auto or a function"),
        ({"effort": "ultra"}, ValueError, "effort must be one of none, low, high, max, got 'ultra'"),
        ({"effort": None}, ValueError, "effort must be one of"),
        ({"effort": ["high"]}, ValueError, "effort must be one of"),
        ({"sampling": {"temperature": 0}}, TypeError, "sampling=.* must be a SamplingParams or None"),
        ({"sampling": SamplingParams}, TypeError, r"pass an instance: SamplingParams\(\)"),
        ({"sampling": 0.5}, TypeError, "sampling=.* must be a SamplingParams"),
        ({"output_schema": ["object"]}, ValueError, "expected a JSON schema"),
        ({"sampling": SamplingParams(output_schema={"type": "strin"})}, ValueError, "is not valid"),
        ({"limits": 5}, TypeError, "limits=.* must be a Limits or None, got 5"),
        ({"limits": Limits}, TypeError, r"pass an instance: Limits\(\)"),
        ({"compaction": 3000}, TypeError, "compaction=.* must be a Compaction or None, got 3000"),
        ({"concurrency": 5}, TypeError, "concurrency=.* must be a ConcurrencyLimits or None"),
    ],
)
def test_agent(script: Script, options: dict[str, Any], error: Any, expected: str) -> None:
    with pytest.raises(error, match=expected):
        Agent(**{"model": script(DONE), **options})


def test_an_engine_must_be_wrapped_in_a_model() -> None:
    with pytest.raises(TypeError, match=r"EmbeddedModel\(engine\)"):
        Agent(Engine.load("tiny"))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", Limits.__slots__)
def test_limits(field: str) -> None:
    fractions = field.endswith(("_s", "_usd"))
    for value in (0, -1, *((math.nan, math.inf, -0.5) if fractions else ())):
        with pytest.raises(ValueError, match=rf"Limits\.{field} must be positive"):
            Limits(**{field: value})
    for wrong in ("1", True, [1], *(() if fractions else (1.5,))):
        with pytest.raises(TypeError, match=rf"Limits\.{field} must be a .*number"):
            Limits(**{field: wrong})
    if field in ("call_timeout_s", "max_calls_per_turn", "max_depth"):
        with pytest.raises(TypeError, match="got None"):
            Limits(**{field: None})  # type: ignore[arg-type]
    else:
        assert getattr(Limits(**{field: None}), field) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", ["per_turn", "per_tool", "total"])
def test_concurrency_limits(bound: str) -> None:
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"ConcurrencyLimits\({bound}=...\) must be positive, got"):
            ConcurrencyLimits(**{bound: value})
    for wrong in (1.5, "1", True, None):
        with pytest.raises(TypeError, match=rf"ConcurrencyLimits\({bound}=...\) must be a whole number"):
            ConcurrencyLimits(**{bound: wrong})  # type: ignore[arg-type]


def test_models(script: Script) -> None:
    with pytest.raises(TypeError, match=r"EmbeddedModel\(engine\) must be .tiny., a checkpoint folder"):
        EmbeddedModel(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a folder or None, got 3"):
        EmbeddedModel("tiny", cache_dir=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pass cache_dir and device to Engine\.load"):
        EmbeddedModel(Engine.load("tiny"), device="cpu")
    with pytest.raises(TypeError, match=r"a function of \(messages, think\), got 'hello'"):
        ScriptedModel("hello")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a Tokenizer or None, got 'tiny'"):
        ScriptedModel(lambda messages, think: DONE, "tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dialect must be one of v4-preview, v4-0731, got 'v5'"):
        ScriptedModel(lambda messages, think: DONE, dialect="v5")  # type: ignore[arg-type]


def test_a_device_reaches_the_engine() -> None:
    assert EmbeddedModel("tiny", device="cpu").engine.decoder.embed.weight.device.type == "cpu"


async def test_a_plain_function_is_a_tool(script: Script, environment: Environment) -> None:
    def add(x: int, y: int = 2) -> int:
        """Add."""
        return x + y

    agent = Agent(script(AssistantTurn(None, "", [("add", {"x": 3})]), DONE), [add, get_weather])
    assert list(agent.tools) == ["add", "get_weather"]
    result = await agent.run("Q", environment=environment)
    assert result.trajectory.results[0].content == "5"


async def test_the_default_tokenizer_of_a_script_is_the_packaged_one(environment: Environment) -> None:
    model = ScriptedModel(lambda messages, think: AssistantTurn("Hm.", "héllo"))
    assert model.tokenizer is ScriptedModel(lambda messages, think: DONE).tokenizer
    result = await Agent(model).run("Q", environment=environment)
    assert result.answer == "héllo"
    assert "héllo" in model.tokenizer.decode(result.trajectory.token_ids)


def test_a_script_needs_no_torch() -> None:
    code = """
import sys
from agentkit import Agent, AssistantTurn, ScriptedModel
Agent(ScriptedModel(lambda messages, think: AssistantTurn(None, "hi")), [])
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_a_blocking_call_in_a_running_loop_names_the_code_to_await(
    script: Script, environment: Environment
) -> None:
    """A notebook is such a case. No coroutine is left un-awaited."""
    agent = Agent(script(DONE))
    with pytest.raises(RunningLoopError, match=r"`await agent.run\(...\)`"):
        agent.run_sync("Q")
    result = await agent.run("Q", environment=environment)
    with pytest.raises(RuntimeError, match=r"`await result.continue_\(...\)`"):
        result.continue_sync("Q")
    assert (await result.continue_("Q")).answer == "done"


async def test_max_tokens_of_the_sampling_bounds_a_turn(script: Script, environment: Environment) -> None:
    sampling = SamplingParams(max_tokens=5)
    for limits in (None, Limits(max_tokens_per_turn=9), Limits(max_tokens_per_turn=None)):
        agent = Agent(script(AssistantTurn(None, "a long answer")), sampling=sampling, limits=limits)
        result = await agent.run("Q", environment=environment)
        assert (result.limit, result.usage.sampled_tokens) == ("max_tokens_per_turn", 5)


def test_a_path_can_be_a_string(tmp_path: Path) -> None:
    model = EmbeddedModel("tiny", cache_dir=str(tmp_path))
    assert model.engine.cache_dir is not None
