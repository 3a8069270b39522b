"""Requests as people make them: a phrasing, at times with a sentence of context before or a form of answer after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentkit_evals.synth.answers import Layout
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.phrasing import Phrasing

AnswerKind = Literal["number", "value", "list", "done"]


@dataclass(frozen=True, slots=True)
class Wording:
    """The instruction, and the form of answer that it demands."""

    text: str
    layout: Layout


def ask(draw: Draw, phrasing: Phrasing, answer: AnswerKind, **slots: object) -> Wording:
    """Fill in a phrasing; one in five has a context, one in four says what form the answer must have."""
    text = draw.phrase(phrasing.text, **slots)
    if draw.chance(0.2):
        text = draw.phrase(draw.choice(_HELD_OUT_CONTEXTS if phrasing.held_out else CONTEXTS)) + " " + text
    if answer == "done" or not draw.chance(0.25):
        return Wording(text, "")
    layout = draw.choice(_LAYOUTS[answer])
    forms = FORMS[answer, layout]
    form = draw.phrase(draw.choice(forms[-1:] if phrasing.held_out else forms[:-1]))
    return Wording(f"{text}{'' if text[-1] in '.?!:)' else '.'} {form}", layout)


CONTEXTS = (
    "I'm [preparing|writing|finishing] the [weekly|monthly|quarterly|yearly] [report|summary|review].",
    "I'm [cleaning up|tidying|sorting|going through] [this folder|my files|the project|these files].",
    "[My boss|My manager|A customer|The client|My sister|Our accountant] [wants to know this|asked me about this].",
    "[Quick|Short|Simple|Small] [question|one|request]:",
    "[It's for|This is for] the [meeting|call|newsletter|presentation|audit] [today|tomorrow|on Monday|next week].",
    "I'm [new here|new to this project|on the phone|in a hurry|in a meeting|on my way out].",
    "I [don't have the file open|can't open the file right now|lost track of this|forgot].",
    "[One more thing|Another one|Next|Now the next thing]:",
    "I'm [checking|double-checking|updating] [our records|the numbers|my notes|a few things].",
    "Before [I go home|lunch|I leave|the call]:",
    "We're [planning ahead|doing an inventory|moving to a new system|closing the month].",
)
_HELD_OUT_CONTEXTS = (
    "A [colleague|friend|neighbour] [just asked me this|needs this from me].",
    "I'm putting together [some slides|a short overview].",
    "[The deadline is close|Time is short], so:",
)

_LAYOUTS: dict[AnswerKind, tuple[Layout, ...]] = {
    "number": ("bare",),
    "value": ("bare",),
    "list": ("lines", "commas"),
}
# The last form of each row is only in held-out phrasings.
FORMS: dict[tuple[AnswerKind, Layout], tuple[str, ...]] = {
    ("number", "bare"): (
        "[Just|Only] the number[, please|].",
        "[Reply|Answer|Respond] with [just|only] the number.",
        "[Give me|Return|Submit] [just the number|the number only|a single number].",
        "[No explanation|No text|No words], [just|only] the number.",
        "[Digits only|A plain number, please|Number only].",
        "I [want|need] [nothing but the number|the bare figure].",
    ),
    ("value", "bare"): (
        "[Just|Only] the [value|answer|result][, please|].",
        "[Reply|Answer|Respond] with [just|only] [that|the value].",
        "[Give me|Return|Submit] [just|only] the [value|answer].",
        "[No explanation|No sentence|Nothing else], [just|only] the [value|answer].",
        "[Keep it to the value itself|Nothing around it, please].",
    ),
    ("list", "lines"): (
        "[One per line|One on each line|Each on its own line][, please|].",
        "[List|Give|Print] them one per line.",
        "[Put each|I want each] on [its own|a separate] line.",
        "Use a new line for every one of them.",
    ),
    ("list", "commas"): (
        "[Separate them with commas|Separated by commas|Comma-separated][, please|].",
        "[Give|Return|Submit] [them|it] as a comma-separated list.",
        "[On one line|All on one line], [with commas|separated by commas].",
        "Join them with commas.",
    ),
}
