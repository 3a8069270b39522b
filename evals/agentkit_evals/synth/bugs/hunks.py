"""Faults from history: one hunk between two releases of a package, reverted in the newer one."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator

from agentkit_evals.synth.bugs.mutate import Mutation, function_at
from agentkit_evals.synth.bugs.package import Package

KIND = "reversed-hunk"


def reversed_hunks(old: str, new: str) -> Iterator[Mutation]:
    """Yield each difference between two versions of a module, as the newer text with the old lines in its place.

    A difference that changes no code (comments, docstrings, layout), or leaves no Python, is left out.
    """
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    meaning = _meaning(new)
    for tag, old_start, old_end, new_start, new_end in difflib.SequenceMatcher(
        None, before, after, autojunk=False
    ).get_opcodes():
        if tag == "equal":
            continue
        text = "".join([*after[:new_start], *before[old_start:old_end], *after[new_end:]])
        if _meaning(text) not in (None, meaning):
            first, last = new_start + 1, max(new_start + 1, new_end)
            function, docstring = function_at(new, first, last)
            yield Mutation(KIND, first, function, docstring, text)


def module_pairs(old: Package, new: Package) -> Iterator[tuple[str, str, str]]:
    """Yield (path, old text, new text) of each module that differs between two releases."""
    for path in new.modules:
        if path in old.files and old.files[path] != new.files[path]:
            before, after = old.text(path), new.text(path)
            if before is not None and after is not None:
                yield path, before, after


def _meaning(text: str) -> str | None:
    """Return the code of a module without docstrings and layout, or None if it is no Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant() as docstring), *_]:
                docstring.value = ""
    return ast.dump(tree)
