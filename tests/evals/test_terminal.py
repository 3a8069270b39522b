"""What somebody else wrote reaches the terminal as text, and as nothing else."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentkit.cli.terminal import visible, visible_line

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
ANY_TEXT = st.text(st.characters(categories=None))


@given(ANY_TEXT)
@example("".join(map(chr, range(256))) + BIDI + "\u2028\u2029\ud800\udfff\U000e0041")
def test_nothing_printed_can_steer_a_terminal(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert not {letter for letter in shown if unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Cs")} - {"\n", "\t"}
    assert not set(shown) & set(BIDI)
    assert visible(shown) == shown
    assert shown.count("\n") == text.count("\n")


@given(ANY_TEXT)
@example("a\u200bb\u00adc\ufeff\u00a0\U000e0041 \t\n")
def test_a_line_hides_nothing(text: str) -> None:
    shown = visible_line(text)
    assert shown.replace("\t", "").isprintable()
    assert visible_line(shown) == shown


@pytest.mark.parametrize("text", ["plain", "grüße 你好 😀", "a\tb", "`x` <b>"])
def test_ordinary_text_is_as_it_was(text: str) -> None:
    assert visible(text) == visible_line(text) == text
    assert visible("a\nb") == "a\nb"


def test_what_is_different_looks_different() -> None:
    hidden = ["", *map(chr, range(0x80, 0xA0)), *BIDI, "\u200b", "\u2028", "\ud800", "\udc80"]
    assert len({visible_line(f"a{letter}b") for letter in hidden}) == len(hidden)
