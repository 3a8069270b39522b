"""Faults: each kind changes what it says, and nothing but code in functions."""

from __future__ import annotations

import ast
import random
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit_evals.synth.bugs.hunks import reversed_hunks
from agentkit_evals.synth.bugs.mutate import KINDS, drawn, mutations


def faults(body: str, kind: str) -> list[str]:
    """Return the changed bodies of a function, for the faults of one kind."""
    source = "def f(a, b, items):\n" + textwrap.indent(body, "    ")
    return [textwrap.dedent(each.text.partition("\n")[2]).rstrip() for each in mutations(source) if each.kind == kind]


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        ("comparison", "return a == b", ["return a != b"]),
        ("comparison", "return a not  in items", ["return a in items"]),
        ("comparison", "return a is None", ["return a is not None"]),
        ("boundary", "return (a) <= b", ["return (a) < b"]),
        ("boundary", "return a > 'é'", ["return a >= 'é'"]),
        ("operator", "return (a + b) // 2", ["return (a + b) / 2", "return (a - b) // 2"]),
        ("operator", "a += b", ["a -= b"]),
        ("operator", "return '%s' % a", []),
        ("boolean", "return a and b and items", ["return a or b and items", "return a and b or items"]),
        ("condition", "while a:\n    pass", ["while not (a):\n    pass"]),
        ("condition", "return not a", ["return a"]),
        ("constant", "a = 1", ["a = 0", "a = 2"]),
        ("constant", "a = True", ["a = False"]),
        ("off-by-one", "return items[1:]", ["return items[0:]", "return items[2:]"]),
        ("off-by-one", "return items[:-1]", ["return items[:-2]"]),
        ("off-by-one", "return range(a)", ["return range(a + 1)", "return range(a - 1)"]),
        ("swapped-arguments", "return max(a,  b)", ["return max(b,  a)"]),
        ("swapped-arguments", "return max(*a, b)", []),
        ("removed-branch", "if a:\n    b = 1", ["pass"]),
        ("removed-branch", "if a:\n    b = 1\nelse:\n    b = 2", ["if a:\n    b = 1"]),
        ("removed-return", "return a", ["pass"]),
        ("removed-return", "return None", []),
        ("removed-call", "items.append(a)", ["pass"]),
        ("removed-assignment", "items[a] = b", ["pass"]),
        ("wrong-exception", "raise KeyError(a)", ["raise IndexError(a)"]),
        ("wrong-exception", "try:\n    a\nexcept ValueError:\n    b", ["try:\n    a\nexcept TypeError:\n    b"]),
        ("wrong-name", "return a", ["return b", "return items"]),
        ("loop-control", "for a in items:\n    break", ["for a in items:\n    continue"]),
    ],
)  # fmt: skip
def test_each_kind(kind: str, body: str, expected: list[str]) -> None:
    assert sorted(faults(body, kind)) == sorted(expected)


def test_defaults() -> None:
    source = "def f(a=1, b=True, *, c='xy'): pass\n"
    assert [each.text for each in mutations(source) if each.kind == "wrong-default"] == [
        "def f(a=2, b=True, *, c='xy'): pass\n",
        "def f(a=1, b=False, *, c='xy'): pass\n",
        "def f(a=1, b=True, *, c='x'): pass\n",
    ]


def test_an_elif_branch_is_removed_with_its_line() -> None:
    source = "def f(a):\n    if a:\n        a = 1\n    elif not a:\n        a = 2\n"
    removed = [each.text for each in mutations(source) if each.kind == "removed-branch"]
    assert "def f(a):\n    if a:\n        a = 1\n" in removed


MODULE = '''\
import os

LIMIT = 5 + 5


class Store:
    """Keeps 3 items."""

    size: int = 4

    @property
    def full(self) -> Literal[7]:
        """Return whether 8 items are there."""
        text = f"{self.size + 1} of {self.size > 2}"
        return self.size >= 9 and bool(text)


def move(first: int, second: int = 6) -> int:
    if first == second:
        return first
    elif first > second and os.sep:
        return first - second
    return second
'''


def test_only_code_in_functions_changes() -> None:
    made = list(mutations(MODULE))
    assert {each.function for each in made} == {"Store.full", "move"}
    for each in made:
        assert each.kind in KINDS
        tree = ast.parse(each.text)
        assert "LIMIT = 5 + 5" in each.text and "size: int = 4" in each.text and "Literal[7]" in each.text
        assert ast.get_docstring(tree.body[2]) == "Keeps 3 items."  # type: ignore[arg-type]
        assert 'f"{self.size + 1} of {self.size > 2}"' in each.text or each.kind.startswith("removed")
        changed = [
            number
            for number, (old, new) in enumerate(zip(MODULE.split("\n"), each.text.split("\n"), strict=False))
            if old != new
        ]
        assert changed[0] == each.line - 1 or each.kind == "removed-branch"
        assert each.docstring == ("Return whether 8 items are there." if each.function == "Store.full" else None)


def test_the_draw_depends_on_the_seed_alone_and_varies_first() -> None:
    first, again, other = (
        [(each.line, each.kind, each.text) for each in drawn(MODULE, random.Random(seed))] for seed in (1, 1, 2)
    )
    assert first == again and first != other and sorted(first) == sorted(other)
    made = list(drawn(MODULE, random.Random(1)))
    pairs = [(each.function, each.kind) for each in made]
    assert len(set(pairs[: len(set(pairs))])) == len(set(pairs))


SIGNS = ("+", "-", "*", "<", ">=", "==", "and", "or", "in")


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.sampled_from(["a", "b", "1", "0", "'é'", "items[1:]", "f(a, b)", "(not a)", "f'{a + 1}'"]),
        lambda inner: st.builds(
            "({} {} {})".format, inner, st.sampled_from("+ - * // < >= == and or in".split()), inner
        ),
        max_leaves=6,
    )
)
def test_every_fault_of_an_expression_is_another_program(expression: str) -> None:
    source = f"def g(a, b, items, f):\n    x = {expression}  # ü\n    return x\n"
    for each in mutations(source):
        assert ast.dump(ast.parse(each.text)) != ast.dump(ast.parse(source))


def test_a_syntax_error_is_raised() -> None:
    with pytest.raises(SyntaxError):
        list(mutations("def f(:\n"))


G = "def g(a):\n    return a\n"
OLD = f'def f(a):\n    """Old."""\n    return a\n\n\n{G}'
NEW = f'# new\ndef f(a):\n    """New."""\n    return a or 1\n\n\n{G}\n\ndef h():\n    return 1\n'


def test_hunks_are_taken_back_one_at_a_time_and_comments_do_not_count() -> None:
    made = list(reversed_hunks(OLD, NEW))
    assert (made[0].kind, made[0].function) == ("reversed-hunk", "f")
    assert "return a\n\n\ndef g" in made[0].text and "def h" in made[0].text
    assert "return a or 1" in made[1].text and "def h" not in made[1].text
    assert len(made) == 2
    assert list(reversed_hunks("def f(:\n", "def f():\n    return 1\n")) == []
