"""Wordings of a request, some of them reserved for held-out tasks.

An operation has a few beside its code, which show what it can say, and most in `wordings/OPERATION.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

WORDINGS = Path(__file__).parent / "wordings"

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


def wordings(operation: str) -> tuple[Phrasing, ...]:
    """Return the phrasings of `wordings/OPERATION.yaml`, lists `train` and `held_out` per kind; none without a file."""
    path = WORDINGS / f"{operation}.yaml"
    kinds = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return tuple(one for kind, lists in kinds.items() for one in phrasings(kind, **lists))
