"""Rows of digits: filler that no small tokenizer can shorten, so that a fact stands a known distance back."""

from __future__ import annotations

from agentkit_evals.synth.family import Draw

FAR_TOKENS = 512  # "far" is further back than this
GROUPS, GROUP_DIGITS = 4, 5  # a row: 20 digits and 4 separators, a token each


def number_row(draw: Draw) -> str:
    """One row, 24 tokens of a tokenizer that splits digits."""
    groups = (str(draw.rng.getrandbits(16) % 90_000 + 10_000) for _ in range(GROUPS))
    return " ".join(groups) + "\n"


def number_rows(draw: Draw) -> str:
    """Enough rows to put what comes before them more than `FAR_TOKENS` tokens back: 552 to 648 tokens."""
    return "".join(number_row(draw) for _ in range(draw.between(23, 27)))
