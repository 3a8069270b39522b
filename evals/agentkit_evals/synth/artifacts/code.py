"""Python modules with a test file, and scripts that print something."""

from __future__ import annotations

import keyword
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.world import Artifact


@dataclass(frozen=True, slots=True)
class Shape:
    """One line of a function: `doc` and `body` with parameters `{0}` and `{1}`; `right` or `wrong` fills `@`."""

    doc: str
    body: str
    right: str
    wrong: tuple[str, ...]
    arguments: Callable[[Draw], tuple[Any, ...]]


def _pair(draw: Draw) -> tuple[Any, ...]:
    return draw.between(2, 40), draw.between(2, 12)


def _near(draw: Draw) -> tuple[Any, ...]:
    low = draw.between(-5, 12)
    return low, low + draw.between(-2, 2)


def _number(draw: Draw) -> tuple[Any, ...]:
    return (draw.between(2, 40),)


def _numbers(draw: Draw) -> tuple[Any, ...]:
    return ([draw.between(1, 20) for _ in range(draw.between(2, 5))],)


def _text(draw: Draw) -> tuple[Any, ...]:
    return (draw.word().capitalize() + draw.choice(("", " " + draw.word())),)


def _texts(draw: Draw) -> tuple[Any, ...]:
    return ([draw.word() for _ in range(draw.between(2, 4))],)


def _ends(draw: Draw) -> tuple[Any, ...]:
    text = draw.word()
    return text, draw.choice((text[:2], text[-2:], text[:3], text[-3:]))


SHAPES: tuple[Shape, ...] = (
    Shape("Return the sum of {0} and {1}.", "return {0} @ {1}", "+", ("-", "*"), _pair),
    Shape("Return {0} minus {1}.", "return {0} @ {1}", "-", ("+", "*"), _pair),
    Shape("Return {0} times {1}.", "return {0} @ {1}", "*", ("+", "-"), _pair),
    Shape("Return how often {1} fits into {0}.", "return {0} @ {1}", "//", ("%", "*"), _pair),
    Shape("Return the rest of {0} divided by {1}.", "return {0} @ {1}", "%", ("//", "*"), _pair),
    Shape("Return the larger of {0} and {1}.", "return @({0}, {1})", "max", ("min",), _pair),
    Shape("Return the smaller of {0} and {1}.", "return @({0}, {1})", "min", ("max",), _pair),
    Shape("Return True if {0} is greater than {1}.", "return {0} @ {1}", ">", ("<", "==", ">="), _near),
    Shape("Return True if {0} is at least {1}.", "return {0} @ {1}", ">=", (">", "<="), _near),
    Shape("Return True if {0} is less than {1}.", "return {0} @ {1}", "<", (">", "==", "<="), _near),
    Shape("Return True if {0} equals {1}.", "return {0} @ {1}", "==", ("!=", ">"), _near),
    Shape("Return True if {0} differs from {1}.", "return {0} @ {1}", "!=", ("==", "<"), _near),
    Shape("Return True if {0} is even.", "return {0} % 2 == @", "0", ("1",), _number),
    Shape("Return True if {0} is odd.", "return {0} % 2 == @", "1", ("0",), _number),
    Shape("Return the square of {0}.", "return {0} ** @", "2", ("3",), _number),
    Shape("Return the double of {0}.", "return {0} * @", "2", ("3", "1"), _number),
    Shape("Return {0} plus one.", "return {0} + @", "1", ("2", "0"), _number),
    Shape("Return the first of {0}.", "return {0}[@]", "0", ("1", "-1"), _numbers),
    Shape("Return the last of {0}.", "return {0}[@]", "-1", ("0", "1"), _numbers),
    Shape("Return the sum of {0}.", "return @({0})", "sum", ("max", "len"), _numbers),
    Shape("Return the largest of {0}.", "return @({0})", "max", ("min", "sum"), _numbers),
    Shape("Return the smallest of {0}.", "return @({0})", "min", ("max", "len"), _numbers),
    Shape("Return how many {0} there are.", "return @({0})", "len", ("sum", "max"), _numbers),
    Shape("Return the average of {0}.", "return sum({0}) @ len({0})", "/", ("*", "//"), _numbers),
    Shape("Return {0} without the first.", "return {0}[@]", "1:", (":1", ":-1"), _numbers),
    Shape("Return {0} in upper case.", "return {0}.@()", "upper", ("lower", "title"), _text),
    Shape("Return {0} in lower case.", "return {0}.@()", "lower", ("upper", "title"), _text),
    Shape("Return {0} backwards.", "return {0}[::@]", "-1", ("1", "2"), _text),
    Shape("Return {0} joined with commas.", "return @.join({0})", '","', ('" "', '";"'), _texts),
    Shape("Return True if {0} starts with {1}.", "return {0}.@({1})", "startswith", ("endswith",), _ends),
    Shape("Return True if {0} ends with {1}.", "return {0}.@({1})", "endswith", ("startswith",), _ends),
    Shape("Return True if {1} is in {0}.", "return {1} @ {0}", "in", ("not in",), _ends),
)

