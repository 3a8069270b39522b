"""`SamplingParams`: validation at construction, and the round trip through JSON."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import agentkit
import agentkit_engine
from agentkit_engine import Engine, SamplingParams

JSON = TypeAdapter(SamplingParams)
EVERY_FIELD: dict[str, Any] = {
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 20,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "logit_bias": {5: -math.inf, 7: 1.5},
    "seed": 2**70,
    "max_tokens": 9,
    "stop_token_ids": frozenset({1, 2}),
    "stop": ("\n\n", "é"),
    "top_logprobs": 3,
    "grammar": False,
    "output_schema": {"enum": ["a", None]},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-1, -0.001, math.nan, math.inf)],
        *[("top_p", value) for value in (0, 2, -1, 1.0001, math.nan)],
        *[("top_k", value) for value in (0, -1)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
        *[("repetition_penalty", value) for value in (0, -1, math.inf)],
        *[(f"{kind}_penalty", value) for kind in ("presence", "frequency") for value in (math.nan, math.inf)],
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("max_tokens", 0),
        ("top_logprobs", -1),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
        ("grammar", "yes"),
        ("grammar", 1),
        ("grammar", None),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", [name for name in EVERY_FIELD if name not in ("grammar", "output_schema")])
@pytest.mark.parametrize("value", [True, "1", object(), [None], {"a": "b"}])
def test_a_value_of_the_wrong_type_is_refused(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["top_k", "seed", "max_tokens", "top_logprobs"])
def test_a_count_is_a_whole_number(field: str) -> None:
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: 2.0})  # type: ignore[arg-type]


def test_a_default_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="top_logprobs"):
        SamplingParams(top_logprobs=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="temperature"):
        SamplingParams(temperature=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output_schema"):
        SamplingParams(output_schema=["object"])  # type: ignore[arg-type]


def test_values_are_normalised_and_kept() -> None:
    bias = {np.int64(3): np.float32(0.5)}
    params = SamplingParams(temperature=0, seed=np.int64(3), logit_bias=bias, stop_token_ids=[1, 1], stop=["a"])  # type: ignore[arg-type]
    bias[np.int64(4)] = np.float32(1)
    assert params == SamplingParams(0.0, seed=3, logit_bias={3: 0.5}, stop_token_ids=frozenset({1}), stop=("a",))
    assert [type(value) for value in (params.temperature, params.seed)] == [float, int]


def test_every_field_round_trips_through_json() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} == set(EVERY_FIELD)
    params = SamplingParams(**EVERY_FIELD)
    assert JSON.validate_json(JSON.dump_json(params)) == params
    for mode in (True, False, "auto"):
        again = JSON.validate_json(JSON.dump_json(params.override(grammar=mode)))
        assert again.grammar is mode or again.grammar == mode == "auto"


@given(
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 1e300),
        top_p=st.floats(0, 1, exclude_min=True),
        logit_bias=st.dictionaries(st.integers(0, 2**40), st.floats(max_value=1e300, allow_nan=False)),
        seed=st.none() | st.integers(),
        stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)).map(tuple),
    )
)
def test_any_params_round_trip_through_json(params: SamplingParams) -> None:
    assert JSON.validate_json(JSON.dump_json(params)) == params


@pytest.mark.parametrize("text", ['{"temprature": 1}', '{"temperature": -1}', '{"top_k": 0}', '{"temperature": "NaN"}'])
def test_wrong_json_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        JSON.validate_json(text)


def test_override_changes_the_given_fields() -> None:
    params = SamplingParams(**EVERY_FIELD)
    assert params.override(temperature=None, top_k=None) == params
    assert params.override(temperature=0, grammar=True) == dataclasses.replace(params, temperature=0.0, grammar=True)
    with pytest.raises(TypeError, match="temprature"):
        params.override(temprature=1)
    with pytest.raises(ValueError, match="top_p"):
        params.override(top_p=2)


def test_there_is_one_class_and_it_needs_no_torch() -> None:
    assert agentkit.SamplingParams is agentkit_engine.SamplingParams is SamplingParams
    code = "import sys, agentkit; agentkit.SamplingParams(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("demand", [{"grammar": True}, {"output_schema": {}}])
def test_a_session_without_tools_cannot_be_asked_for_a_grammar(demand: dict[str, Any]) -> None:
    with Engine.load("tiny").session() as session:
        session.append([1])
        with pytest.raises(ValueError, match="pass a grammar to the session"):
            session.generate(SamplingParams(**demand))
