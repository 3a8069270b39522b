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
    "calculate": (
        "calculate",
        "compute",
        "determine",
        "work out",
        "find",
        "figure out",
        "evaluate",
        "what is",
        "estimate",
        "get",
    ),
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
        "pull up",
        "bring up",
        "find out",
        "read out",
        "see",
        "let me know",
    ),
    "search": (
        "search",
        "find",
        "look for",
        "list",
        "show me",
        "search for",
        "are there any",
        "hunt for",
        "browse",
        "see",
    ),
    "create": (
        "create",
        "make",
        "add",
        "set up",
        "generate",
        "write",
        "prepare",
        "open",
        "register",
        "build",
        "put in",
        "start",
    ),
    "book": ("book", "reserve", "schedule", "arrange", "order", "buy", "get", "secure", "make a booking for"),
    "update": ("update", "change", "modify", "set", "edit", "adjust", "revise", "correct", "alter"),
    "delete": ("delete", "remove", "cancel", "drop", "clear", "get rid of", "erase", "take out"),
    "send": ("send", "post", "share", "deliver", "forward", "pass on", "get out"),
    "convert": ("convert", "translate", "transform", "turn", "change", "switch", "express"),
    "analyze": ("analyze", "compare", "check", "examine", "summarize", "review", "rank", "estimate", "predict"),
    "play": ("play", "start", "run", "launch", "turn on", "stop", "pause"),
}
"""The verbs of requests for each verb of a function's name."""
PLAIN = ("what is", "I need", "are there any")
"""Those that begin a sentence."""
FOR_ME = ("show me", "tell me", "give me", "let me know")
"""Those that the speaker does not do."""

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
    *("Could you please ", "Would you mind helping me to ", "I have to ", "We need to ", "I was hoping you could "),
    *("Are you able to ", "Do you think you could ", "My boss asked me to ", "I am trying to ", "Kindly "),
    *("Go ahead and ", "Is it possible to ", "hey, ", "It's time to "),
)
ASKING = (
    *("Can you ", "Could you ", "Would you ", "Could you please ", "Would you mind helping me to ", "Are you able to "),
    *("Do you think you could ", "Is it possible to "),
)
"""Those that begin a question."""
SPEAKER = (
    *("I want to ", "I need to ", "I'd like to ", "Help me ", "Let's ", "Would you mind helping me to ", "I have to "),
    *("We need to ", "My boss asked me to ", "I am trying to ", "It's time to "),
)
"""Those after which the speaker acts, so no `tell me` follows."""
ENDINGS = (
    *("", "", "", "", "", "", " please", " for me", " now", " today", " right away", ", thanks"),
    *(", please", " if you can", " when you have a moment", ", if possible", " as soon as possible"),
)
_KNOW = (
    *("[What is|What's] the {topic}{tail}?", "I [would like|want|need|have] to know the {topic}{tail}."),
    *("[Any idea|Do you know] what the {topic}{tail} is?", "I am [looking for|interested in|after] the {topic}{tail}."),
    *("The {topic}{tail}, [please|if you can].", "My question is about the {topic}{tail}: what is it?"),
    *("[Let me know|Find out|See] what the {topic}{tail} is.", "I wonder what the {topic}{tail} is."),
    *("Someone asked me for the {topic}{tail}.", "For my report I [need|want] the {topic}{tail}."),
    *("Is there a way to [know|learn] the {topic}{tail}?", "{topic}{tail}?", "Could I have the {topic}{tail}?"),
)
FRAMES: dict[str, tuple[str, ...]] = {
    "calculate": (
        *_KNOW,
        *("[How much|How high|How large] is the {topic}{tail}?", "[Do|Can you do] the math for the {topic}{tail}."),
        *("What do you get for the {topic}{tail}?", "What [would|will] the {topic}{tail} be?"),
        *("I can't [work out|figure out] the {topic}{tail}. Can you?", "Run the numbers on the {topic}{tail}."),
        *("What does the {topic}{tail} come [to|out as]?", "I have to hand in the {topic}{tail}; what is it?"),
    ),
    "get": (
        *_KNOW,
        *("[Pull up|Bring up|Dig up] the {topic}{tail}.", "[Can|May|Could] I [see|get|have] the {topic}{tail}?"),
        *("What do we have as {topic}{tail}?", "I forgot the {topic}{tail}. What was it?"),
        *("What can you tell me about the {topic}{tail}?", "Do you have the {topic}{tail}?", "Got the {topic}{tail}?"),
    ),
    "search": (
        *("I am looking for [a |any |some |]{topic}{tail}.", "[Is there|Do you see|Do you know of] any {topic}{tail}?"),
        *("Which {topic}{tail} can you find?", "I [want|need|would like] to see what {topic}{tail} there is."),
        *("What {topic}{tail} is [there|available]?", "[Where can I find|Where is there] {topic}{tail}?"),
        *("Any {topic}{tail}?", "[Have|Take] a look for {topic}{tail}.", "See [if|whether] there is {topic}{tail}."),
        *("What comes up for {topic}{tail}?", "Look around for [a |some |]{topic}{tail}."),
        *("I can't find [a|any|the] {topic}{tail}. Can you?", "Let me see {topic}{tail}."),
    ),
    "create": (
        *("I [need|want|would like] a new {topic}{tail}.", "There should be a [new |]{topic}{tail}."),
        *("[A new|One more|Another] {topic}{tail}, please.", "[Put together|Draw up|Produce] a {topic}{tail}."),
        *("[Can|Could|May] I have a new {topic}{tail}?", "We don't have a {topic}{tail} yet, so make one."),
        *("New {topic}{tail}.", "Please [see to|take care of] a new {topic}{tail}.", "A {topic}{tail} is needed."),
        *("Let there be a {topic}{tail}.", "I am missing a {topic}{tail}; [add|create] it."),
        *("How about a new {topic}{tail}? Go ahead.", "Start a new {topic}{tail}."),
    ),
    "book": (
        *("I [need|want|would like] [a|the] {topic}{tail} [booked|reserved].", "[Get|Secure|Find] me a {topic}{tail}."),
        *("Put me down for the {topic}{tail}.", "[Can|Could|May] I [book|reserve|get] the {topic}{tail}?"),
        *(
            "I [would like|want] to make a booking: {topic}{tail}.",
            "One {topic}{tail}, please, [booked|reserved] for me.",
        ),
        *("Make a [booking|reservation] for the {topic}{tail}.", "Is the {topic}{tail} free? If so, book it."),
        *("A reservation for the {topic}{tail}, please.", "We need the {topic}{tail} reserved."),
        *("Please [take care of|see to] the booking of the {topic}{tail}.", "Sign me up for the {topic}{tail}."),
    ),
    "update": (
        *("I [need|want|would like] the {topic}{tail} [changed|updated].", "The {topic}{tail} [needs|has] to change."),
        *("Make a change to the {topic}{tail}.", "The {topic}{tail} is out of date. Please update it."),
        *("Please [apply|make] an update to the {topic}{tail}.", "[Can|Could] the {topic}{tail} be changed?"),
        *("The {topic}{tail} isn't right. Change it, please.", "Bring the {topic}{tail} up to date."),
        *("There's an update for the {topic}{tail}.", "The {topic}{tail} should be [updated|changed]."),
        *("Have the {topic}{tail} updated.", "I have new data for the {topic}{tail}. Please update it."),
    ),
    "delete": (
        *(
            "I [need|want|would like] the {topic}{tail} [deleted|removed|gone].",
            "[Get rid of|Erase] the {topic}{tail}.",
        ),
        *(
            "I [don't need|no longer need|don't want] the {topic}{tail}. Delete it.",
            "The {topic}{tail} [has to|must|can] go.",
        ),
        *("[Can|Could] the {topic}{tail} be [deleted|removed]?", "Throw out the {topic}{tail}."),
        *(
            "The {topic}{tail} is no longer needed, so remove it.",
            "Please [take|have] the {topic}{tail} [out|removed].",
        ),
        *("No more {topic}{tail}, please: remove it.", "Make the {topic}{tail} go away.", "Wipe the {topic}{tail}."),
        *("The {topic}{tail} should be deleted.", "Do away with the {topic}{tail}."),
    ),
    "send": (
        *("I [need|want|would like] the {topic}{tail} [sent|delivered].", "The {topic}{tail} [has|needs] to be sent."),
        *(
            "Get the {topic}{tail} [out|off|on its way].",
            "[Can|Could] the {topic}{tail} be sent?",
            "Pass on the {topic}{tail}.",
        ),
        *("Please have the {topic}{tail} sent.", "I promised to send the {topic}{tail}. Do it for me."),
        *("The {topic}{tail} should go out.", "Please [see|make sure] that the {topic}{tail} goes out."),
        *("It's time for the {topic}{tail} to be sent.", "Off with the {topic}{tail}: send it."),
    ),
    "convert": (
        *("I [need|want|would like] the {topic}{tail} converted.", "What is the {topic}{tail}, once converted?"),
        *("The {topic}{tail} [has|needs] to be converted.", "[Can|Could] the {topic}{tail} be converted?"),
        *("Please do a conversion of the {topic}{tail}.", "How does the {topic}{tail} convert?"),
        *("I have to have the {topic}{tail} in another form.", "A conversion of the {topic}{tail}, please."),
        *("What does the {topic}{tail} become when you convert it?", "Run the {topic}{tail} conversion."),
    ),
    "analyze": (
        *("I [need|want|would like] an analysis of the {topic}{tail}.", "What do you make of the {topic}{tail}?"),
        *("[Take a look at|Look into|Have a look at] the {topic}{tail}.", "What does the {topic}{tail} look like?"),
        *("The {topic}{tail} [has|needs] to be analyzed.", "[Can|Could] the {topic}{tail} be analyzed?"),
        *("Run an analysis of the {topic}{tail}.", "How [is|good is] the {topic}{tail}?", "Assess the {topic}{tail}."),
        *("An analysis of the {topic}{tail}, please.", "What can be said about the {topic}{tail}?"),
        *("I [don't understand|can't judge] the {topic}{tail}. Analyze it.", "Go over the {topic}{tail}."),
    ),
    "play": (
        *("I [need|want|would like] the {topic}{tail} [on|running].", "[Get|Set] the {topic}{tail} going."),
        *("I [feel like|am in the mood for] the {topic}{tail}.", "Put on the {topic}{tail}."),
        *("[Can|Could] the {topic}{tail} be started?", "Let the {topic}{tail} [begin|start|run]."),
        *(
            "The {topic}{tail}, please, start it.",
            "Time for the {topic}{tail}: start it.",
            "Have the {topic}{tail} running.",
        ),
        *("The {topic}{tail} should be [on|running].", "[Kick off|Fire up] the {topic}{tail}."),
    ),
}
"""Whole sentences for each verb of a function's name, most without that verb; `tail` has the arguments."""

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
    opening = "" if opening in SPEAKER and verb in FOR_ME else opening
    if phrases:
        phrases[0] = phrases[0].removeprefix("and ")
    joint = draw.choice((" ", " ", " ", ", ", " and "))
    tail = "".join(
        (joint if index and not one.startswith(("and ", "but ", "(", ":")) else " ") + one
        for index, one in enumerate(phrases)
    )
    main = f"{opening}{verb} {article}{function.topic}{tail}{draw.choice(ENDINGS)}"
    main = main[0].upper() + main[1:]
    asks = verb in ("what is", "are there any") or opening in ASKING
    main += "?" if asks and draw.chance(0.9) else draw.choice((".", ".", ".", ""))
    if draw.chance(0.35):
        main = draw.phrase(draw.choice(FRAMES[function.verb]), topic=function.topic, tail=tail)
        main = main if draw.chance(0.2) else main[0].upper() + main[1:]
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
