"""The control tokens of DeepSeek-V4, as text. Their ids depend on the tokenizer: look them up, never hard-code them.

The bars are U+FF5C and the low lines U+2581, except in tokens that are plain ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterator


class Control(str):
    """A control token. Its type distinguishes it from a user's text with the same characters."""

    __slots__ = ()


BOS = Control("<｜begin▁of▁sentence｜>")
EOS = Control("<｜end▁of▁sentence｜>")
PAD = Control("<｜▁pad▁｜>")
USER = Control("<｜User｜>")
ASSISTANT = Control("<｜Assistant｜>")
LATEST_REMINDER = Control("<｜latest_reminder｜>")
THINK = Control("<think>")
THINK_END = Control("</think>")
DSML = Control("｜DSML｜")
FIM_BEGIN = Control("<｜fim▁begin｜>")
FIM_HOLE = Control("<｜fim▁hole｜>")
FIM_END = Control("<｜fim▁end｜>")

TASKS = {name: Control(f"<｜{name}｜>") for name in ("action", "query", "authority", "domain", "title", "read_url")}
"""Control token of each quick-instruction task."""

_OTHERS = (
    "<|EOT|>",
    *(f"<｜{name}｜>" for name in (
        "tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end",
        "tool▁outputs▁begin", "tool▁outputs▁end", "tool▁output▁begin", "tool▁output▁end", "tool▁sep",
        "begin▁of▁repo▁name", "end▁of▁repo▁name", "begin▁of▁file▁name", "end▁of▁file▁name",
        "begin▁of▁file", "end▁of▁file", "begin▁sys", "end▁sys", "task", "political", "entity",
        "safety", "answer", "search", "search▁begin", "search▁end", "extracted_url", "end_of_query",
    )),
    "<dsml:",
    "</dsml:",
)  # fmt: skip

CONTROL_TOKENS: tuple[Control, ...] = (
    BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, THINK, THINK_END, DSML, LATEST_REMINDER,
    *TASKS.values(), *map(Control, _OTHERS),
)  # fmt: skip
"""All named control tokens of the V4 vocabulary, without its placeholders and its image and table marks."""

_TEMPLATE_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))


def split_template(template: str) -> Iterator[str]:
    """Split *our own* text (never a user's) into `Control` tokens and the plain strings between them."""
    position = 0
    for match in _TEMPLATE_CONTROL.finditer(template):
        yield template[position : match.start()]
        yield Control(match.group())
        position = match.end()
    yield template[position:]
