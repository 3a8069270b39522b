"""Generated functions, backed by small programs, and requests that need one of them."""

from __future__ import annotations

import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentkit_evals.synth.draw import Draw, Style, joined
from agentkit_evals.synth.parameters import Parameter, Parameters, spoken

VERBS: dict[str, tuple[str, ...]] = {
    "calculate": ("calculate", "compute", "determine", "work out", "find", "figure out", "evaluate", "what is"),
    "get": (
        "get",
        "find",
        "look up",
        "fetch",
        "retrieve",
        "show me",
        "tell me",
        "give me",
        "check",
        "what is",
        "I need",
    ),
    "search": ("search", "find", "look for", "list", "show me", "search for", "are there any"),
    "create": ("create", "make", "add", "set up", "generate", "write", "prepare", "open", "register"),
    "book": ("book", "reserve", "schedule", "arrange", "order", "buy"),
    "update": ("update", "change", "modify", "set", "edit", "adjust"),
    "delete": ("delete", "remove", "cancel", "drop", "clear"),
    "send": ("send", "post", "share", "deliver", "forward"),
    "convert": ("convert", "translate", "transform", "turn", "change"),
    "analyze": ("analyze", "compare", "check", "examine", "summarize", "review", "rank", "estimate", "predict"),
    "play": ("play", "start", "run", "launch", "turn on", "stop", "pause"),
}
"""The verbs of requests for each verb of a function's name."""
PLAIN = ("what is", "I need", "are there any")
"""Those that begin a sentence."""

OPENINGS = (
    *(
        "",
        "",
        "",
        "",
        "",
        "",
        "Please ",
        "Can you ",
        "Could you ",
        "I want to ",
        "I need to ",
        "I'd like to ",
        "Help me ",
    ),
    *("I want you to ", "Would you ", "Let's ", "You should "),
)
ENDINGS = ("", "", "", "", " please", " for me", " now", " today", " right away", ", thanks")

# `a` holds the arguments, `v` their values as text, `n` their hash; `UNIT` and `NOUN` come from the function.
PROGRAM = """\
import json, sys, zlib
a = json.load(sys.stdin)
n = zlib.crc32((json.dumps(a, sort_keys=True) + {salt!r}).encode())
v = ", ".join(map(str, a.values()))
w = {words!r}
print({style})
"""
STYLES: tuple[str, ...] = (
    "n % 9973",
    "w[n % 8]",
    "n % 99991 / 100",
    "f'{n % 900 + 100} ' + w[0]",
    "f'{w[n % 8]} {w[n // 8 % 8]}'",
    "f'{w[n % 8]}, {n % 40} {w[0]}'",
    "f'The {w[1]} is {w[n % 8]}.'",
    "json.dumps({w[1]: n % 997})",
    "json.dumps({w[1]: w[n % 8], w[2]: n % 100})",
    "json.dumps([w[n % 8], w[n // 8 % 8]])",
    "f'{n:x}'",
    "f'It is {w[n % 8]}.'",
    "f'{v}: {n % 997} {w[0]}'",
    "f'{w[1]} {n % 10007} confirmed'",
    "'done'",
)


@dataclass(frozen=True, slots=True)
class DrawnFunction:
    """A function: its name, its topic as words, its parameters in the order of the schema, and its program."""

    name: str
    verb: str
    topic: str
    description: str
    parameters: tuple[Parameter, ...]
    required: frozenset[str]
    style: str
    salt: str
    words: tuple[str, ...]

    @property
    def tool(self) -> dict[str, Any]:
        """The fields of a command tool."""
        properties = {parameter.name: parameter.schema for parameter in self.parameters}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if self.required:
            schema["required"] = [name for name in properties if name in self.required]
        program = PROGRAM.format(style=self.style, salt=self.salt, words=self.words)
        return {
            "name": self.name,
            "description": self.description,
            "parameters": schema,
            "command": f"python3 -c {shlex.quote(program)}",
        }

    def returning(self, text: str, arguments: Mapping[str, Any]) -> DrawnFunction:
        """Return the function with a program that prints a text for these arguments, and "unknown" for others."""
        return replace(self, style=f"{text!r} if n == {self._number(arguments)} else 'unknown'")

    def result(self, arguments: Mapping[str, Any]) -> str:
        """Return what the program prints for these arguments."""
        number = self._number(arguments)
        values = ", ".join(map(str, arguments.values()))
        return str(eval(self.style, {"json": json, "n": number, "v": values, "w": self.words}))  # trusted: STYLES only

    def _number(self, arguments: Mapping[str, Any]) -> int:
        return zlib.crc32((json.dumps(arguments, sort_keys=True) + self.salt).encode())


def draw_function(draw: Draw, parameters: Parameters, *, count: int | None = None) -> DrawnFunction:
    """Draw a function with `count` parameters, by default none to eight."""
    if count is None:
        count = draw.weighted({0: 0.4, 1: 4, 2: 5, 3: 4, 4: 2, 5: 1, 6: 0.5, 7: 0.25, 8: 0.2})
    drawn = [parameters.next() for _ in range(count)]
    verb = draw.choice(list(VERBS))
    words = _topic(draw)
    topic = " ".join(words)
    required = {one.name for one in drawn if one.default is None and draw.chance(0.85)}
    if drawn and not required and draw.chance(0.9):
        required.add(drawn[0].name)
    described = [_with_default(draw, one, optional=one.name not in required) for one in drawn]
    return DrawnFunction(
        name=_name(draw, verb, words),
        verb=verb,
        topic=topic,
        description=_description(draw, verb, topic, described),
        parameters=tuple(described),
        required=frozenset(required),
        style=draw.choice(STYLES),
        salt=str(draw.between(0, 9999)),
        words=tuple(draw.word() for _ in range(8)),
    )


