"""Call a tool with a random name and schema, defined only in the prompt, and return its result."""

from __future__ import annotations

import functools
import json
import shlex
import string
import types
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentkit_evals.synth.family import Act, Draft, Draw, Family, Phrasing, phrasings, plain, submit
from agentkit_evals.synth.words import CITIES, FIRST_NAMES, NOUNS, SUBJECTS, THINGS
from agentkit_tools import BUILTINS

VERBS = ("get", "find", "look_up", "fetch", "read", "show", "check", "tell", "query", "ask")
ENDS = ("of", "for", "lookup", "info", "finder", "service", "tool")
PLACES = ("city", "country", "region", "town", "station", "place")
COUNTS = ("amount", "day", "year", "count", "level", "number", "hour", "size", "version", "n")
SECONDS = ("unit", "date", "language", "format", "mode", "kind", "user", "owner", "team", "month")
DESCRIPTIONS = (
    "Return the {noun} of a {first}.",
    "Get the {noun} of one {first}.",
    "Look up the {noun} of a given {first}.",
    "The {noun} of a {first}.",
    "The current {noun} for a {first}.",
    "Tell the {noun} of the {first}.",
    "Find out which {noun} a {first} has.",
    "Gives back the {noun}.",
    "Ask the service for the {noun} of this {first}.",
    "Return the {noun} as text.",
    "{noun} by {first}.",
    "Know the {noun} of any {first}.",
    "Tell the {noun} in a {first}.",
    "Say what {noun} one {first} has now.",
)
ALONE = ("Return the current {noun}.", "Get the {noun}.", "The {noun} of this machine.", "Tell the {noun} now.")

# The tool's program: `a` holds the arguments, `v` their values as text, `n` their hash, and `s(k)` a name made from it.
PROGRAM = """\
import json, sys, zlib
a, u, t = json.load(sys.stdin), {unit!r}, {noun!r}
n = zlib.crc32((json.dumps(a, sort_keys=True) + {salt!r}).encode())
v = " ".join(map(str, a.values()))
s = lambda k: "".join("bdfgklmn"[n >> i & 7] + "aeiou"[(n >> i + 3) % 5] for i in range(0, 7 * k, 7))
print({style})
"""
STYLES = (
    "n % 9973",
    "s(2)",
    "s(3)",
    "f'{n % 900 + 100} {u}'",
    "f'{s(2)} {s(3)[-4:]}'",
    "f'{s(2)}, {n % 40} {u}'",
    "['sunny', 'cloudy', 'rainy', 'windy'][n % 4] + f', {n % 97} {u}'",
    "f'The {t} is {s(2)}.'",
    "f'{s(2)} and {n % 100}'",
    "json.dumps({t: n % 997})",
    "f'{n % 9973 / 10}'",
    "f'{s(2).capitalize()} {n % 97}'",
    "f'It is {s(2)}.'",
    "f'It is {s(2)} in {v}.'",
    "f'{v}: {n % 997} {u}'",
    "f'{v} has {s(2)}'",
)
UNITS = ("degrees", "kg", "euros", "points", "meters", "hours", "percent", "people", "coins", "pieces")


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    value: str
    integer: bool = False

    @property
    def argument(self) -> str | int:
        return int(plain(self.value)) if self.integer else plain(self.value)


