"""Remove tests from a test file, so that an agent does not see the tests that score."""

from __future__ import annotations

import ast
import re


def path_of(test: str, files: tuple[str, ...]) -> str | None:
    """Return the test file of a test, by its name in the output of pytest or unittest; None if it has none."""
    if "::" in test:
        path = test.partition("::")[0]
        return path if path in files else None
    if match := re.fullmatch(r"\w+ \(([\w.]+)\)", test):
        for path in files:
            module = path.removesuffix(".py").removeprefix("src/").replace("/", ".")
            if match[1].startswith(module + "."):
                return path
    return None


def function_of(test: str) -> str:
    """Return the name of a test's function: `test_x` of `tests/test_a.py::A::test_x[1]` or `test_x (test_a.A)`."""
    return test.partition("[")[0].rpartition("::")[2] if "::" in test else test.partition(" ")[0]


def without_tests(source: str, functions: set[str]) -> str | None:
    """Return a test file without the functions of these names, or None if one of them is not defined in it.

    A class that would be empty keeps a `pass`. All functions of a name are removed, in whatever class.
    """
    lines = source.splitlines(keepends=True)
    found: set[str] = set()
    for parent in list(ast.walk(ast.parse(source)))[::-1]:
        if not isinstance(parent, ast.Module | ast.ClassDef):
            continue
        gone = [
            node
            for node in parent.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in functions
        ]
        for node in gone:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            assert node.end_lineno is not None
            lines[first - 1 : node.end_lineno] = [""] * (node.end_lineno - first + 1)
            found.add(node.name)
        if isinstance(parent, ast.ClassDef) and len(gone) == len(parent.body):
            lines[parent.body[0].lineno - 1] = " " * parent.body[0].col_offset + "pass\n"
    if found != functions:
        return None
    text = re.sub(r"\n{4,}", "\n\n\n", "".join(lines))
    try:
        ast.parse(text)
    except SyntaxError:
        return None
    return text
