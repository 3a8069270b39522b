"""Text to ids and back, with control tokens kept strictly apart from text.

One `tokenizer.json` in the Hugging Face layout: a byte-level BPE plus added tokens. Every added token is a control
token here. Two encoders are made from the file: `encode` matches added tokens in the text, as DeepSeek's own tokenizer
does, and serves comparison only; `encode_text` is built from the same file with the added tokens taken out of the
vocabulary, so no text whatever can become a control id. What a model is fed comes from the second.
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
"""Of a `tokenizer.json`; DeepSeek-V4's has 8 MB."""
MAX_ID = 1 << 20
_MAX_VALUES = 1_000_000


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer whose added tokens are control tokens.

    Attributes:
        control_ids: Content of every control token the file has, with its id.
        vocab_size: Number of ids, control tokens included.
        bos_id, eos_id: Ids of the begin and end of sentence tokens.
    """

    def __init__(self, tokenizer_json: str) -> None:
        """Build from the text of a `tokenizer.json`; `from_dir` and `from_json` are the usual ways in.

        Raises:
            TokenizerError: The text is not such a file, its model is not a byte-level BPE over all 256 bytes, two of
                its tokens share an id, or it lacks the begin or end of sentence token.
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
            # Added tokens and what is around the text would put control ids into it: padding with them, for one.
            data |= {"added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
            with _panics_are_errors():
                self._text_encoder = tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
        except Exception as error:  # the Rust side raises bare `Exception`
            raise TokenizerError(
                f"not a usable tokenizer.json: {shorten(str(error), 300, quote=False) or type(error).__name__}. "
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
        """Read `tokenizer.json` in the folder `path`. Raises TokenizerError when it is missing or unfit."""
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
        """Build from the text of a `tokenizer.json`. Raises TokenizerError when it is unfit."""
        return cls(text)

    def control_id(self, token: str) -> int:
        """The id of a control token, by its content. Raises TokenizerError when the vocabulary lacks it."""
        try:
            return self.control_ids[token]
        except KeyError:
            raise TokenizerError(
                f"control token {token!r} is not among the {len(self.control_ids)} added tokens of this tokenizer; "
                "use a tokenizer that has it, or a conversation that does not need it."
            ) from None

    def control_token(self, token_id: int) -> str | None:
        """The content of the control token with this id, or None when the id is ordinary text."""
        return self._control_of.get(token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, control tokens matched wherever they are spelt: the reference, unsafe for a user's text."""
        with _panics_are_errors():
            return list(self._reference_encoder.encode(_well_formed(text), add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` as text: never a control id, whatever it spells. Lone surrogates become U+FFFD."""
        with _panics_are_errors():
            return list(self._text_encoder.encode(_well_formed(text), add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens spelt out, bytes that are not UTF-8 replaced by U+FFFD.

        Raises:
            TokenizerError: An id that the vocabulary does not have.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for. Raises TokenizerError for an id outside the vocabulary."""
        try:
            return self._bytes_of[token_id]
        except KeyError:
            raise TokenizerError(
                f"id {token_id} is not in this tokenizer, which has ids below {self.vocab_size}"
            ) from None

    def stream(self) -> DecodeStream:
        """An incremental decoder: the pieces it returns join to what `decode` gives for all ids at once."""
        return DecodeStream(self)

    @cached_property
    def _reference_encoder(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._json)


class DecodeStream:
    """Ids in, text out, never half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rest = b""  # the beginning of a character

    def feed(self, token_id: int) -> str:
        """The characters that this id completes; often one or more, sometimes none yet."""
        data = self._rest + self._tokenizer.token_bytes(token_id)
        text, length = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[length:]
        return text

    def finish(self) -> str:
        """What is left: U+FFFD when the last character was cut, else nothing. The decoder starts afresh."""
        rest, self._rest = self._rest, b""
        return rest.decode("utf-8", errors="replace")


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Turn a panic of the Rust side, which is a `BaseException` there, into an error."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise TokenizerError(f"the tokenizers library failed: {shorten(str(error), 200, quote=False)}") from error
        raise


def _controls(added_tokens: object) -> dict[str, int]:
    """The added tokens by content. Raises TokenizerError for one that is no token, or is there twice."""
    if not isinstance(added_tokens, list):
        raise TokenizerError(f"added_tokens: found {shorten(added_tokens)}, expected a list")
    controls: dict[str, int] = {}
    for token in added_tokens:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or content in controls:
            raise TokenizerError(f"added_tokens: found {shorten(token)}, expected an object with a content of its own")
        content.encode()  # a lone surrogate is no text
        controls[content] = token.get("id")
    return controls


def _check_ids(vocab: dict[str, int], controls: dict[str, int]) -> None:
    """Ids are integers in range, and no two tokens share one: else a text could be encoded as a control token."""
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
    """`text` with surrogate pairs joined and lone surrogates replaced: what UTF-8 can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
