"""Crafted tokenizer files: text never becomes a control token, and faults raise TokenizerError."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentkit_engine.chat import Tokenizer, TokenizerError

BOS = "<｜begin▁of▁sentence｜>"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def data(tiny_json: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(tiny_json)
    return parsed


def changed(data: dict[str, Any], change: Change) -> str:
    data = copy.deepcopy(data)
    change(data)
    return json.dumps(data)


def set_id(value: object) -> Change:
    return lambda data: data["added_tokens"][0].update(id=value)


def set_content(value: object) -> Change:
    return lambda data: data["added_tokens"][0].update(content=value)


def set_vocab(token: str, value: object) -> Change:
    return lambda data: data["model"]["vocab"].update({token: value})


CHANGES: dict[str, tuple[Change, str]] = {
    "a control id given to a letter": (lambda d: d["model"]["vocab"].update(a=d["added_tokens"][0]["id"]), "share id"),
    "a letter's id given to a control": (lambda d: set_id(d["model"]["vocab"]["a"])(d), "share id"),
    "two controls with one id": (set_id(1), "share id 1"),
    "two letters with one id": (lambda d: d["model"]["vocab"].update(a=d["model"]["vocab"]["b"]), "share id"),
    "a control twice": (lambda d: d["added_tokens"].append(d["added_tokens"][0]), "a unique, non-empty content"),
    "a negative id": (set_id(-1), "has id -1, expected 0 to"),
    "a huge id": (set_id(2**70), "expected 0 to 1048575"),
    "a true id": (set_id(True), "has id True"),
    "a fractional id": (set_id(0.0), "has id 0.0"),
    "an id in words": (set_id("0"), "has id '0'"),
    "no id": (lambda d: d["added_tokens"][0].pop("id"), "has id None"),
    "a letter's id in words": (set_vocab("a", "5"), "has id '5'"),
    "a letter's id is null": (set_vocab("a", None), "has id None"),
    "a letter's id is huge": (set_vocab("a", 2**40), "expected 0 to"),
    "an empty control": (set_content(""), "a unique, non-empty content"),
    "a control that is no text": (set_content(5), "a unique, non-empty content"),
    "a control that is half a pair": (set_content("\ud800"), "surrogates not allowed"),
    "a control that is no object": (lambda d: d["added_tokens"].append("x"), "a unique, non-empty content"),
    "controls that are no list": (lambda d: d.update(added_tokens={"content": "x", "id": 1}), "expected a list"),
    "no controls": (lambda d: d.pop("added_tokens"), "added_tokens"),
    "no begin": (set_content("other"), "begin▁of▁sentence"),
    "no model": (lambda d: d.pop("model"), "model"),
    "a model that is a list": (lambda d: d.update(model=[]), "not a usable"),
    "a vocabulary that is a list": (lambda d: d["model"].update(vocab=["a"]), "not a usable"),
    "a letter outside the byte alphabet": (set_vocab("日", 1_000_000), "日"),
    "merges of three": (lambda d: d["model"]["merges"].append("a b c"), "too many values"),
    "merges of unknown letters": (lambda d: d["model"]["merges"].append("zz qq"), "not a usable"),
    "merges that are numbers": (lambda d: d["model"].update(merges=[1]), "not a usable"),
    "another type": (lambda d: d["model"].update(type="WordPiece"), "not a usable|model type"),
    "a broken normalizer": (lambda d: d.update(normalizer={"type": "Nope"}), "not a usable"),
    "a broken pattern": (
        lambda d: d.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
        "not a usable",
    ),
    "a charsmap of garbage": (
        lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "not a usable",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_unusable_file_is_a_tokenizer_error(name: str, data: dict[str, Any]) -> None:
    change, message = CHANGES[name]
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_json(changed(data, change))
    assert len(str(caught.value)) < 600


def pad(data: dict[str, Any]) -> None:
    padding = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1}
    data["padding"] = padding | {"pad_type_id": 0, "pad_token": "<｜end▁of▁sentence｜>"}


def cut(data: dict[str, Any]) -> None:
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}


def wrap(data: dict[str, Any]) -> None:
    ids = {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}
    single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids}


def drop_merges(data: dict[str, Any]) -> None:
    data["model"]["dropout"] = 0.9


def spell_unknowns(data: dict[str, Any]) -> None:
    data["model"]["unk_token"] = BOS


@pytest.mark.parametrize("change", [pad, cut, wrap, drop_merges, spell_unknowns])
def test_post_processing_and_padding_of_a_file_are_ignored(
    change: Change, data: dict[str, Any], tiny: Tokenizer
) -> None:
    """Padding with a control id would otherwise let text produce one."""
    text = f"a longer text, and {BOS} in it"
    assert Tokenizer.from_json(changed(data, change)).encode_text(text) == tiny.encode_text(text)


class PanicException(BaseException):
    """Stand-in for pyo3's panic: a BaseException that `except Exception` does not catch."""


def test_a_panic_of_the_library_is_a_tokenizer_error(tiny_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_json(tiny_json)

    class Broken:
        @staticmethod
        def from_str(text: str) -> Broken:
            raise PanicException("index out of bounds")

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            raise PanicException("index out of bounds")

    monkeypatch.setattr("tokenizers.Tokenizer", Broken)
    with pytest.raises(TokenizerError, match="index out of bounds"):
        Tokenizer.from_json(tiny_json)
    monkeypatch.setattr(tokenizer, "_text_encoder", Broken())
    with pytest.raises(TokenizerError, match="the tokenizers library failed: index out of bounds"):
        tokenizer.encode_text("text")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}', b'{"model":' * 9000]
)
def test_invalid_json_is_a_tokenizer_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_a_huge_or_irregular_file_is_a_tokenizer_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(TokenizerError, match="expected at most 33,554,432"):
        Tokenizer.from_dir(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TokenizerError, match="it is a FIFO"):
        Tokenizer.from_dir(tmp_path)
    with pytest.raises(TokenizerError, match="more than 1,000,000 values"):
        Tokenizer.from_json("[" + "0," * 1_100_000 + "0]")


leaves = st.none() | st.booleans() | st.integers() | st.sampled_from(["", "a", BOS, "\ud800"])
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
paths = st.sampled_from(
    [("added_tokens",), ("added_tokens", 0), ("added_tokens", 0, "id"), ("added_tokens", 1, "content"), ("model",),
     ("model", "vocab"), ("model", "vocab", "a"), ("model", "merges"), ("model", "merges", 0), ("model", "type"),
     ("model", "unk_token"), ("model", "byte_fallback"), ("pre_tokenizer",), ("normalizer",), ("decoder",),
     ("padding",), ("truncation",), ("post_processor",), ("version",)]
)  # fmt: skip


@given(path=paths, value=values)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_at_any_key_gives_a_tokenizer_or_a_tokenizer_error(
    data: dict[str, Any], path: tuple[str | int, ...], value: Any
) -> None:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    try:
        tokenizer = Tokenizer.from_json(changed(data, change))
        ids = tokenizer.encode_text(f"a {BOS} b")
    except TokenizerError as error:
        assert len(str(error)) < 600
    else:
        assert set(tokenizer.control_ids.values()).isdisjoint(ids)