def request(draw: Draw, function: DrawnFunction) -> tuple[str, dict[str, Any]]:
    """Return a request that needs the function, and the arguments that it states, in the order of the schema."""
    stated = [one for one in function.parameters if one.name in function.required or draw.chance(0.6)]
    arguments = {one.name: one.argument for one in stated}
    order = stated if draw.chance(0.6) else draw.some(stated, len(stated))
    before: list[str] = []
    phrases: list[str] = []
    after: list[str] = []
    unnamed: set[str] = set()  # types of which one value is already stated without its parameter's name
    for one in order:
        if one.sentence and draw.chance(0.12):
            draw.choice((before, after)).append(one.sentence)
            continue
        kind = "number" if one.schema["type"] == "integer" else one.schema["type"]
        phrases.append(one.named if kind in unnamed else one.phrase)
        if one.phrase != one.named:
            unnamed.add(kind)
    verb = draw.choice(VERBS[function.verb]) if draw.chance(0.75) else function.verb
    article = draw.choice(("the ", "the ", "a ", "")) if verb not in ("are there any", "what is") else ""
    article = "the " if verb == "what is" else article
    opening = draw.choice(OPENINGS) if verb not in PLAIN else ""
    if phrases:
        phrases[0] = phrases[0].removeprefix("and ")
    joint = draw.choice((" ", " ", " ", ", ", " and "))
    tail = "".join(
        (joint if index and not one.startswith(("and ", "but ", "(", ":")) else " ") + one
        for index, one in enumerate(phrases)
    )
    main = f"{opening}{verb} {article}{function.topic}{tail}{draw.choice(ENDINGS)}"
    main = main[0].upper() + main[1:]
    asks = verb in ("what is", "are there any") or opening in ("Can you ", "Could you ", "Would you ")
    main += "?" if asks and draw.chance(0.9) else draw.choice((".", ".", ".", ""))
    if draw.chance(0.06):
        main = f"Use {function.name} {tail.strip() or 'now'}."
    return " ".join([*before, main, *after]), arguments


def _topic(draw: Draw) -> list[str]:
    kind = draw.rng.random()
    if kind < 0.35:
        return [draw.noun()]
    if kind < 0.75:
        return [draw.noun(), draw.noun()]
    if kind < 0.92:
        return [draw.adjective(), draw.noun()]
    return [draw.noun(), "of", draw.noun()]


def _name(draw: Draw, verb: str, words: Sequence[str]) -> str:
    kept = [word for word in words if word != "of"]
    kind = draw.rng.random()
    styles: dict[Style, float] = {"snake": 8, "camel": 1, "pascal": 0.3}
    style = draw.weighted(styles)
    if kind < 0.6:
        return draw.named(joined([verb, *kept], style))
    if kind < 0.75:
        return draw.named(joined([kept[-1], verb, *kept[:-1]], "snake"))
    if kind < 0.9:
        return draw.named(
            joined(kept, style)
            if len(kept) > 1
            else f"{kept[0]}_{draw.choice(('info', 'lookup', 'finder', 'tool', 'service', 'by_name'))}"
        )
    return draw.named(joined([draw.noun(), *kept, draw.choice(("api", "v2", verb))], "snake"))


def _with_default(draw: Draw, one: Parameter, *, optional: bool) -> Parameter:
    """Return an optional parameter whose schema or description may state what is used without it."""
    if not optional or one.default is None or draw.chance(0.4):
        return one
    schema = dict(one.schema)
    if draw.chance(0.5):
        schema["default"] = one.default
    if "description" in schema and draw.chance(0.7):
        text = draw.choice(("Default is {d}.", "Defaults to {d}.", "Optional, default {d}.", "(default: {d})"))
        schema["description"] = f"{schema['description']} {text.format(d=json.dumps(one.default))}"
    return replace(one, schema=schema)


def _description(draw: Draw, verb: str, topic: str, parameters: Sequence[Parameter]) -> str:
    names = [spoken(one.name) for one in parameters]
    about = ""
    if names:
        about = draw.choice(
            (
                f" for a {names[0]}",
                f" of the given {names[0]}",
                f" by {names[0]}",
                "",
                "",
                f" with a {names[-1]}",
                f" based on {' and '.join(names[:2])}",
            )
        )
    verbs = draw.choice((verb, f"{verb}s", draw.choice(VERBS[verb][:3])))
    text = draw.choice(
        ("{v} the {t}{a}", "{v} the {t}{a}", "{v} a {t}{a}", "{v} {t}{a}", "This function {v} the {t}{a}", "the {t}{a}")
    )
    text = text.format(v=verbs, t=topic, a=about)
    return text[0].upper() + text[1:] + draw.choice((".", ".", ""))
