"""Grammars: masks over the next ids that keep calls and JSON answers valid.

A grammar constrains only the block of calls, or an answer that must be JSON. Thoughts and text are free, except that a
DSML marker is forbidden where no block can begin. Ids that are the only way to continue are *forced*: they are appended
without sampling.

The mask depends only on the session's ids since the last `<｜Assistant｜>`. A session can therefore be cut, forked or
continued at any id, and drafts need no special treatment. llguidance does the parsing; it is imported when the first
grammar is built.

A grammar never forbids a valid value because of a keyword it cannot enforce. Such keywords are left open, reported by a
`GrammarWarning`, and checked after parsing, as every call is. If a tool's schema cannot be enforced at all, its calls
keep the call format, with parameters of any name and value.

Two rules are stricter than JSON Schema. At the top of a tool's parameters, a missing `additionalProperties` counts as
false, so a call has only declared parameters. The properties of nested objects come in the order of their schema.

If a grammar reaches a state that no id can follow, the rest of the turn is free and a warning is issued, so a grammar
never ends a run.

Dimension key: V vocabulary.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
import threading
import warnings
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agentkit_engine.chat import Tokenizer, TokenizerError
from agentkit_engine.chat import format as dsml
from agentkit_engine.chat.tokens import ASSISTANT, DSML, THINK, THINK_END
from agentkit_engine.errors import GrammarError, GrammarMissingError
from agentkit_engine.schema_forms import ANNOTATIONS, ANY_TEXT, Conjunction, Forms, finds, lark, whole_text
from agentkit_engine.schema_types import Schema, accepted_types

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray

MOST_BITS = 64
"""Bits in a rule of the grammar, one for each tracked parameter; required parameters come first."""
MOST_PATTERNS = 3
"""Maximum number of `patternProperties` at the top of a tool's parameters whose overlaps are distinguished."""
_ANY_NAME = f"/{dsml.NAME}/"
MOST_ITEMS = 10_000
"""llguidance's limit on parser items per position (default 2,000), raised for tools with thousands of parameters."""
_BEFORE_BLOCK = dsml.BLOCK_START[0].encode()
_CONTROL = re.compile(rb"\xff\[(\d+)\]")
"""A control token among llguidance's forced bytes."""


class GrammarWarning(UserWarning):
    """A grammar does not enforce something: keywords of a schema, a tool, or the rest of a turn."""


