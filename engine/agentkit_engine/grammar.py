"""Grammars: which ids may come next, so that a call names a real tool, real parameters and values that fit its schema.

A grammar constrains only what has a form: the block of calls, or an answer that is to be JSON. Thoughts and text stay
free; the one id forbidden there is a DSML marker where no block can begin. Where the form leaves a single way to go on,
those ids are *forced*: they are appended without asking the model.

What is allowed is a function of the session's ids alone, from its last `<｜Assistant｜>` on. So a session can be cut,
forked or taken up at any id, and guesses at the next ids need no care. llguidance does the parsing; it is imported when
the first grammar is made. What cannot be enforced of a schema is named by a `GrammarWarning`, and checked after parsing
as everything is.

Dimension key: V vocabulary.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
import warnings
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agentkit_engine.chat import Tokenizer, TokenizerError
from agentkit_engine.chat.tokens import ASSISTANT, DSML, THINK, THINK_END
from agentkit_engine.errors import GrammarError, GrammarMissingError
from agentkit_engine.schema_forms import ANNOTATIONS, DEFINITIONS, Forms, Schema

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray

MOST_PARAMETERS = 64
"""A rule of the grammar carries one bit for each parameter of a tool."""
_BEFORE_BLOCK = b"\n\n<"
_CONTROL = re.compile(rb"\xff\[(\d+)\]")
"""A control token among the bytes that llguidance says are forced."""


class GrammarWarning(UserWarning):
    """Some keywords of a schema are not enforced by a grammar; the message names each."""


class Grammars:
    """Makes grammars for one tokenizer; a model's own is `Engine.grammars`."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Take in the vocabulary, once for all grammars. `vocab_size` is the model's, which may be larger.

        Raises:
            GrammarMissingError: llguidance is not installed.
            TokenizerError: the tokenizer lacks a control token of the call format.
        """
        try:
            import llguidance
        except ImportError as error:
            raise GrammarMissingError(
                'a grammar needs llguidance, which is not installed; run `pip install "agentkit-harness[grammar]"`, '
                "or go on without a grammar"
            ) from error
        self._llguidance = llguidance
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.dsml = tokenizer.control_id(DSML)
        self.token_bytes = [_bytes_of(tokenizer, token_id) for token_id in range(vocab_size)]
        self._texts = sorted({self.token_bytes[token_id] for token_id in range(vocab_size)} - {b""})
        self._vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self.token_bytes)))
        self._cached = functools.lru_cache(maxsize=32)(self._calls)

    def calls(self, tools: Sequence[Mapping[str, Any]], *, required: bool = False) -> Grammar:
        """Free text, then calls of `tools` (OpenAI dicts) as their schemas say, or none.

        With `required` the turn makes at least one call, right after its thought, and says nothing else.

        Raises:
            GrammarError: a tool cannot be written in the call format, or a required parameter has no value that fits.
        """
        if required and not tools:
            raise GrammarError("a call is required, and no tools are given; give at least one")
        return self._cached(json.dumps([tool["function"] for tool in tools]), required)

    def answer(self, schema: Schema = None, *, tools: Sequence[Mapping[str, Any]] = ()) -> Grammar:
        """An answer that is a JSON value as `schema` says, by default any object; a thought before it is free.

        With `tools` a turn is either that, or at least one call; text beside calls would be no answer, and cannot be.

        Raises:
            GrammarError: no value fits the schema, or as `calls`.
        """
        schema = {"type": "object"} if schema is None else schema
        forms = Forms(schema)
        form = forms.json([forms.kept(schema)])
        if form is None:
            raise GrammarError(f"no answer fits the schema {json.dumps(schema):.200}; loosen it")
        unenforced = [_sentence(forms.missed, "the answer")]
        rules = [f"start: answer{' | block' if tools else ''}", f"answer: %json {json.dumps(form)}"]
        if tools:
            block, *others = self._block([tool["function"] for tool in tools], unenforced, opened=False)
            rules += [f"block: {block}", *others]
        _warn(unenforced)
        return Grammar(self, self._matcher("\n".join(rules)), at_once=True)

    def forced_ids(self, form: LLMatcher) -> list[int]:
        """The ids that the form forces next, as the chat encoding would write them.

        Left out are ids at the end of the forced text that may become one with what follows: where `" st` is forced,
        and `" string` is an id, that one may still come. Nothing is forced inside a character, whose last bytes are no
        text to encode: there the mask goes on byte by byte.
        """
        forced = form.compute_ff_bytes()
        if forced and forced[0] & 0xC0 == 0x80:  # a continuation byte of UTF-8
            return []
        *closed, rest = _CONTROL.split(forced)
        ids: list[int] = []
        for text, control in zip(closed[::2], closed[1::2], strict=True):
            ids += [*self.tokenizer.encode_text(text.decode()), int(control)]
        tail = self.tokenizer.encode_text(rest.decode(errors="ignore"))
        begin = 0
        for at, token_id in enumerate(tail):
            if self._begins_id(rest[begin:]):
                end = form.deep_copy()
                whole = end.consume_tokens([*ids, *tail]) and end.is_stopped()  # nothing can follow
                return ids + (tail if whole else tail[:at])
            begin += len(self.token_bytes[token_id])
        return ids + tail

    def _begins_id(self, text: bytes) -> bool:
        """Whether there is an id whose bytes begin with `text` and go on."""
        at = bisect.bisect_right(self._texts, text)
        return at < len(self._texts) and self._texts[at].startswith(text)

    def _calls(self, functions: str, required: bool) -> Grammar:
        unenforced: list[str] = []
        block, *rules = self._block(json.loads(functions), unenforced, opened=not required)
        _warn(unenforced)
        if not rules:
            return Grammar(self, None, at_once=False)
        return Grammar(self, self._matcher("\n".join([f"start: {block}", *rules])), at_once=required)

    def _block(self, functions: Sequence[Mapping[str, Any]], unenforced: list[str], *, opened: bool) -> list[str]:
        """What a block of calls is made of, then the rules which that names; `opened`: its first marker has been."""
        tools = [self._tool(index, function, unenforced) for index, function in enumerate(functions)]
        marker = f"<[{self.dsml}]>"
        opening = "" if opened else f'"\\n\\n<" {marker} '
        call = f'call: "<" {marker} "invoke name=\\"" ({" | ".join(f"tool_{index}" for index in range(len(tools)))})'
        return [f'{opening}"tool_calls>\\n" call+ "</" {marker} "tool_calls>"', *([call, *tools] if tools else ())]

    def _tool(self, index: int, function: Mapping[str, Any], unenforced: list[str]) -> str:
        """The rules of one tool: its parameters in any order, each at most once, none missing that is required."""
        name, schema = function["name"], function.get("parameters") or {}
        required = schema.get("required", ())
        properties = {**dict.fromkeys(required, True), **schema.get("properties", {})}
        if bad := [text for text in (name, *properties) if re.search('["<>]', text)]:
            raise GrammarError(f'tool {name!r}: no call can carry the name {bad[0]!r}; leave out the characters " < >')
        if len(properties) > MOST_PARAMETERS:
            raise GrammarError(f"tool {name!r} has {len(properties)} parameters, {MOST_PARAMETERS} are possible")
        known = {"type", "properties", "required"} | ANNOTATIONS | DEFINITIONS
        if not schema.get("additionalProperties"):
            known |= {"additionalProperties"}
        unenforced.append(_sentence(schema.keys() - known, name))
        values: dict[str, str] = {}
        for key, value in properties.items():
            forms = Forms(schema)
            values[key] = self._value(f"{index}_{len(values)}", key, value, forms)
            unenforced.append(_sentence(forms.missed, f"{name}.{key}"))
        if impossible := [key for key in required if not values[key]]:
            raise GrammarError(f"tool {name!r}: no value fits the schema of {', '.join(impossible)}; loosen it")
        marker = f"<[{self.dsml}]>"
        head, end = json.dumps(f'{name}">\n'), f'"</" {marker} "invoke>\\n"'
        keys = [key for key in values if values[key]]
        if not keys:
            return f'tool_{index}: {head} "\\n" {end}'
        needed = [f"bit_set({bit})" for bit, key in enumerate(keys) if key in required]
        enough = functools.reduce(lambda left, right: f"and({left}, {right})", needed) if needed else "true"
        one = [
            f'"parameter name=\\"" value_{index}_{list(values).index(key)} {marker} "parameter>\\n" '
            f"next_{index}::set_bit({bit}) %if bit_clear({bit})"
            for bit, key in enumerate(keys)
        ]
        return "\n".join(
            [
                f"tool_{index}: {head} open_{index}",
                f'open_{index}: "<" {marker} param_{index}::0x0' + ("" if needed else f'\n  | "\\n" {end}'),
                f"param_{index}::_ : " + "\n  | ".join(one),
                f'next_{index}::_ : "<" {marker} param_{index}::_ %if not(is_ones([0:{len(keys)}]))',
                f"  | {end} %if {enough}",
                *(values[key] for key in keys),
            ]
        )

    def _value(self, place: str, key: str, schema: Schema, forms: Forms) -> str:
        """The rules of a parameter from its name to the `</` that ends its value; empty where no value fits."""
        raw, json_options = forms.split(schema)
        text = " | ".join(f"({term})" for term in raw if self._matches_some(term))
        form = forms.json(json_options)
        options, rules = [], []
        if text:
            options.append(json.dumps(f'{key}" string="true">') + f" TEXT_{place}")
            rules.append(f'TEXT_{place}: ({text}) "</"')
        if form is not None:
            options.append(json.dumps(f'{key}" string="false">') + f' json_{place} "</"')
            rules.append(f"json_{place}: %json {json.dumps(form)}")
        return "\n".join([f"value_{place}: {' | '.join(options)}", *rules]) if options else ""

    def _matches_some(self, terminal: str) -> bool:
        """Whether there is a text that the terminal matches: a pattern and a length may exclude each other."""
        matcher = self._matcher(f"start: TEXT\nTEXT: {terminal}")
        matcher.compute_bitmask()  # a dead end is seen when the next ids are asked for
        return matcher.is_accepting() or not matcher.is_stopped()

    def _matcher(self, lark: str) -> LLMatcher:
        lark = f'%llguidance {{"no_forcing": true}}\n{lark}'  # `forced_ids` sees to it, in this tokenizer's own ids
        matcher = self._llguidance.LLMatcher(self._vocabulary, lark, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"llguidance does not take the grammar: {matcher.get_error():.500}")
        return matcher


class Grammar:
    """What a turn may look like; for `SamplingParams.grammar`. It holds no state, so sessions can share it."""

    def __init__(self, grammars: Grammars, form: LLMatcher | None, *, at_once: bool) -> None:
        """`form` reads the block of calls from after its first marker, or, `at_once`, all that follows the thought."""
        tokenizer = grammars.tokenizer
        self.form = form
        self.at_once = at_once
        self.vocab_size = grammars.vocab_size
        self.assistant, self.think, self.think_end = map(tokenizer.control_id, (ASSISTANT, THINK, THINK_END))
        self.dsml, self.eos = grammars.dsml, tokenizer.eos_id
        self.token_bytes, self.forced_ids = grammars.token_bytes, grammars.forced_ids
        self.free_V = torch.zeros(self.vocab_size)
        # a thought must not end the turn before its form, nor seem to begin another one
        self.free_V[[self.dsml, self.eos, self.assistant] if at_once else [self.dsml]] = -torch.inf

    def matcher(self) -> Matcher:
        """What follows one session."""
        return Matcher(self)


_MASK_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf
)
_MASK_OF_BYTE = _MASK_OF_BYTE.astype(np.float32)
"""What eight bits of a bitmask, the lowest first, add to eight logits."""


class _Region(Enum):
    OUTSIDE = auto()  # before the turn, and after its form is complete
    OPENING = auto()  # after <｜Assistant｜>
    THOUGHT = auto()
    TEXT = auto()
    FORM = auto()


class Matcher:
    """Follows the ids of one session, and says which may come next."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._known = 0
        self._region = _Region.OUTSIDE
        self._end = b""  # the last bytes of the text
        self._form: LLMatcher | None = None
        self._forced: deque[int] | None = None  # what the form forces next; None when not asked yet
        self._mask: Tensor | None = None  # where the form says it, once asked for
        self._masks = np.empty((-(-grammar.vocab_size // 8), 8), np.float32)  # memory for it, used again and again

    def follow(self, ids: Sequence[int]) -> None:
        """Take in what is new in `ids`, all ids of the session.

        Raises:
            GrammarError: no turn of an assistant begins in `ids`, or an id in a form is one that it forbids.
        """
        if self._known == 0:
            begin = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] == self._grammar.assistant), None)
            if begin is None:
                raise GrammarError("a grammar constrains an assistant's turn, and none has begun in this session")
            self._known = begin
        for at in range(self._known, len(ids)):
            self._mask = None
            self._take(ids[at])
        self._known = len(ids)

    def forced(self) -> int | None:
        """The next id where the grammar leaves no choice, else None."""
        if self._region is not _Region.FORM or self._form is None:
            return None
        if self._forced is None:
            stopped = self._form.is_stopped()
            self._forced = deque([self._grammar.eos] if stopped else self._grammar.forced_ids(self._form))
        return self._forced[0] if self._forced else None

    def mask(self) -> Tensor | None:
        """What to add to the logits, float32 [V]: 0 for the ids that may come next, -inf for others. None: all may.

        Asked again, it is not computed again; it is overwritten by that after further ids.

        Raises:
            GrammarError: the form is too complex for llguidance's limits.
        """
        if self._region is _Region.THOUGHT or (self._region is _Region.TEXT and not self._at_block):
            return self._grammar.free_V
        if self._region is not _Region.FORM or self._form is None:
            return None
        if self._mask is None:
            self._mask = torch.from_numpy(self._mask_of(self._form))
        return self._mask

    def _mask_of(self, form: LLMatcher) -> NDArray[np.float32]:
        mask_V = self._masks.reshape(-1)[: self._grammar.vocab_size]
        if (forced := self.forced()) is not None:
            mask_V[:] = -np.inf
            mask_V[forced] = 0.0
            return mask_V
        bits = np.frombuffer(form.compute_bitmask(), np.uint8)[: len(self._masks)]
        if form.is_error():
            raise GrammarError(f"llguidance gave up on the grammar: {form.get_error():.500}")
        np.take(_MASK_OF_BYTE, bits, axis=0, out=self._masks[: len(bits)], mode="clip")  # the mode that copies once
        self._masks[len(bits) :] = -np.inf
        return mask_V

    @property
    def _at_block(self) -> bool:
        return self._end == _BEFORE_BLOCK and self._grammar.form is not None

    def _take(self, token_id: int) -> None:
        grammar = self._grammar
        if self._region is _Region.FORM:
            self._take_in_form(token_id)
        elif token_id == grammar.assistant:
            self._region = _Region.OPENING
        elif self._region is _Region.OPENING and token_id == grammar.think:
            self._region = _Region.THOUGHT
        elif self._region in (_Region.OPENING, _Region.THOUGHT):
            if token_id == grammar.think_end or self._region is _Region.OPENING:
                self._region, self._end = _Region.TEXT, b""
                if grammar.at_once:
                    self._begin_form()
                if token_id != grammar.think_end:
                    self._take(token_id)
        elif self._region is _Region.TEXT:
            if token_id == grammar.dsml and self._at_block:
                self._begin_form()
            else:
                self._end = (self._end + grammar.token_bytes[token_id])[-len(_BEFORE_BLOCK) :]

    def _take_in_form(self, token_id: int) -> None:
        form, forced = self._form, self._forced
        assert form is not None
        if not (token_id == self._grammar.eos if form.is_stopped() else form.consume_token(token_id)):
            raise GrammarError(
                f"id {token_id} ({self._grammar.token_bytes[token_id]!r}) stands where the grammar forbids it; "
                "feed no ids inside a block of calls or an answer, or only such as fit"
            )
        if forced:
            forced.popleft()
        self._forced = forced or None
        if token_id == self._grammar.eos:
            self._region, self._form, self._forced = _Region.OUTSIDE, None, None

    def _begin_form(self) -> None:
        assert self._grammar.form is not None
        self._region, self._form, self._forced = _Region.FORM, self._grammar.form.deep_copy(), None


class _Vocabulary:
    """The tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.control_ids.values())
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode_text(text if isinstance(text, str) else text.decode())


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of an id; none where the model has an id that the tokenizer lacks."""
    try:
        return tokenizer.token_bytes(token_id)
    except TokenizerError:
        return b""


def _sentence(keywords: Collection[str], place: str) -> str:
    return f"{', '.join(sorted(keywords))} of {place}" if keywords else ""


def _warn(unenforced: Sequence[str]) -> None:
    if told := [sentence for sentence in unenforced if sentence]:
        warnings.warn(
            f"the grammar does not enforce {'; '.join(told)}: such values are checked after parsing",
            GrammarWarning,
            stacklevel=3,
        )