BUILTINS = ("sum", "max", "min", "len")
"""Functions that the shapes call; no parameter has such a name."""


@dataclass(frozen=True, slots=True)
class CodeFunction:
    """A correct function, a wrong version of its line, and calls with their results."""

    name: str
    source: str
    line: str
    wrong: str
    cases: tuple[tuple[tuple[Any, ...], Any], ...]


@dataclass(frozen=True, slots=True)
class Module(Artifact):
    """A module of correct functions. Its tests are not in the world; the task that breaks a function adds both."""

    name: str
    functions: tuple[CodeFunction, ...]


def draw_module(draw: Draw) -> Module:
    """Draw one to three functions."""
    functions: dict[str, CodeFunction] = {}
    for _ in range(draw.weighted({1: 3, 2: 2, 3: 1})):
        one = _function(draw)
        if all(one.line not in other.source and other.line not in one.source for other in functions.values()):
            functions.setdefault(one.name, one)
    name = draw.identifier("snake", parts=draw.choice((1, 1, 2)))
    if name in sys.stdlib_module_names:  # `import time` never finds a file
        name = f"{name}_functions"
    folder = draw.choice(("", "", "", "src/", "lib/", "app/"))
    text = "\n\n".join(function.source for function in functions.values())
    return Module(f"{folder}{name}.py", text, name, tuple(functions.values()))


def _function(draw: Draw) -> CodeFunction:
    shape = draw.choice(SHAPES)
    count = 2 if "{1}" in shape.body else 1
    names: list[str] = []
    while len(names) < count:
        drawn = draw.noun() if draw.chance(0.6) else draw.choice("abxynkst")
        if drawn not in (*names, *BUILTINS) and not keyword.iskeyword(drawn):
            names.append(drawn)
    name = draw.identifier("snake", parts=draw.choice((1, 2, 2)))
    if name in (*names, *BUILTINS):
        name = f"{name}_value"
    wrong = draw.choice(shape.wrong)
    lines = {token: shape.body.replace("@", token, 1).format(*names) for token in (shape.right, wrong)}
    namespace: dict[str, Any] = {}
    for label, token in (("right", shape.right), ("wrong", wrong)):
        exec(f"def {label}({', '.join(names)}):\n    {lines[token]}\n", namespace)  # trusted: SHAPES and words only
    cases: list[tuple[tuple[Any, ...], Any]] = []
    while len(cases) < 6 or all(_differs(namespace, given, value) is False for given, value in cases[:2]):
        given = shape.arguments(draw)
        cases.insert(0, (given, namespace["right"](*given)))
    source = f'def {name}({", ".join(names)}):\n    """{shape.doc.format(*names)}"""\n    {lines[shape.right]}\n'
    return CodeFunction(name, source, lines[shape.right], lines[wrong], tuple(cases[:6]))


def _differs(namespace: dict[str, Any], given: tuple[Any, ...], value: Any) -> bool:
    try:
        return bool(namespace["wrong"](*given) != value)
    except Exception:
        return True