class Grammars:
    """Builds grammars for one tokenizer; `Engine.grammars` is the one of a model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Read the vocabulary once for all grammars. `vocab_size` is the model's, which may exceed the tokenizer's.

        Raises:
            GrammarMissingError: llguidance is not installed.
            TokenizerError: the tokenizer lacks a control token of the call format.
        """
        try:
            import llguidance
        except ImportError as error:
            raise GrammarMissingError(
                "grammars need llguidance, which cannot be imported; run `pip install llguidance`, "
                "or generate without a grammar"
            ) from error
        self._llguidance = llguidance
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.dsml = tokenizer.control_id(DSML)
        self.token_bytes = [_bytes_of(tokenizer, token_id) for token_id in range(vocab_size)]
        self._texts = sorted({self.token_bytes[token_id] for token_id in range(vocab_size)} - {b""})
        self._vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self.token_bytes)))
        self._cached = functools.lru_cache(maxsize=32)(self._calls)
        self._lock = threading.Lock()

    def calls(
        self, tools: Sequence[Mapping[str, Any]], *, required: bool = False, tell_keywords: bool = True
    ) -> Grammar:
        """Return the grammar for free text followed by any number of calls of `tools` (OpenAI dicts), or none.

        Grammars are cached by tools. This method is thread-safe. A `GrammarWarning` names each tool that cannot be
        enforced and, with `tell_keywords`, each such keyword.

        With `required` the turn is at least one call right after the thought, without text.

        Raises:
            GrammarError: a call is required, and there is no tool that can be called.
        """
        if required and not tools:
            raise GrammarError("a call is required, but no tools are given; pass at least one tool")
        with self._lock:
            grammar: Grammar = self._cached(json.dumps([tool["function"] for tool in tools]), required)
        _warn(grammar, tell_keywords=tell_keywords)
        return grammar

    def answer(self, schema: Schema = None, *, tools: Sequence[Mapping[str, Any]] = ()) -> Grammar:
        """Return the grammar for an answer in JSON that matches `schema` (default: any object), after a free thought.

        With `tools` a turn is either such an answer or at least one call, and has no text besides.

        Raises:
            GrammarError: no value matches the schema.
        """
        schema = {"type": "object"} if schema is None else schema
        forms = Forms(schema)
        form = forms.json([schema])
        if form is None:
            raise GrammarError(f"no answer fits the schema {json.dumps(schema):.200}; loosen it")
        unenforced, unenforced_tools = [_sentence(forms.missed, "the answer")], list[str]()
        rules = [f"start: answer{' | block' if tools else ''}", f"answer: %json {json.dumps(form)}"]
        if tools:
            block, *others = self._block(
                [tool["function"] for tool in tools], unenforced, unenforced_tools, opened=False, each_alone=True
            )
            rules += [f"block: {block}", *others]
        matcher = self._matcher("\n".join(rules))
        grammar = Grammar(
            self, matcher, at_once=True, unenforced=tuple(unenforced), unenforced_tools=tuple(unenforced_tools)
        )
        _warn(grammar, tell_keywords=True)
        return grammar

    def forced_ids(self, form: LLMatcher) -> list[int]:
        """Return the ids that the form forces next, tokenized as the chat encoding does.

        Ids at the end of the forced text are omitted if they could merge with the text that follows: where `" st` is
        forced and `" string` is an id, the model may still sample that id. In the middle of a UTF-8 character nothing
        is forced, because its remaining bytes cannot be encoded as text; the mask then constrains byte by byte.
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
        """Return whether an id's bytes begin with `text` and are longer."""
        at = bisect.bisect_right(self._texts, text)
        return at < len(self._texts) and self._texts[at].startswith(text)

    def _calls(self, functions: str, required: bool) -> Grammar:
        tools: list[Mapping[str, Any]] = json.loads(functions)
        try:
            try:
                return self._calls_of(tools, required, each_alone=False)
            except GrammarError:  # find the tool that causes it
                return self._calls_of(tools, required, each_alone=True)
        except GrammarError as error:
            if required:
                raise
            told = (f"calls are not held to a grammar: {error}",)
            return Grammar(self, None, at_once=False, calls_are_free=True, unenforced_tools=told)

    def _calls_of(self, tools: Sequence[Mapping[str, Any]], required: bool, *, each_alone: bool) -> Grammar:
        unenforced, unenforced_tools = list[str](), list[str]()
        block, *rules = self._block(tools, unenforced, unenforced_tools, opened=not required, each_alone=each_alone)
        if not rules and required:
            raise GrammarError("a call is required, but none of the tools can be called; pass another tool")
        matcher = self._matcher("\n".join([f"start: {block}", *rules])) if rules else None
        return Grammar(
            self, matcher, at_once=required, unenforced=tuple(unenforced), unenforced_tools=tuple(unenforced_tools)
        )

    def _block(
        self,
        functions: Sequence[Mapping[str, Any]],
        unenforced: list[str],
        unenforced_tools: list[str],
        *,
        opened: bool,
        each_alone: bool,
    ) -> list[str]:
        """Return the expression for a block of calls, followed by the rules that it uses.

        `opened`: the block's first marker is already part of the text. `each_alone`: check each tool's rules on their
        own.
        """
        tools = {}
        for index, function in enumerate(functions):
            if not re.fullmatch(dsml.NAME, function["name"]):
                unenforced_tools.append(f"the call format cannot express the name of tool {function['name']!r}")
                continue
            try:
                missed: list[str] = []
                rules = self._tool(index, function, missed)
                if each_alone:
                    self._matcher(f"start: tool_{index}\n{rules}")
                unenforced += missed
            except Exception as error:  # no content of a schema may end a run
                unenforced_tools.append(
                    f"calls of tool {function['name']!r} are not held to its schema, and are checked after parsing: "
                    f"{error}"
                )
                rules = self._unenforced_tool(index, function["name"])
            tools[index] = rules
        start = self._terms(dsml.BLOCK_START[2:] if opened else dsml.BLOCK_START)
        call = f"call: {self._terms(dsml.INVOKE_START)} ({' | '.join(f'tool_{index}' for index in tools)})"
        return [f"{start} call+ {self._terms(dsml.BLOCK_END)}", *([call, *tools.values()] if tools else ())]

    def _terms(self, pieces: Sequence[str]) -> str:
        """Return pieces of the call format as terms of a rule."""
        return " ".join(f"<[{self.dsml}]>" if piece is DSML else json.dumps(piece) for piece in pieces)

    def _unenforced_tool(self, index: int, name: str) -> str:
        """Return the rules of a tool whose schema cannot be enforced: only the call format."""
        values = _Values(self, index, Forms(True))
        rules = self._parameters(f"{index}_0", _Parameters({}, frozenset(), ((_ANY_NAME, True),)), values)
        return "\n".join([f"tool_{index}: {json.dumps(dsml.invoke_name(name))} open_{index}_0", rules, *values.rules])

    def _tool(self, index: int, function: Mapping[str, Any], unenforced: list[str]) -> str:
        """Return the rules of one tool: parameters in any order, each at most once, all required ones present."""
        name, schema = function["name"], function.get("parameters") or {}
        forms = Forms(schema)
        alternatives = [
            conjunction
            for conjunction in forms.alternatives(schema)
            if all("object" in accepted_types(part, schema) for part in conjunction)
        ]
        names = list(
            dict.fromkeys(
                key
                for conjunction in alternatives
                for part in conjunction
                for key in (*part.get("properties", {}), *part.get("required", ()))
            )
        )
        values = _Values(self, index, forms)
        rules: list[str] = []
        missing = ["an object"]
        for conjunction in alternatives:
            parameters = self._read(conjunction, names, forms)
            missing = [
                key for key in sorted(parameters.required) if not values.rule(parameters.declared.get(key, False), key)
            ]
            if not missing:
                rules.append(self._parameters(f"{index}_{len(rules)}", parameters, values))
        if not rules:
            raise GrammarError(f"no value fits the schema of {', '.join(missing)}; loosen it")
        for keyword_place, keywords in values.missed.items():
            unenforced.append(_sentence(keywords, f"{name}.{keyword_place}"))
        known = {"type", "properties", "required", "additionalProperties", "patternProperties"} | ANNOTATIONS
        missed = {key for conjunction in alternatives for part in conjunction for key in part} - known
        unenforced.append(_sentence(missed | forms.missed, name))
        opens = " | ".join(f"open_{index}_{number}" for number in range(len(rules)))
        return "\n".join([f"tool_{index}: {json.dumps(dsml.invoke_name(name))} ({opens})", *rules, *values.rules])

    def _read(self, conjunction: Conjunction, names: Sequence[str], forms: Forms) -> _Parameters:
        """Return the parameters that satisfy all of `conjunction`."""
        declared: dict[str, Schema] = {}
        for key in names:
            every = [each for part in conjunction for each in _schemas_of(key, part, names, forms) if each is not True]
            if False not in every and re.fullmatch(dsml.NAME, key):
                declared[key] = {"allOf": every} if len(every) > 1 else every[0] if every else True
        required = frozenset(key for part in conjunction for key in part.get("required", ()))
        return _Parameters(declared, required, tuple(self._free(conjunction, names, forms)))

    def _free(self, conjunction: Conjunction, names: Sequence[str], forms: Forms) -> list[tuple[str, Schema]]:
        """Return terminals for undeclared names, each with the schema of its values."""
        opening = [part for part in conjunction if part.keys() & {"additionalProperties", "patternProperties"}]
        opened = any(part.get("additionalProperties", False) is not False for part in opening)
        if not opened and not any(part.get("patternProperties") for part in opening):
            return []
        declared = " | ".join(json.dumps(key) for key in names)
        apart = f" & ~({declared})" if names else ""
        patterns = list(dict.fromkeys(each for part in opening for each in part.get("patternProperties", ())))
        terms = {each: whole_text(each) for each in patterns}
        if len(patterns) > MOST_PATTERNS or None in terms.values():
            forms.missed.add("patternProperties")
            return [(_ANY_NAME + apart, True)]
        found = []
        for chosen in itertools.product((True, False), repeat=len(patterns)):
            inside = {each for each, is_in in zip(patterns, chosen, strict=True) if is_in}
            every: list[Schema] = []
            for part in opening:
                own = part.get("patternProperties", {})
                hit = [own[each] for each in own if each in inside]
                every += hit or [part.get("additionalProperties", opened)]
            term = _ANY_NAME + apart
            for each in patterns:
                term += f" & {'' if each in inside else '~'}/{lark(terms[each] or '')}/"
            if False not in every and self._matches_some(term):
                every = [each for each in every if each is not True]
                found.append((term, {"allOf": every} if len(every) > 1 else every[0] if every else True))
        return found

    def _parameters(self, place: str, parameters: _Parameters, values: _Values) -> str:
        """Return the rules from the end of a call's first line to the end of the call."""
        marker, head = self._terms(dsml.PARAMETER_START[:2]), self._terms(dsml.PARAMETER_START[2:])
        tail = f"{self._terms(dsml.PARAMETER_END[1:])} next_{place}::"  # the rule of the value includes the `</`
        end, empty = self._terms(dsml.INVOKE_END), self._terms([dsml.NO_PARAMETERS, *dsml.INVOKE_END])
        rules = {key: values.rule(schema, key) for key, schema in parameters.declared.items()}
        keys = sorted((key for key in rules if rules[key]), key=lambda key: key not in parameters.required)
        watched = keys[:MOST_BITS]
        unwatched = keys[MOST_BITS:]
        if len(parameters.required) > MOST_BITS or unwatched:
            values.missed.setdefault("(more than 64 parameters)", set()).add("required")
        one = [f"{head} {rules[key]} {tail}set_bit({bit}) %if bit_clear({bit})" for bit, key in enumerate(watched)]
        one += [f"{head} {rules[key]} {tail}_" for key in unwatched]
        terminals = []
        for number, (name, schema) in enumerate(parameters.free):
            if rule := values.rule(schema, None):
                terminals.append(f"NAME_{place}_{number}: {name}")
                one.append(f"{head} NAME_{place}_{number} {rule} {tail}_")
        if not one:
            return f"open_{place}: {empty}"
        needed = [f"bit_set({bit})" for bit, key in enumerate(watched) if key in parameters.required]
        enough = functools.reduce(lambda left, right: f"and({left}, {right})", needed) if needed else "true"
        more = "" if len(one) > len(watched) else f" %if not(is_ones([0:{len(watched)}]))"
        return "\n".join(
            [
                f"open_{place}: {marker} param_{place}::0x0" + ("" if needed else f"\n  | {empty}"),
                f"param_{place}::_ : " + "\n  | ".join(one),
                f"next_{place}::_ : {marker} param_{place}::_{more}",
                f"  | {end} %if {enough}",
                *terminals,
            ]
        )

    def _value(self, place: str, key: str | None, schema: Schema, forms: Forms) -> str:
        """Return the rules of a parameter from its name to the `</` after its value, or "" if no value fits.

        Without a `key` they begin after the name.
        """
        raw, json_options = forms.split(schema)
        text = " | ".join(f"({term})" for term in raw if len(raw) > 1 or self._matches_some(term))
        form = forms.json(json_options)
        close = json.dumps(dsml.PARAMETER_END[0])
        options, rules = [], []
        if text:
            options.append(json.dumps(dsml.parameter_name(key or "", string=True)) + f" TEXT_{place}")
            rules.append(f"TEXT_{place}: ({text}) {close}")
        if form is not None:
            options.append(json.dumps(dsml.parameter_name(key or "", string=False)) + f" json_{place} {close}")
            rules.append(f"json_{place}: %json {json.dumps(form)}")
        return "\n".join([f"value_{place}: {' | '.join(options)}", *rules]) if options else ""

    def _matches_some(self, terminal: str) -> bool:
        """Return whether any text matches the terminal; a pattern and a length can contradict each other."""
        if terminal == ANY_TEXT:
            return True
        matcher = self._matcher(f"start: TEXT\nTEXT: {terminal}")
        matcher.compute_bitmask()  # llguidance detects a dead end only when the next ids are requested
        return matcher.is_accepting() or not matcher.is_stopped()

    def _matcher(self, lark: str) -> LLMatcher:
        lark = f'%llguidance {{"no_forcing": true}}\n{lark}'  # `forced_ids` does this with this tokenizer's ids
        limits = self._llguidance.LLParserLimits(max_items_in_row=MOST_ITEMS)
        matcher = self._llguidance.LLMatcher(self._vocabulary, lark, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"llguidance rejects the grammar: {matcher.get_error():.500}")
        return matcher


