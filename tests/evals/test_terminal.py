"""Untrusted text is printed on the terminal as plain text only."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from agentkit.cli import app
from agentkit.cli.terminal import show_traceback, visible, visible_line

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
def test_a_line_has_no_invisible_characters(text: str) -> None:
    shown = visible_line(text)
    assert shown.replace("\t", "").isprintable()
    assert visible_line(shown) == shown


@pytest.mark.parametrize("text", ["plain", "grüße 你好 😀", "a\tb", "`x` <b>"])
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert visible(text) == visible_line(text) == text
    assert visible("a\nb") == "a\nb"


def test_different_names_look_different() -> None:
    hidden = ["", *map(chr, range(0x80, 0xA0)), *BIDI, "\u200b", "\u2028", "\ud800", "\udc80"]
    assert len({visible_line(f"a{letter}b") for letter in hidden}) == len(hidden)


ESCAPE = "\x1b]0;owned\x07\u202e\x9b2J"
TASK = """\
id: x
instruction: Hi.
environment: {setup: ["printf 'said \\\\033]0;owned\\\\007' >&2; exit 3"]}
verifier: {command: "false"}
solution: {command: "true"}
"""


def steers(shown: str) -> bool:
    return bool(set(shown) & {"\x1b", "\x07", "\x9b", "\u202e"})


def test_errors_are_shown_without_their_escapes(tmp_path: Path) -> None:
    (tmp_path / "setup.yaml").write_text(TASK)
    (tmp_path / "keys.yaml").write_text(f'id: x\ninstruction: Hi.\n"{ascii(ESCAPE)[1:-1]}": 1\n')
    (tmp_path / f"name{ESCAPE}.yaml").write_text("id: x\n")
    (tmp_path / "schema.json").write_text(json.dumps({"type": ESCAPE}))
    for arguments in (
        ["check", str(tmp_path / "setup.yaml"), "--env", "unsafe-local"],
        ["check", str(tmp_path / "keys.yaml")],
        ["check", str(tmp_path / f"name{ESCAPE}.yaml")],
        ["run", str(tmp_path / f"name{ESCAPE}.yaml")],
        ["run", "x", "--output-schema", str(tmp_path / "schema.json")],
        ["eval", str(tmp_path / f"missing{ESCAPE}")],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code in (1, 2, 3), (arguments, result.output)
        assert result.output
        assert not steers(result.output), (arguments, result.output)


def test_a_traceback_is_shown_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError(ESCAPE)
    except ValueError as error:
        show_traceback(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "ValueError: ␛]0;owned␇<U+202E><U+009B>2J" in shown and "test_terminal.py" in shown
    assert not steers(shown)
