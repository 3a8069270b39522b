"""A lenient reader of tags in a block of calls: white space, other quotes, other words, attributes in any order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from agentkit_engine.chat.format import BLOCK, BLOCK_WORD, INVOKE, PARAMETER

Kind = Literal["wrapper", "invoke", "parameter"]

MAX_TAG = 1024
"""Maximum length of a tag after its marker, in characters; the longest names are far shorter."""
_TAG_NAME = re.compile(r"\s*+([A-Za-z][\w:-]*+)?")
_TAG_END = re.compile(r"""(?:[^>"']++|"[^"]*+"|'[^']*+')*+>""")
_ATTRIBUTE = re.compile(r"""([A-Za-z]\w*+)\s*+=\s*+(?:"([^"]*+)"|'([^']*+)'|([^\s>"'/]++))""")
_WRAPPER = re.compile(rf"{BLOCK_WORD}[\w:-]*", re.IGNORECASE)
_PARAMETER_TAGS = (PARAMETER, "param", "argument", "arg")


@dataclass(slots=True)
class Tag:
    """A DSML tag being read: `lead` is the `<` or `</` before the marker, `text` everything after it."""

    lead: str
    place: int
    """Index of the marker in the text that the parser keeps of the block."""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Head:
    """A complete tag."""

    kind: Kind
    word: str
    attributes: dict[str, str]
    text: str
    closing: bool
    empty: bool
    """The tag ends with `/>`."""


def _kind(word: str) -> Kind | None:
    if word == INVOKE:
        return "invoke"
    if word in _PARAMETER_TAGS:
        return "parameter"
    return "wrapper" if _WRAPPER.fullmatch(word) else None


def read_tag(tag: Tag, *, ended: bool) -> Head | Literal["partial"] | None:
    """Return the tag after a marker, "partial" if more input can make it one, or None.

    `ended` is True if the new text contains `>`.
    """
    name = _TAG_NAME.match(tag.text)
    assert name is not None
    word = name[1]
    kind = _kind(word) if word else None
    end = _TAG_END.match(tag.text, name.end(), MAX_TAG) if ended and kind else None
    if kind is None or end is None:
        begun = kind is not None or name.end() == len(tag.text)  # at the end, the name may be incomplete
        return "partial" if begun and len(tag.text) < MAX_TAG else None
    attributes = {
        found[1].lower(): next(value for value in found.groups()[1:] if value is not None)
        for found in _ATTRIBUTE.finditer(tag.text, name.end(), end.end())
    }
    if kind == "wrapper" and word != BLOCK and "name" in attributes:
        kind = "invoke"
    text = tag.text[: end.end()]
    return Head(kind, word, attributes, text, closing=tag.lead == "</", empty=text.endswith("/>"))


def value_end(text: str, word: str) -> tuple[bool | None, str]:
    """Return whether `text`, after `</` and a marker, ends the parameter (None: too short to decide), and the rest."""
    text = text.lstrip()
    if not text.startswith(word):
        return (None if word.startswith(text) else False), ""
    rest = text[len(word) :].lstrip()
    return (None, "") if not rest else (rest[0] == ">", rest[1:])
