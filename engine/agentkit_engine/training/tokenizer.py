"""A small byte-level BPE with every named V4 control token, in the `tokenizers` JSON format.

It differs from V4's own tokenizer in two ways, so that a model of a few million parameters can use it:

*Phrases.* Lines that never change (the frame of the tools block, one JSON line per built-in tool, the DSML frame of a
call) are one vocabulary entry each. They are ordinary text, not added tokens: the pre-tokenizer isolates them and
`ignore_merges` lets the whole piece match. Eight tools then take some sixty tokens, not eight hundred.

*Spaces and digits are separate tokens.* A name has the same ids after a space, a quote or a slash, so the model copies
a name by copying its ids. Only the most common words include their space (`SPACED_WORDS`), because they are not copied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from agentkit_engine.chat.tokens import BOS, CONTROL_TOKENS, EOS, PAD

PIECES = r"\p{Lu}?\p{Ll}+|\p{Lu}+(?!\p{Ll})|\p{L}|\p{N}| +|[^\p{L}\p{N} ]"
"""Words, split where the case changes, so that `maxSize` and `max_size` share tokens; single digits; spaces."""
SPACED_WORDS = (
    "a all an and are as at be by compute do done fails file files find first for from has have how I if in into is it"
    " its join line lines look me my need no not now of on one only or out please read rename run set so stands submit"
    " task test tests that the their them then there these this to tool tools two use value values was what where which"
    " will with you your"
).split()


def build_tokenizer(texts: Iterable[str], *, phrases: Sequence[str], vocab_size: int) -> str:
    """Train the vocabulary on `texts` and return a `tokenizer.json`.

    `vocab_size` includes control tokens, 256 bytes, phrases, spaced words and merges.
    Raises ValueError if no room is left for merges.
    """
    words = [f" {word}" for word in SPACED_WORDS]
    fixed = len(CONTROL_TOKENS) + len(set(phrases)) + len(words)
    if vocab_size < fixed + 256:
        raise ValueError(
            f"vocab_size={vocab_size} leaves no room for merges: {fixed} control tokens, phrases and words and"
            f" 256 bytes are fixed; give at least {fixed + 256}"
        )
    isolate = _alternation(phrases) + "|" + rf" (?:{'|'.join(SPACED_WORDS)})(?![\p{{L}}\p{{N}}_])"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    merges_only = Tokenizer(models.BPE())
    merges_only.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(isolate), "removed"),
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            byte_level,
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - fixed,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    merges_only.train_from_iterator(texts, trainer)
    trained = json.loads(merges_only.to_str())["model"]

    vocab: dict[str, int] = {BOS: 0, EOS: 1, PAD: 2}
    for piece in [*trained["vocab"], *(_byte_level_text(byte_level, text) for text in (*words, *phrases))]:
        vocab.setdefault(piece, len(vocab))
    added = {str(token): vocab[token] for token in (BOS, EOS, PAD)}
    for token in CONTROL_TOKENS:
        added.setdefault(str(token), len(vocab) + len(added) - 3)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added_token(token, index) for token, index in added.items()],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": f"{isolate}|{PIECES}"},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": vocab,
                "merges": trained["merges"],
            },
        },
        ensure_ascii=False,
    )


def _alternation(phrases: Sequence[str]) -> str:
    """Return an alternation with the longest phrase first, so that no phrase matches in place of a longer one it
    begins."""
    return "|".join(_escape(phrase) for phrase in sorted(set(phrases), key=lambda p: (-len(p), p)))


def _escape(phrase: str) -> str:
    return re.sub(r"([\\^$.|?*+()\[\]{}\-&~#])", r"\\\1", phrase).replace("\n", r"\n")


def _byte_level_text(byte_level: pre_tokenizers.ByteLevel, text: str) -> str:
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))


def _added_token(token: str, index: int) -> dict[str, Any]:
    return {
        "id": index,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token in (BOS, EOS, PAD),
    }
