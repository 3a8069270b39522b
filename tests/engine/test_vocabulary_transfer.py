"""A trained model that continues with another tokenizer: rows per id follow their bytes, everything else stays."""

from __future__ import annotations

import pytest
import torch

from agentkit_engine.chat import CONTROL_TOKENS, Tokenizer
from agentkit_engine.model import Decoder, initialize_
from agentkit_engine.training.tiny import tiny_spec
from agentkit_engine.training.tokenizer import build_tokenizer
from agentkit_engine.training.vocabulary import old_spellings, transfer_

OLD_LINE, NEW_LINE = (
    '{"name": "read_file", "description": "Read."}\n',
    '{"name": "read_file", "description": "Return."}\n',
)


def _tokenizer(texts: list[str], phrase: str) -> Tokenizer:
    return Tokenizer.from_json(build_tokenizer(texts * 3, phrases=[phrase], vocab_size=480))


@pytest.fixture(scope="module")
def old() -> Tokenizer:
    return _tokenizer(["budget report", "the cat sat"], OLD_LINE)


@pytest.fixture(scope="module")
def new() -> Tokenizer:
    return _tokenizer(["budget calendar", "the élan of cats"], NEW_LINE)


def test_a_new_id_has_the_old_ids_of_the_same_bytes(old: Tokenizer, new: Tokenizer) -> None:
    spellings = old_spellings(new, old)
    for id, spelling in enumerate(spellings):
        if id not in new.control_ids.values() and new.token_bytes(id) != NEW_LINE.encode():
            assert b"".join(map(old.token_bytes, spelling)) == new.token_bytes(id)
    (budget,), (cal, *_) = new.encode_text("budget"), new.encode_text("calendar")
    assert spellings[budget] == old.encode_text("budget")
    assert len(spellings[cal]) > 1
    assert [spellings[new.control_id(token)] for token in CONTROL_TOKENS] == [
        [old.control_id(token)] for token in CONTROL_TOKENS
    ]


def test_a_phrase_has_the_old_phrase_that_begins_like_it(old: Tokenizer, new: Tokenizer) -> None:
    (line,) = new.encode_text(NEW_LINE)
    assert old_spellings(new, old)[line] == old.encode_text(OLD_LINE)


def test_rows_of_ids_are_carried_over_and_all_other_weights_kept(old: Tokenizer, new: Tokenizer) -> None:
    source = initialize_(Decoder(tiny_spec(old.vocab_size)), torch.Generator().manual_seed(0))
    model = Decoder(tiny_spec(new.vocab_size))
    transfer_(model, new, source, old)
    before, after = source.state_dict(), model.state_dict()
    for id, spelling in enumerate(old_spellings(new, old)):
        torch.testing.assert_close(after["embed.weight"][id], before["embed.weight"][spelling].mean(0))
        torch.testing.assert_close(after["head.weight"][id], before["head.weight"][spelling].mean(0))
        assert torch.equal(after["layers.0.ffn.gate.tid2eid"][id], before["layers.0.ffn.gate.tid2eid"][spelling[0]])
    per_id = {"embed.weight", "head.weight", "layers.0.ffn.gate.tid2eid"}
    assert all(torch.equal(after[name], before[name]) for name in after if name not in per_id)


def test_the_same_tokenizer_keeps_every_weight(new: Tokenizer) -> None:
    source = initialize_(Decoder(tiny_spec(new.vocab_size)), torch.Generator().manual_seed(0))
    model = Decoder(tiny_spec(new.vocab_size))
    transfer_(model, new, source, new)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
