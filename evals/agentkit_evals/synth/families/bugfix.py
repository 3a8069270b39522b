"""Fix a one-token bug in a small Python module: run the tests, read, edit, run the tests again, submit.

Each template is a function with a correct docstring and a body with one hole (`@`); the bug is a wrong token in the
hole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentkit_evals.synth.family import (
    Act,
    Draft,
    Draw,
    Family,
    Phrasing,
    marked,
    phrasings,
    plain,
    replace_in_file,
    submit,
)

PAIRS = (("a", "b"), ("x", "y"), ("left", "right"), ("p", "q"))
NUMBERS = (("n",), ("x",), ("number",), ("k",))
LISTS = (("items",), ("values",), ("nums",))
TEXTS = (("text",), ("word",), ("line",))
SEARCHES = (("text", "part"), ("word", "end"))


def _pair(draw: Draw) -> tuple[Any, ...]:
    return draw.between(2, 30), draw.between(2, 9)


def _near(draw: Draw) -> tuple[Any, ...]:
    low = draw.between(-4, 9)
    return low, low + draw.between(-2, 2)


def _number(draw: Draw) -> tuple[Any, ...]:
    return (draw.between(2, 30),)


def _list(draw: Draw) -> tuple[Any, ...]:
    return ([draw.between(1, 9) for _ in range(draw.between(2, 4))],)


def _text(draw: Draw) -> tuple[Any, ...]:
    return (plain(draw.name()).capitalize(),)


def _search(draw: Draw) -> tuple[Any, ...]:
    text = plain(draw.name(3))
    return text, draw.choice((text[:2], text[-2:], text[:3], text[-3:]))


@dataclass(frozen=True, slots=True)
class Template:
    """`doc` and `body` use parameters `{0}`, `{1}` and a constant `{k}`; `right` or `wrong` fills the hole `@`."""

    doc: str
    body: str
    right: str
    wrong: tuple[str, ...]
    arguments: Callable[[Draw], tuple[Any, ...]]
    parameters: tuple[tuple[str, ...], ...]


LIBRARY = (
    Template("Return the sum of {0} and {1}.", "return {0} @ {1}", "+", ("-", "*"), _pair, PAIRS),
    Template("Return {0} minus {1}.", "return {0} @ {1}", "-", ("+", "*"), _pair, PAIRS),
    Template("Return {0} times {1}.", "return {0} @ {1}", "*", ("+", "-"), _pair, PAIRS),
    Template("Return how often {1} fits into {0}.", "return {0} @ {1}", "//", ("%", "*"), _pair, PAIRS),
    Template("Return the rest of {0} divided by {1}.", "return {0} @ {1}", "%", ("//", "*"), _pair, PAIRS),
    Template("Return the larger of {0} and {1}.", "return @({0}, {1})", "max", ("min",), _pair, PAIRS),
    Template("Return the smaller of {0} and {1}.", "return @({0}, {1})", "min", ("max",), _pair, PAIRS),
    Template("Return True if {0} is greater than {1}.", "return {0} @ {1}", ">", ("<", "=="), _near, PAIRS),
    Template("Return True if {0} is less than {1}.", "return {0} @ {1}", "<", (">", "=="), _near, PAIRS),
    Template("Return True if {0} equals {1}.", "return {0} @ {1}", "==", ("!=", ">"), _near, PAIRS),
    Template("Return True if {0} differs from {1}.", "return {0} @ {1}", "!=", ("==", "<"), _near, PAIRS),
    Template("Return True if both {0} and {1} are positive.", "return {0} > 0 @ {1} > 0", "and", ("or",), _near, PAIRS),
    Template("Return True if {0} or {1} is positive.", "return {0} > 0 @ {1} > 0", "or", ("and",), _near, PAIRS),
    Template("Return {0}, the first of {0} and {1}.", "return @", "{0}", ("{1}",), _pair, PAIRS),
    Template("Return {1}, the second of {0} and {1}.", "return @", "{1}", ("{0}",), _pair, PAIRS),
    Template("Return {0} plus {k}.", "return {0} + @", "{k}", ("{j}",), _number, NUMBERS),
    Template("Return {0} minus {k}.", "return {0} - @", "{k}", ("{j}",), _number, NUMBERS),
    Template("Return {0} times {k}.", "return {0} * @", "{k}", ("{j}",), _number, NUMBERS),
    Template("Return {0} plus {k}.", "return {0} @ {k}", "+", ("-", "*"), _number, NUMBERS),
    Template("Return {0} times {k}.", "return {0} @ {k}", "*", ("+", "-"), _number, NUMBERS),
    Template("Return True if {0} is even.", "return {0} % 2 == @", "0", ("1",), _number, NUMBERS),
    Template("Return True if {0} is odd.", "return {0} % 2 == @", "1", ("0",), _number, NUMBERS),
    Template("Return the square of {0}.", "return {0} ** @", "2", ("3",), _number, NUMBERS),
    Template("Return the cube of {0}.", "return {0} ** @", "3", ("2",), _number, NUMBERS),
    Template("Return the first of {0}.", "return {0}[@]", "0", ("1", "-1"), _list, LISTS),
    Template("Return the last of {0}.", "return {0}[@]", "-1", ("0", "1"), _list, LISTS),
    Template("Return the sum of {0}.", "return @({0})", "sum", ("max", "len"), _list, LISTS),
    Template("Return the largest of {0}.", "return @({0})", "max", ("min", "sum"), _list, LISTS),
    Template("Return the smallest of {0}.", "return @({0})", "min", ("max", "len"), _list, LISTS),
    Template("Return how many {0} there are.", "return @({0})", "len", ("sum", "max"), _list, LISTS),
    Template(
        "Return the sum of {0}.",
        "total = 0\nfor item in {0}:\n    total @ item\nreturn total",
        *("+=", ("-=", "*="), _list, LISTS),
    ),
    Template(
        "Return the product of {0}.",
        "total = 1\nfor item in {0}:\n    total @ item\nreturn total",
        *("*=", ("+=", "-="), _list, LISTS),
    ),
    Template("Return {0} in upper case.", "return {0}.@()", "upper", ("lower",), _text, TEXTS),
    Template("Return {0} in lower case.", "return {0}.@()", "lower", ("upper",), _text, TEXTS),
    Template(
        "Return True if {0} starts with {1}.", "return {0}.@({1})", "startswith", ("endswith",), _search, SEARCHES
    ),
    Template("Return True if {0} ends with {1}.", "return {0}.@({1})", "endswith", ("startswith",), _search, SEARCHES),
)

TEST = """\
import sys

