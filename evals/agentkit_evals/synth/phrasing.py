"""Wordings of a request, some of them reserved for held-out tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OPENERS = (
    *("", "", "", "", "", ""),
    *("Hello. ", "Please help me. ", "A small task: ", "One task: ", "Task: ", "Hi. ", "Now this: ", "Good day. "),
)
CLOSERS = (
    *("", "", "", "", "", ""),
    *(" Thank you.", " Be exact.", " Please do it now.", " That is all.", " Thanks.", " This is the task.", " Go."),
)


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One wording of the instruction. `kind` is the variant of the operation that it asks for."""

    text: str
    kind: str = ""
    held_out: bool = False


def sentence(text: str) -> str:
    """Return a request with a full stop, unless it ends with a mark."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def phrasings(kind: str = "", *, train: Iterable[str], held_out: Iterable[str]) -> tuple[Phrasing, ...]:
    return (*(Phrasing(text, kind) for text in train), *(Phrasing(text, kind, held_out=True) for text in held_out))
