"""Rows of digits: filler of known token length, which no small tokenizer can shorten."""

from __future__ import annotations

from agentkit_evals.synth.family import Draw

FAR_TOKENS = 512  # a "far" fact is further back than this
GROUPS, GROUP_DIGITS = 4, 5  # per row: 20 digits and 4 separators, one token each


def number_row(draw: Draw) -> str:
    """Return one row: 24 tokens, if the tokenizer splits digits."""
    groups = (str(draw.rng.getrandbits(16) % 90_000 + 10_000) for _ in range(GROUPS))
    return " ".join(groups) + "\n"


def number_rows(draw: Draw) -> str:
    """Return enough rows to put earlier text more than `FAR_TOKENS` tokens back: 552 to 648 tokens."""
    return "".join(number_row(draw) for _ in range(draw.between(23, 27)))