@dataclass(frozen=True, slots=True)
class _Parameters:
    """One alternative of a tool's schema: named parameters, and terminals for other names."""

    declared: Mapping[str, Schema]
    required: frozenset[str]
    free: tuple[tuple[str, Schema], ...]


class _Values:
    """Rules for the values of one tool's parameters, without duplicates."""

    def __init__(self, grammars: Grammars, index: int, forms: Forms) -> None:
        self._grammars = grammars
        self._index = index
        self._root = forms.root
        self._known: dict[str, str] = {}
        self.rules: list[str] = []
        self.missed: dict[str, set[str]] = {}

    def rule(self, schema: Schema, key: str | None) -> str:
        """Return the name of the rule for `key`, or for the name just written if None; "" if no value fits."""
        known = json.dumps([key, schema])
        if known not in self._known:
            place = f"{self._index}_{len(self._known)}"
            forms = Forms(self._root)
            rules = self._grammars._value(place, key, schema, forms)
            if rules:
                self.rules.append(rules)
                self.missed.setdefault("*" if key is None else key, set()).update(forms.missed)
            self._known[known] = f"value_{place}" if rules else ""
        return self._known[known]


class Grammar:
    """The grammar of a turn, for `generate(grammar=...)`. Stateless, so sessions can share it."""

    def __init__(
        self,
        grammars: Grammars,
        form: LLMatcher | None,
        *,
        at_once: bool,
        calls_are_free: bool = False,
        unenforced: tuple[str, ...] = (),
        unenforced_tools: tuple[str, ...] = (),
    ) -> None:
        """`form` parses the block of calls after its first marker or, with `at_once`, everything after the thought.

        Without a `form` calls are forbidden, unless `calls_are_free`. `unenforced` are keywords that the grammar does
        not enforce, `unenforced_tools` sentences about tools whose schemas it does not enforce.
        """
        self.unenforced = tuple(filter(None, unenforced))
        self.unenforced_tools = unenforced_tools
        tokenizer = grammars.tokenizer
        self.form = form
        self.at_once = at_once
        self.vocab_size = grammars.vocab_size
        self.assistant, self.think, self.think_end = map(tokenizer.control_id, (ASSISTANT, THINK, THINK_END))
        self.dsml, self.eos = grammars.dsml, tokenizer.eos_id
        self.token_bytes, self.forced_ids = grammars.token_bytes, grammars.forced_ids
        self.free_V = torch.zeros(self.vocab_size)
        # a thought must not end the turn before its form, nor begin another turn
        closed = [self.dsml, self.eos, self.assistant] if at_once else [] if calls_are_free else [self.dsml]
        self.free_V[closed] = -torch.inf
        self.free_bits = np.zeros(bitmask_bytes(self.vocab_size), np.uint8)
        self.free_bits[: -(-self.vocab_size // 8)] = np.packbits(self.free_V.numpy() == 0, bitorder="little")

    def matcher(self) -> Matcher:
        """Return a matcher for one session."""
        return Matcher(self)


_MASK_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf
)
_MASK_OF_BYTE = _MASK_OF_BYTE.astype(np.float32)
"""Mask of eight logits for each byte of a bitmask, lowest bit first."""


def bitmask_bytes(vocab_size: int) -> int:
    """Return the bytes of a packed mask: a whole number of 32-bit words."""
    return 4 * -(-vocab_size // 32)


class _Region(Enum):
    OUTSIDE = auto()  # before the turn, and after its form is complete
    OPENING = auto()  # after <｜Assistant｜>
    THOUGHT = auto()
    TEXT = auto()
    FORM = auto()


class Matcher:
    """Tracks the ids of one session and computes the mask for the next one."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._known = 0
        self._region = _Region.OUTSIDE
        self._end = b""  # the last bytes of the text
        self._form: LLMatcher | None = None
        self._form_ids: list[int] = []  # ids consumed by the form
        self._forced: deque[int] | None = None  # ids that the form forces next; None if not computed yet
        self._bits: NDArray[np.uint8] | None = None  # cached packed mask of the form, or None
        self._mask: Tensor | None = None  # cached mask of the form, or None
        self._masks = np.empty((-(-grammar.vocab_size // 8), 8), np.float32)  # reused buffer of the mask

    def follow(self, ids: Sequence[int]) -> None:
        """Consume the new ids in `ids`, which are all ids of the session.

        Raises:
            GrammarError: `ids` has no assistant turn, or the form forbids one of them.
        """
        if self._known == 0:
            begin = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] == self._grammar.assistant), None)
            if begin is None:
                raise GrammarError(
                    "a grammar constrains an assistant's turn, and none has begun in this session; append a prompt"
                )
            self._known = begin
        for at in range(self._known, len(ids)):
            self._bits = self._mask = None
            self._take(ids[at])
        self._known = len(ids)

    def forced(self) -> int | None:
        """Return the next id if only one is allowed, else None."""
        if self._region is not _Region.FORM or self._form is None:
            return None
        if self._forced is None:
            stopped = self._form.is_stopped() and not self._form.is_error()
            self._forced = deque([self._grammar.eos] if stopped else self._grammar.forced_ids(self._form))
        return self._forced[0] if self._forced else None

    def bitmask(self) -> NDArray[np.uint8] | None:
        """Return the packed mask [4 * ceil(V / 32)]: bit v mod 8 of byte v // 8 is 1 if id v is allowed.

        None allows all. The mask is cached until the next `follow`. If the form allows no id, or exceeds llguidance's
        limits, the rest of the turn is free.
        """
        if self._region is _Region.THOUGHT or (self._region is _Region.TEXT and not self._at_block):
            return self._grammar.free_bits
        if self._region is not _Region.FORM or self._form is None:
            return None
        if self._bits is None:
            self._bits = self._bits_of(self._form)
            if self._bits is None:
                self._give_up(self._form)
        return self._bits

    def mask(self) -> Tensor | None:
        """Return the mask to add to the logits, float32 [V]: 0 for allowed ids, -inf for others. None allows all.

        It is cached like `bitmask`, and its buffer is then reused.
        """
        bits = self.bitmask()
        if bits is None or bits is self._grammar.free_bits:
            return None if bits is None else self._grammar.free_V
        if self._mask is None:
            # the mode that copies only once
            np.take(_MASK_OF_BYTE, bits[: len(self._masks)], axis=0, out=self._masks, mode="clip")
            self._mask = torch.from_numpy(self._masks.reshape(-1)[: self._grammar.vocab_size])
        return self._mask

    def _give_up(self, form: LLMatcher) -> None:
        """Leave the rest of the turn unconstrained."""
        self._region, self._form, self._forced, self._bits = _Region.OUTSIDE, None, None, None
        reason = f"llguidance failed: {form.get_error():.500}" if form.is_error() else "no id can follow"
        warnings.warn(
            f"the rest of this turn is not held to its grammar: {reason}; its content is checked after parsing",
            GrammarWarning,
            stacklevel=2,
        )

    def _bits_of(self, form: LLMatcher) -> NDArray[np.uint8] | None:
        """Return the packed mask of the form, or None if no id can follow."""
        bits = np.zeros(bitmask_bytes(self._grammar.vocab_size), np.uint8)
        if (forced := self.forced()) is not None:
            bits[forced // 8] = 1 << forced % 8
            return bits
        computed = np.frombuffer(form.compute_bitmask(), np.uint8)[: len(bits)]
        bits[: len(computed)] = computed
        return None if form.is_error() or not bits.any() else bits

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
            if self._is_stuck(token_id):
                self._give_up(form)
                return
            raise GrammarError(
                f"the grammar forbids id {token_id} ({self._grammar.token_bytes[token_id]!r}) at this point; "
                "inside a block of calls or an answer, append only ids that it allows"
            )
        self._form_ids.append(token_id)
        if forced:
            forced.popleft()
        self._forced = forced or None
        if token_id == self._grammar.eos:
            self._region, self._form, self._forced = _Region.OUTSIDE, None, None

    def _is_stuck(self, token_id: int) -> bool:
        """Return whether a refusal is due to the form instead of the id.

        True if no id can follow (so the turn went on without the form), or if the id is allowed but exceeds
        llguidance's limits.
        """
        assert self._grammar.form is not None
        form = self._grammar.form.deep_copy()
        if not form.consume_tokens(self._form_ids):
            return True
        bits = np.frombuffer(form.compute_bitmask(), np.uint8)
        return form.is_error() or not bits.any() or bool(bits[token_id // 8] >> token_id % 8 & 1)

    def _begin_form(self) -> None:
        assert self._grammar.form is not None
        self._region, self._form, self._forced = _Region.FORM, self._grammar.form.deep_copy(), None
        self._form_ids = []


class _Vocabulary:
    """Adapter that gives llguidance the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.control_ids.values())
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode_text(text if isinstance(text, str) else text.decode())


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return the bytes of an id; b"" for an id of the model that the tokenizer lacks."""
    try:
        return tokenizer.token_bytes(token_id)
    except TokenizerError:
        return b""


def _schemas_of(key: str, part: Mapping[str, Any], names: Sequence[str], forms: Forms) -> list[Schema]:
    """Return the schemas in `part` that apply to the value of a declared parameter."""
    every = [part["properties"][key]] if key in part.get("properties", {}) else []
    hit = len(every)
    for pattern, schema in part.get("patternProperties", {}).items():
        match finds(pattern, key):
            case True:
                every.append(schema)
                hit += 1
            case None:
                forms.missed.add("patternProperties")
                hit += 1  # unknown, so left open
    return every if hit else [part.get("additionalProperties", True)]


def _sentence(keywords: Collection[str], place: str) -> str:
    return f"{', '.join(sorted(keywords))} of {place}" if keywords else ""


def _warn(grammar: Grammar, *, tell_keywords: bool) -> None:
    told = list(grammar.unenforced_tools)
    if tell_keywords and grammar.unenforced:
        told.append(
            f"the grammar does not enforce {'; '.join(grammar.unenforced)}: such values are checked after parsing"
        )
    for sentence in told:
        warnings.warn(sentence, GrammarWarning, stacklevel=3)
