"""Continue a trained model with another tokenizer.

Everything but the rows per id is kept. The rows of an id (embedding, head, hash experts) are those of the old ids that
spell the same bytes: one row if the old tokenizer has the token, else the mean of several.
"""

from __future__ import annotations

import torch

from agentkit_engine.chat import Tokenizer
from agentkit_engine.model import Decoder

PHRASE = 12
"""Characters from which a token is a phrase: it takes the rows of the old phrase that begins most like it, if they
share this many characters. A tool's line then keeps its rows when its description changes."""


@torch.no_grad()
def transfer_(model: Decoder, tokenizer: Tokenizer, source: Decoder, source_tokenizer: Tokenizer) -> None:
    """Copy the weights of `source` into `model`, which has the same architecture but the ids of `tokenizer`."""
    spellings = old_spellings(tokenizer, source_tokenizer)
    state = source.state_dict()
    for name, rows in state.items():
        if name in ("embed.weight", "head.weight"):
            state[name] = torch.stack([rows[ids].mean(0) for ids in spellings])
        elif name.endswith("tid2eid"):  # experts of an id are distinct, so they come from one id
            state[name] = torch.stack([rows[ids[0]] for ids in spellings])
    model.load_state_dict(state)


def old_spellings(tokenizer: Tokenizer, old: Tokenizer) -> list[list[int]]:
    """Return the ids of `old` for each id of `tokenizer`."""
    names = {id: name for name, id in tokenizer.control_ids.items()}
    old_bytes = {old.token_bytes(id): id for id in range(old.vocab_size) if id not in old.control_ids.values()}
    phrases = [token for token in old_bytes if len(token) >= PHRASE]
    spellings = []
    for id in range(tokenizer.vocab_size):
        if id in names:
            spellings.append([old.control_ids[names[id]]])
            continue
        token = tokenizer.token_bytes(id)
        alike = max(phrases, key=lambda phrase: _shared(phrase, token), default=b"")
        if token in old_bytes:
            spellings.append([old_bytes[token]])
        elif _shared(alike, token) >= PHRASE:
            spellings.append([old_bytes[alike]])
        else:
            text = token.decode(errors="replace")
            exact = text.encode() == token
            spellings.append(old.encode_text(text) if exact else [old_bytes[bytes([byte])] for byte in token])
    return spellings


def _shared(one: bytes, other: bytes) -> int:
    """Return the number of bytes with which both begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
