"""The text of sampled tokens: whole characters, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit_engine import AsyncEngine, Engine, SampledToken, SamplingParams, TokenizerMissingError
from agentkit_engine.reading import Reader, StopFilter

GREEDY = SamplingParams(temperature=0, seed=0, max_tokens=24)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("tiny")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def up_to_the_first_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Apply the definition: the first place where a stop text ends, and the longest stop text that ends there."""
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stop:
                return text[:start], True
    return text, False


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_in_any_pieces_is_shown_up_to_the_first_stop(pieces: list[str], stop: list[str]) -> None:
    stops = StopFilter(stop)
    shown = ""
    for index, piece in enumerate(pieces):
        shown += stops.feed(piece)
        so_far, stopped = up_to_the_first_stop("".join(pieces[: index + 1]), stop)
        assert stops.stopped is stopped
        assert so_far.startswith(shown)  # nothing was shown that had to be taken back
        held = so_far[len(shown) :]
        assert stopped is False or not held
        assert not held or any(text.startswith(held) for text in stop)  # nothing is held back without need
    assert (shown + stops.finish(), stops.stopped) == up_to_the_first_stop("".join(pieces), stop)


def prompt(engine: Engine) -> list[int]:
    return [engine.tokenizer.bos_id, *engine.tokenizer.encode_text("the file `kalo.txt` and the file `")]


def say(engine: Engine, params: SamplingParams) -> tuple[list[SampledToken], Sequence[int]]:
    with engine.session() as session:
        session.append(prompt(engine))
        tokens = list(session.generate(params))
        return tokens, session.token_ids


def test_the_texts_join_to_the_decoded_ids(engine: Engine) -> None:
    tokens, ids = say(engine, GREEDY)
    assert "".join(token.text for token in tokens) == engine.tokenizer.decode(ids[len(prompt(engine)) :])
    assert len(tokens) == 24


def test_a_stop_text_ends_the_generation_and_is_kept_but_not_shown(engine: Engine) -> None:
    plain, _ = say(engine, GREEDY)
    text = "".join(token.text for token in plain)
    stop = text[5:9]
    tokens, ids = say(engine, replace(GREEDY, stop=("never said", stop)))
    assert "".join(token.text for token in tokens) == text[: text.index(stop)]
    said = engine.tokenizer.decode(ids[len(prompt(engine)) :])
    assert stop in said and stop not in engine.tokenizer.decode(ids[len(prompt(engine)) : -1])
    assert [token.id for token in tokens] == [token.id for token in plain[: len(tokens)]]


def test_text_held_back_comes_with_the_last_token(engine: Engine) -> None:
    plain, _ = say(engine, GREEDY)
    text = "".join(token.text for token in plain)
    tokens, _ = say(engine, replace(GREEDY, stop=(text + "and more",)))
    assert [token.text for token in tokens] == [""] * 23 + [text]
    stop_id = replace(GREEDY, stop_token_ids=frozenset((plain[4].id,)), stop=(text + "and more",))
    tokens, _ = say(engine, stop_id)
    last = next(index for index, token in enumerate(plain) if token.id == plain[4].id)
    assert [token.text for token in tokens] == [""] * last + ["".join(token.text for token in plain[:last])]


def test_half_a_character_waits_for_its_other_half(engine: Engine) -> None:
    euro = [engine.tokenizer.encode_text("€"), engine.tokenizer.encode_text("x")]
    reader = Reader(engine.tokenizer, SamplingParams())
    ids = [*euro[0], *euro[1]]
    assert len(euro[0]) > 1
    texts = [reader.read(SampledToken(token_id, 0.0), last=False).text for token_id in ids]
    assert texts == [""] * (len(euro[0]) - 1) + ["€", "x"]
    assert reader.read(SampledToken(euro[0][0], 0.0), last=True).text == "\ufffd"


@pytest.mark.anyio
async def test_an_async_session_stops_at_the_same_token_and_discards_later_ones(engine: Engine) -> None:
    plain, _ = say(engine, GREEDY)
    text = "".join(token.text for token in plain)
    params = replace(GREEDY, stop=(text[5:9],))
    tokens, ids = say(engine, params)
    async with AsyncEngine(engine) as running, running.session() as session:
        await session.append(prompt(engine))
        assert [token async for token in session.generate(params)] == tokens
        assert session.token_ids == ids
        rest = replace(GREEDY, max_tokens=24 - len(tokens))
        assert [token.id async for token in session.generate(rest)] == [token.id for token in plain[len(tokens) :]]


def test_without_a_tokenizer_there_is_no_text_and_no_stop_text(engine: Engine, tmp_path: Path) -> None:
    for path in engine.folder.iterdir():
        if path.is_file() and path.name != "tokenizer.json":
            (tmp_path / path.name).symlink_to(path)
    bare = Engine.load(tmp_path)
    with bare.session() as session:
        session.append(prompt(engine))
        assert [token.text for token in session.generate(replace(GREEDY, max_tokens=3))] == ["", "", ""]
        with pytest.raises(TokenizerMissingError, match=r"holds no tokenizer\.json"):
            session.generate(replace(GREEDY, stop=("x",)))
