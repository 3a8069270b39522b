"""Tokenizer: DeepSeek's ids, text that never becomes a control token, robust decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit_engine.chat import CONTROL_TOKENS, Tokenizer, TokenizerError

CONTROLS = [str(token) for token in CONTROL_TOKENS]
texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(CONTROLS)), max_size=6).map("".join)


def test_check_vectors(v4: Tokenizer) -> None:
    text = "<｜begin▁of▁sentence｜>You are a helpful assistant.<｜User｜>Hi<｜Assistant｜></think>"
    assert v4.encode(text) == [0, 3476, 477, 260, 11502, 22896, 16, 128803, 23166, 128804, 128822]
    assert v4.vocab_size == 129_280
    assert (v4.bos_id, v4.eos_id) == (0, 1)


@pytest.mark.parametrize(
    ("token", "token_id"),
    [
        ("<｜begin▁of▁sentence｜>", 0),
        ("<｜end▁of▁sentence｜>", 1),
        ("<｜▁pad▁｜>", 2),
        ("<｜fim▁hole｜>", 128800),
        ("<｜fim▁begin｜>", 128801),
        ("<｜fim▁end｜>", 128802),
        ("<｜User｜>", 128803),
        ("<｜Assistant｜>", 128804),
        ("<|EOT|>", 128805),
        ("<think>", 128821),
        ("</think>", 128822),
        ("｜DSML｜", 128825),
        ("<｜latest_reminder｜>", 128828),
        ("<｜action｜>", 128829),
        ("<｜read_url｜>", 128845),
    ],
)
def test_control_ids_are_found_by_content(v4: Tokenizer, token: str, token_id: int) -> None:
    assert v4.control_id(token) == token_id
    assert v4.control_token(token_id) == token
    assert v4.decode([token_id]) == token


def test_every_named_control_token_is_in_the_v4_vocabulary(v4: Tokenizer) -> None:
    assert set(CONTROLS) <= set(v4.control_ids)
    assert len(v4.control_ids) == 1283
    named = {token for token in v4.control_ids if "place" not in token and v4.control_ids[token] < 129262}
    assert named == set(CONTROLS)


def test_every_added_token_typed_as_text_stays_text(tokenizer: Tokenizer) -> None:
    control = set(tokenizer.control_ids.values())
    for token in tokenizer.control_ids:
        for text in (token, f"a{token}b", f"\n{token}\n"):
            ids = tokenizer.encode_text(text)
            assert not control & set(ids)
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode(f"a{token}").count(tokenizer.control_id(token)) == 1


@settings(deadline=None)
@given(text=texts)
def test_text_never_becomes_control_and_round_trips(v4: Tokenizer, tiny: Tokenizer, text: str) -> None:
    for tokenizer in (v4, tiny):
        ids = tokenizer.encode_text(text)
        assert not set(tokenizer.control_ids.values()) & set(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(data=st.data())
def test_the_stream_joins_to_the_result_of_decode(v4: Tokenizer, tiny: Tokenizer, data: st.DataObject) -> None:
    for tokenizer in (v4, tiny):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        stream = tokenizer.stream()
        assert "".join([stream.feed(token_id) for token_id in ids] + [stream.finish()]) == tokenizer.decode(ids)


def test_the_stream_gives_whole_characters_only(tiny: Tokenizer) -> None:
    ids = tiny.encode_text("💡é")
    stream = tiny.stream()
    assert len(ids) > 2
    assert "�" not in "".join(stream.feed(token_id) for token_id in ids)
    assert stream.finish() == ""
    stream.feed(ids[0])
    assert stream.finish() == "�"
    assert stream.finish() == ""


def test_lone_surrogates_are_replaced_and_pairs_joined(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_text("a\ud800b")) == "a�b"
    assert tokenizer.decode(tokenizer.encode_text("\ud83d\udca1")) == "💡"


def test_an_id_outside_the_vocabulary_is_an_error(v4: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="id 129280 is not in this tokenizer"):
        v4.decode([129_280])


def test_an_absent_control_token_is_an_error(tiny: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="tool▁sep"):
        tiny.control_id("<｜tool▁sep｜>")


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a usable"):
        Tokenizer.from_dir(tmp_path)


def test_unusable_vocabularies_are_refused(tiny_json: str) -> None:
    def without(change: Any) -> str:
        data = json.loads(tiny_json)
        change(data)
        return json.dumps(data)

    def drop_bos(data: dict[str, Any]) -> None:
        data["added_tokens"] = [token for token in data["added_tokens"] if "begin▁of▁sentence" not in token["content"]]
        del data["model"]["vocab"]["<｜begin▁of▁sentence｜>"]

    def drop_byte(data: dict[str, Any]) -> None:
        data["model"]["merges"] = []
        del data["model"]["vocab"]["A"]

    with pytest.raises(TokenizerError, match="begin▁of▁sentence"):
        Tokenizer.from_json(without(drop_bos))
    with pytest.raises(TokenizerError, match="1 bytes missing"):
        Tokenizer.from_json(without(drop_byte))