class UserTool(Family):
    name = "user_tool"
    phrasings = (
        *phrasings(
            "one",
            train=(
                "What is the {noun} {of} {x}?",
                "Tell me the {noun} {of} {x}.",
                "I need the {noun} {of} {x}.",
                "[Find|Get|Look up] the {noun} {of} {x}.",
                "Which {noun} does {x} have?",
                "Please give me the {noun} {of} {x}.",
                "Show me the {noun} {of} {x}.",
                "Can you tell me the {noun} {of} {x}?",
                "I want to know the {noun} {of} {x}.",
                "Do you know the {noun} {of} {x}?",
                "Use {tool} to find the {noun} {of} {x}.",
                "Call {tool} with {x} and tell me the result.",
                "[Run|Use] {tool} for {x}.",
                "What does {tool} say about {x}?",
            ),
            held_out=(
                "Please tell me the {noun} {of} {x}.",
                "What {noun} does {x} have?",
                "Can you find the {noun} {of} {x}?",
                "Tell me what {tool} says about {x}.",
            ),
        ),
        *phrasings(
            "two",
            train=(
                "What is the {noun} {of} {x} {with} {y}?",
                "Tell me the {noun} {of} {x} {with} {y}.",
                "I need the {noun} {of} {x} {with} {y}.",
                "[Find|Get] the {noun} {of} {x} {with} {y}.",
                "Call {tool} with {x} and {y} and tell me the result.",
                "Use {tool} for {first} {x} and {second} {y}.",
            ),
            held_out=("Please find the {noun} {of} {x} {with} {y}.", "Use {tool} with {x} and {y}."),
        ),
        *phrasings(
            "none",
            train=(
                "What is the {noun} [now|right now|today]?",
                "[Tell me|Show me] the {noun}.",
                "[Call|Run] {tool} and tell me the result.",
            ),
            held_out=("Please tell me the {noun} now.",),
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        noun = draw.word(NOUNS) if draw.chance(0.65) else draw.name()
        parameters = _parameters(draw, {"one": 1, "two": 2, "none": 0}[phrasing.kind])
        name = _tool_name(draw, noun)
        setting = {"unit": plain(draw.pick(UNITS)), "noun": plain(noun), "salt": str(draw.between(0, 999))}
        style = draw.choice(STYLES)
        arguments = {plain(parameter.name): parameter.argument for parameter in parameters}
        result = _evaluate(style, arguments, **setting)
        config = _tool(draw, name, noun, parameters, PROGRAM.format(style=style, **setting))
        tools: list[str | Mapping[str, Any]] = [config]
        where = draw.rng.random()
        if where < 0.15:
            tools = list(BUILTINS)
            tools.insert(draw.between(0, len(tools)), config)
        elif where < 0.3:
            tools.append("submit")
        elif where < 0.55:
            other = draw.word(NOUNS) if draw.chance(0.65) else draw.name()
            decoy = PROGRAM.format(style=draw.choice(STYLES), **setting)
            count = draw.choice((0, 1, 1, 2))
            tools.insert(
                draw.between(0, 1), _tool(draw, _tool_name(draw, other), other, _parameters(draw, count), decoy)
            )
        x, y = ([_quoted(draw, parameter) for parameter in parameters] + ["", ""])[:2]
        first, second = ([parameter.name for parameter in parameters] + ["", ""])[:2]
        place = parameters and plain(first) in PLACES
        slots = {
            "noun": noun,
            "of": draw.choice(("in", "in", "of") if place else ("of", "of", "for")),
            "with": draw.choice(("and", f"with {second}", "for", "on", f"and {second}")),
            "tool": f"`{name}`" if draw.chance(0.5) else name,
        }

        def call(results: list[str]) -> Act:
            about = f" with {' and '.join(parameter.value for parameter in parameters)}" if parameters else ""
            return Act(f"I call `{name}`{about}.", [(plain(name), arguments)])

        def tell(results: list[str]) -> Act:
            if "submit" in tools:
                return submit("I submit the result.", results[0])
            return Act("I give the result.", content=results[0])

        return Draft(
            instruction=draw.phrase(phrasing.text, x=x, y=y, first=first, second=second, **slots),
            steps=[call, tell],
            verifier=f'printf %s "$AGENTKIT_ANSWER" | grep -Fqw -- {shlex.quote(result)}',
            solution=f"echo {shlex.quote(json.dumps(arguments))} | {config['command']}",
            tools=tools,
        )


def _tool_name(draw: Draw, noun: str) -> str:
    form = draw.rng.random()
    if form < 0.6:
        return f"{draw.pick(VERBS)}_{noun}"
    if form < 0.75:
        return f"{noun}_{draw.pick(ENDS)}"
    return noun if form < 0.93 else f"{draw.pick(VERBS[:2])}{plain(noun).capitalize()}"


def _parameters(draw: Draw, count: int) -> list[Parameter]:
    if count == 0:
        return []
    subject = draw.word(SUBJECTS) if draw.chance(0.8) else draw.name()
    first = Parameter(subject, _value(draw, plain(subject)))
    if draw.chance(0.1):
        first = Parameter(draw.word(COUNTS), draw.number(1, 9999), integer=True)
    if count == 1:
        return [first]
    if draw.chance(0.5):
        return [first, Parameter(draw.word(COUNTS), draw.number(1, 999), integer=True)]
    return [first, Parameter(draw.word(SECONDS), draw.value())]


def _value(draw: Draw, subject: str) -> str:
    """Draw an argument value: a known word, a name, random letters, or two words."""
    if subject in PLACES and draw.chance(0.6):
        return draw.word(CITIES)
    if subject in ("person", "user", "student") and draw.chance(0.6):
        return draw.word(FIRST_NAMES)
    kind = draw.rng.random()
    if kind < 0.35:
        return draw.word(draw.choice((THINGS, CITIES, FIRST_NAMES)))
    if kind < 0.6:
        return draw.value()
    if kind < 0.72:
        return draw.fresh(lambda: plain(draw.name()).capitalize())
    if kind < 0.82:
        return draw.fresh(lambda: f"{draw.choice(THINGS)} {draw.choice(CITIES)}")
    spell = str.capitalize if draw.chance(0.5) else str.lower
    return draw.fresh(lambda: spell("".join(draw.choice(string.ascii_lowercase) for _ in range(draw.between(3, 8)))))


def _quoted(draw: Draw, parameter: Parameter) -> str:
    if parameter.integer or draw.chance(0.6):
        return parameter.value
    return draw.choice((f"`{parameter.value}`", f"`{parameter.value}`", f'"{parameter.value}"'))


def _tool(draw: Draw, name: str, noun: str, parameters: Sequence[Parameter], program: str) -> dict[str, Any]:
    """Return the fields of a command tool, with the schema that `@tool` would write."""
    properties: dict[str, Any] = {}
    for parameter in parameters:
        described = {"description": f"The {plain(parameter.name)}."} if draw.chance(0.2) else {}
        properties[plain(parameter.name)] = described | {"type": "integer" if parameter.integer else "string"}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if parameters:
        schema["required"] = list(properties)
    texts = DESCRIPTIONS if parameters else ALONE
    first = parameters[0].name if parameters else ""
    return {
        "name": name,
        "description": draw.choice(texts).format(noun=noun, first=first),
        "parameters": schema,
        "command": f"python3 -c {shlex.quote(program)}",
    }


@functools.cache
def _compiled(style: str) -> types.CodeType:
    return compile(style, "<style>", "eval")


def _evaluate(style: str, arguments: dict[str, Any], *, unit: str, noun: str, salt: str) -> str:
    """Return the output of `PROGRAM` for these arguments."""
    n = zlib.crc32((json.dumps(arguments, sort_keys=True) + salt).encode())

    def s(syllables: int) -> str:
        return "".join("bdfgklmn"[n >> i & 7] + "aeiou"[(n >> i + 3) % 5] for i in range(0, 7 * syllables, 7))

    v = " ".join(map(str, arguments.values()))
    return str(eval(_compiled(style), {"json": json, "n": n, "s": s, "u": unit, "t": noun, "v": v}))
