"""Provenance of tasks, licences of packages, and which licences an export accepts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agentkit_evals.provenance import Provenance, generator_name, is_accepted, licence_of
from agentkit_evals.suite import load_suite


@pytest.mark.parametrize(
    ("expression", "accepted"),
    [
        ("MIT", True),
        ("mit", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("Apache-2.0 AND GPL-3.0-only", False),
        ("(MIT AND BSD-3-Clause) OR GPL-2.0-only", True),
        ("MIT AND (BSD-3-Clause OR GPL-2.0-only)", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        (None, False),
        ("", False),
        ("MIT BSD-3-Clause", False),
        ("(MIT", False),
        ("MIT)", False),
        ("MIT OR", False),
        ("OR MIT", False),
        ("()", False),
        ("(" * 5000 + "MIT", False),
    ],
)
def test_which_expressions_are_accepted(expression: str | None, accepted: bool) -> None:
    assert is_accepted(expression) is accepted


def test_the_list_is_the_callers() -> None:
    assert is_accepted("GPL-3.0-only", ["GPL-3.0-only"]) and not is_accepted("MIT", ["GPL-3.0-only"])


@given(st.lists(st.sampled_from(["MIT", "GPL-3.0-only", "AND", "OR", "WITH", "(", ")"]), max_size=8))
def test_any_words_are_judged_without_an_error(words: list[str]) -> None:
    if is_accepted(" ".join(words)):
        assert "MIT" in words


EXPRESSIONS = st.recursive(
    st.sampled_from(["True", "False"]),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_expressions_follow_boolean_algebra(text: str) -> None:
    expression = text.replace("True", "MIT").replace("False", "GPL-3.0-only").replace("and", "AND").replace("or", "OR")
    assert is_accepted(expression) == eval(text)


@pytest.mark.parametrize(
    ("metadata", "text", "licence"),
    [
        ({"License-Expression": ["MIT OR Apache-2.0"], "License": ["BSD"]}, "", "MIT OR Apache-2.0"),
        ({"License": ["Apache License, Version 2.0"]}, "", "Apache-2.0"),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "Topic :: X"]}, "", "MIT"),
        ({"Classifier": ["License :: OSI Approved :: BSD License"]}, "Neither the\nname of", "BSD-3-Clause"),
        ({"Classifier": ["License :: OSI Approved :: BSD License"]}, "nothing known", None),
        (
            {
                "Classifier": [
                    "License :: OSI Approved :: MIT License",
                    "License :: OSI Approved :: Apache Software License",
                ]
            },
            "",
            "Apache-2.0 OR MIT",
        ),
        ({"Classifier": ["License :: OSI Approved :: GNU General Public License v3 (GPLv3)"]}, "", None),
        ({"License": ["see LICENSE"]}, "", None),
        ({"License": ["BSD 3-Clause OR Apache-2.0"]}, "", "BSD-3-Clause OR Apache-2.0"),
        ({"License": ["MIT or something else"]}, "", None),
        ({}, "", None),
    ],
)
def test_licences_of_packages(metadata: dict[str, list[str]], text: str, licence: str | None) -> None:
    assert licence_of(metadata, text) == licence


@pytest.mark.parametrize(
    "wrong", ["MIT", {"licence": "MIT"}, {"generator": "g", "sha256": "x"}, {"generator": "g", "x": 1}]
)
def test_a_malformed_provenance_is_refused(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        Provenance.model_validate(wrong)


def test_generated_tasks_have_one() -> None:
    for case in load_suite("synth", limit=60, seed=5).cases:
        origin = Provenance.model_validate(case.task.metadata["provenance"])
        assert (origin.generator, origin.seed) == (generator_name(f"synth.{case.family}"), 0)
        assert origin.licence == "Apache-2.0 AND MIT"
