"""Conversion between text and ids, with control tokens kept strictly apart from text.

A `tokenizer.json` in the Hugging Face layout holds a byte-level BPE and added tokens; every added token is a control
token here. Two encoders are built from the file. `encode` matches added tokens in the text, as DeepSeek's own tokenizer
does, and is for comparison only. `encode_text` uses a vocabulary without the added tokens, so no text can become a
control id; all model input comes from it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from agentkit_engine.chat.errors import TokenizerError
from agentkit_engine.chat.tokens import BOS, EOS
from agentkit_engine.untrusted import parse_json, read_regular, shorten

MAX_BYTES = 32 << 20
"""Maximum size of a `tokenizer.json`; DeepSeek-V4's has 8 MB."""
MAX_ID = 1 << 20
_MAX_VALUES = 1_000_000


def _byte_alphabet() -> dict[str, int]:
    """Return the byte for each character of a byte-level vocabulary (GPT-2's table, reversed)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer whose added tokens are control tokens.

    Attributes:
        control_ids: Id of each control token in the file, by content.
        vocab_size: Number of ids, including control tokens.
        bos_id, eos_id: Ids of the begin and end of sentence tokens.
    """

    def __init__(self, tokenizer_json: str) -> None:
        """Build from the text of a `tokenizer.json`; usually called through `from_dir` or `from_json`.

        Raises:
            TokenizerError: The text is not such a file, its model is not a byte-level BPE over all 256 bytes, two
                tokens share an id, or the begin or end of sentence token is missing.
        """
        try:
            data: dict[str, Any] = parse_json(tokenizer_json.encode(), max_values=_MAX_VALUES)
            controls = _controls(data["added_tokens"])
            model = data["model"]
            vocab = {token: id for token, id in model["vocab"].items() if token not in controls}
            _check_ids(vocab, controls)
            ordinary = {id: bytes(_BYTE_OF[c] for c in token) for token, id in vocab.items()}
            model["vocab"] = vocab
            model["merges"] = [merge for merge in model["merges"] if not _yields_any(merge, controls)]
            model["dropout"] = None
            # added tokens, post-processing and padding could insert control ids
            data |= {"added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
            with _panics_are_errors():
                self._text_encoder = tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
        except Exception as error:  # the Rust side raises bare `Exception`
            problem = shorten(str(error), 300, quote=False) or type(error).__name__
            raise TokenizerError(
                f"not a usable tokenizer.json: {'no key ' if isinstance(error, KeyError) else ''}{problem}. "
                "Expected a BPE with added_tokens."
            ) from error
        missing = [token for token in _BYTE_OF if token not in model["vocab"]]
        if model.get("type", "BPE") != "BPE" or missing:
            raise TokenizerError(
                f"expected a byte-level BPE that has all 256 bytes; got model type {model.get('type')!r}, "
                f"{len(missing)} bytes missing. Train it with ByteLevel's initial alphabet."
            )
        self._json = tokenizer_json
        self.control_ids: dict[str, int] = controls
        self._bytes_of: dict[int, bytes] = ordinary | {id: token.encode() for token, id in controls.items()}
        self._control_of = {id: token for token, id in controls.items()}
        self.vocab_size = max(self._bytes_of) + 1
        self.bos_id = self.control_id(BOS)
        self.eos_id = self.control_id(EOS)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` in the folder `path`. Raises TokenizerError if it is missing or unusable."""
        file = Path(path) / "tokenizer.json"
        try:
            return cls(read_regular(file, max_bytes=MAX_BYTES).decode())
        except OSError as error:
            raise TokenizerError(
                f"cannot read {file}: {error.strerror}. Put the model's tokenizer.json there."
            ) from error
        except (TokenizerError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Build from the text of a `tokenizer.json`. Raises TokenizerError if it is unusable."""
        return cls(text)

    def control_id(self, token: str) -> int:
        """Return the id of a control token, by content. Raises TokenizerError if the vocabulary lacks it."""
        try:
            return self.control_ids[token]
        except KeyError:
            raise TokenizerError(
                f"control token {token!r} is not among the {len(self.control_ids)} added tokens of this tokenizer; "
                "use a tokenizer that has it, or a conversation that does not need it."
            ) from None

    def control_token(self, token_id: int) -> str | None:
        """Return the content of the control token with this id, or None if the id is ordinary text."""
        return self._control_of.get(token_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with control tokens matched wherever they are spelt. Unsafe for untrusted text."""
        with _panics_are_errors():
            return list(self._reference_encoder.encode(_well_formed(text), add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of `text`, never a control id. Lone surrogates become U+FFFD."""
        with _panics_are_errors():
            return list(self._text_encoder.encode(_well_formed(text), add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with control tokens spelt out and invalid UTF-8 replaced by U+FFFD.

        Raises:
            TokenizerError: An id is not in the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id. Raises TokenizerError for an id outside the vocabulary."""
        try:
            return self._bytes_of[token_id]
        except KeyError:
            raise TokenizerError(
                f"id {token_id} is not in this tokenizer, which has ids below {self.vocab_size}"
            ) from None

    def stream(self) -> DecodeStream:
        """Return an incremental decoder; its pieces join to the result of `decode` for all ids at once."""
        return DecodeStream(self)

    @cached_property
    def _reference_encoder(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._json)


class DecodeStream:
    """Decodes ids to text incrementally, in whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rest = b""  # bytes of an incomplete character

    def feed(self, token_id: int) -> str:
        """Return the characters that this id completes, if any."""
        data = self._rest + self._tokenizer.token_bytes(token_id)
        text, length = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[length:]
        return text

    def finish(self) -> str:
        """Return U+FFFD if the last character is incomplete, else "", and reset the decoder."""
        rest, self._rest = self._rest, b""
        return rest.decode("utf-8", errors="replace")


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Convert a panic of the Rust side, which is a `BaseException`, to a TokenizerError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise TokenizerError(f"the tokenizers library failed: {shorten(str(error), 200, quote=False)}") from error
        raise


def _controls(added_tokens: object) -> dict[str, int]:
    """Return the added tokens by content. Raises TokenizerError for an invalid or repeated token."""
    if not isinstance(added_tokens, list):
        raise TokenizerError(f"added_tokens: found {shorten(added_tokens)}, expected a list")
    controls: dict[str, int] = {}
    for token in added_tokens:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or content in controls:
            raise TokenizerError(
                f"added_tokens: found {shorten(token)}, expected an object with a unique, non-empty content"
            )
        content.encode()  # raises for a lone surrogate
        controls[content] = token.get("id")
    return controls


def _check_ids(vocab: dict[str, int], controls: dict[str, int]) -> None:
    """Check that ids are in range and unique, because text could encode to a control token that shares its id."""
    owner: dict[int, str] = {}
    for token, id in (*controls.items(), *vocab.items()):
        if type(id) is not int or not 0 <= id < MAX_ID:
            raise TokenizerError(f"token {shorten(token)} has id {shorten(id)}, expected 0 to {MAX_ID - 1}")
        if id in owner:
            raise TokenizerError(f"tokens {shorten(owner[id])} and {shorten(token)} share id {id}")
        owner[id] = token


def _yields_any(merge: str | list[str], tokens: dict[str, int]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in tokens or right in tokens or left + right in tokens


def _well_formed(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced, so that UTF-8 can encode it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