sys.dont_write_bytecode = True
from {module} import {names}

CASES = [{cases}]
for function, given, expected in CASES:
    got = function(*given)
    if got != expected:
        given = ", ".join(map(repr, given))
        sys.exit(f"FAIL {{function.__name__}}({{given}}) is {{got!r}}, not {{expected!r}}")
print("OK")
"""

PROBE = """\
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, ".")
from {module} import {names}

for function, given in [{cases}]:
    print(repr(function(*given)))
"""


@dataclass(frozen=True, slots=True)
class Function:
    """A function drawn from a template: its right and wrong bodies, and calls with their correct results."""

    name: str
    right: str  # source of the whole function
    wrong: str
    right_line: str  # the line with the hole
    wrong_line: str
    shown: list[tuple[tuple[Any, ...], Any]]  # test cases in the workdir: (arguments, value)
    hidden: list[tuple[tuple[Any, ...], Any]]  # test cases of the verifier


class Bugfix(Family):
    name = "bugfix"
    phrasings = phrasings(
        train=(
            "The tests in `{test}` fail. Fix the bug in `{module}` and submit done.",
            "`{module}` has a bug. Fix it so that `{test}` passes, then submit done.",
            "Fix `{module}`. Its tests are in `{test}`. Submit done when they pass.",
            "Run `{test}`, fix the bug in `{module}`, and submit done.",
            "There is a bug in `{module}`. `{test}` shows it. Fix it and submit done.",
            "Please fix the bug in `{module}`. Use `{test}` to test it. Submit done at the end.",
            "Make the tests in `{test}` pass: one line of `{module}` is wrong. Then submit done.",
            "One line in `{module}` is wrong. Run `{test}`, fix the line, and submit done.",
            "`{test}` fails because of a bug in `{module}`. Fix the bug, then submit done.",
            "Find the bug in `{module}` with `{test}`, fix it, and submit done.",
            "The module `{module}` does not pass `{test}`. Fix it and submit done.",
            "Some function in `{module}` is wrong. Fix it so that `{test}` passes and submit done.",
        ),
        held_out=(
            "Please make `{test}` pass. The bug is in `{module}`. Submit done when it is fixed.",
            "`{module}` is wrong in one line. Find the bug with `{test}`, fix it, and submit done.",
            "Fix the bug in `{module}` so that the tests in `{test}` pass. Then submit done.",
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        module = draw.name()
        path, test = f"{module}.py", f"test_{module}.py"
        broken = _function(draw)
        functions = [broken]
        if draw.chance(0.35):
            while broken.wrong_line in (other := _function(draw)).right:
                pass
            functions.insert(draw.between(0, 1), other)
        source = "\n\n".join(function.wrong if function is broken else function.right for function in functions)
        assert source.count(broken.wrong_line) == 1, source
        names = ", ".join(function.name for function in functions)
        cases = ", ".join(
            f"({f.name}, {marked(repr(given))}, {marked(repr(value))})" for f in functions for given, value in f.shown
        )
        probes = ", ".join(f"({f.name}, {given!r})" for f in functions for given, _ in f.hidden)
        run = ("bash", {"command": f"python3 {test}"})
        edit = {"path": path, "old": broken.wrong_line, "new": broken.right_line}
        return Draft(
            instruction=draw.phrase(phrasing.text, module=path, test=test),
            steps=[
                lambda results: Act(f"I run `{test}` to see what fails.", [run]),
                lambda results: Act(f"A test fails. I read `{path}`.", [("read_file", {"path": path})]),
                lambda results: Act(f"`{broken.wrong_line}` is wrong.", [("edit_file", edit)]),
                lambda results: Act("I run the tests again.", [run]),
                lambda results: submit("The tests pass."),
            ],
            files={path: source, test: TEST.format(module=module, names=names, cases=cases)},
            verifier='python3 "$AGENTKIT_VERIFIER_DIR/probe.py" | '
            'diff -u --label expected --label given "$AGENTKIT_VERIFIER_DIR/expected" -',
            verifier_files={
                "probe.py": PROBE.format(module=module, names=names, cases=probes),
                "expected": "".join(f"{value!r}\n" for function in functions for _, value in function.hidden),
            },
            solution=f"{replace_in_file(path, broken.wrong_line, broken.right_line)} && echo done",
        )


def _function(draw: Draw) -> Function:
    template = draw.choice(LIBRARY)
    wrong = draw.choice(template.wrong)
    plain_names = draw.choice(template.parameters)
    names = tuple(marked(name) for name in plain_names)
    name = draw.name()
    k = draw.between(2, 9)
    constants = {"k": str(k), "j": str(k + draw.choice((-1, 1, 2)))}

    def write(token: str) -> tuple[str, str]:
        doc = template.doc.format(*names, **constants)
        body = template.body.replace("@", token).format(*names, **constants)
        lines = [f"    {line}\n" for line in body.split("\n")]
        hole = next(i for i, line in enumerate(template.body.split("\n")) if "@" in line)
        return f'def {name}({", ".join(names)}):\n    """{doc}"""\n{"".join(lines)}', lines[hole].strip()

    right_source, right_line = write(template.right)
    wrong_source, wrong_line = write(wrong)
    good = _callable(template.body.replace("@", template.right), plain_names, **constants)
    bad = _callable(template.body.replace("@", wrong), plain_names, **constants)
    cases: list[tuple[tuple[Any, ...], Any]] = []
    while len(cases) < 3 or all(bad(*given) == value for given, value in cases[:2]):
        given = template.arguments(draw)
        cases.insert(0, (given, good(*given)))
    hidden = [(given, good(*given)) for given in (template.arguments(draw) for _ in range(5))] + cases[:2]
    return Function(name, right_source, wrong_source, right_line, wrong_line, cases[:3], hidden)


@functools.lru_cache(maxsize=4096)
def _callable(body: str, names: tuple[str, ...], *, k: str, j: str) -> Callable[..., Any]:
    """Compile a template's body, once for each set of names and constants."""
    namespace: dict[str, Any] = {}
    lines = "".join(f"    {line}\n" for line in body.format(*names, k=k, j=j).split("\n"))
    exec(f"def function({', '.join(names)}):\n{lines}", namespace)  # trusted source: LIBRARY only
    function: Callable[..., Any] = namespace["function"]
    return function
