"""Answers as JSON with a given schema, from what a function returns, a file or the request states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from agentkit_evals.synth.answers import json_is
from agentkit_evals.synth.artifacts.texts import filler
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import is_free
from agentkit_evals.synth.functions import draw_function, request
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.call_function import SYSTEMS, call, other_functions
from agentkit_evals.synth.operations.steps import always
from agentkit_evals.synth.oracle import Act
from agentkit_evals.synth.parameters import Parameter, Parameters, series, spoken
from agentkit_evals.synth.phrasing import Phrasing, phrasings, sentence
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World
from agentkit_tools import BUILTINS

NO_SUBMIT = tuple(name for name in BUILTINS if name != "submit")  # the answer is the text of the last turn


class JsonFromFunction(Operation):
    """The answer is in what a function returns, a text or JSON."""

    name = "json_from_function"
    uses_world = False
    phrasings = phrasings(
        train=(
            "{request}",
            "{request} [Answer|Reply|Respond] [in|as|with] JSON[, please|].",
            "{request} [Give me|Return|Report] the [answer|result|outcome] as [JSON|a JSON object].",
            "[Answer|Reply] in JSON: {request}",
            "{request} I [only |]need {items}.",
            "{request} [Tell me|Report|Return] {items}.",
            "{request} [The answer should have|I want to know] {items}.",
        ),
        held_out=(
            "{request} Put {items} into [a JSON object|JSON].",
            "{request} [Use the schema for your answer|Your answer must fit the schema].",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        function = draw_function(draw, Parameters(draw), count=draw.between(1, 3))
        asked, arguments = request(draw, function)
        wanted, others = _facts(draw)
        function = function.returning(_stated(draw, [*wanted, *others], from_program=True), arguments)
        functions = [function, *other_functions(draw, function)]
        return _draft(
            draw,
            wanted,
            instruction=draw.phrase(phrasing.text, request=sentence(asked), items=_named(wanted)),
            first=[call([(function, arguments)])],
            tools=[
                *(NO_SUBMIT if draw.chance(0.15) else ()),
                *(each.tool for each in draw.some(functions, len(functions))),
            ],
            about=[function.description],
            difficulty=1 + len(functions),
        )


class JsonFromFile(Operation):
    """The answer is in a file of the world."""

    name = "json_from_file"
    phrasings = phrasings(
        train=(
            "[Find|Look up|Get] {items} in {path}.",
            "[Read|Open] {path} and [give me|return|report] {items}.",
            "What does {path} say about {items}?",
            "[Read|Open|Take] {path} and answer [in|as] JSON: {items}.",
            "I need {items} from {path}[, as JSON|].",
            "[Turn|Convert] {path} into [JSON|a JSON object] with {items}.",
            "{path} has {items}. [Return|Submit|Give me] [them|that] as JSON.",
            "[Fill in|Complete] the [form|schema] from {path}.",
        ),
        held_out=(
            "Pull {items} out of {path}.",
            "{path} has what you need for the answer: {items}.",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        path = draw.path(draw.choice(("txt", "md", "txt", "log", "notes")))
        if not is_free(path, world):
            return None
        wanted, others = _facts(draw)
        lines = [
            _stated(draw, [*wanted, *others], from_program=False),
            *(filler(draw) for _ in range(draw.between(0, 4))),
        ]
        return _draft(
            draw,
            wanted,
            instruction=draw.phrase(phrasing.text, path=mention(draw, path), items=_named(wanted)),
            first=[Act(f"I read `{path}`.", [("read_file", {"path": path})])],
            tools=NO_SUBMIT,
            files={path: "".join(f"{line}\n" for line in draw.some(lines, len(lines)))},
            difficulty=2,
        )


class JsonFromRequest(Operation):
    """The answer is in the request itself."""

    name = "json_from_request"
    uses_world = False
    needs_tool = False
    phrasings = phrasings(
        train=(
            "{facts} [Return|Give me|Report] {items}.",
            "[Extract|Get|Find] {items} from this text: {facts}",
            "{facts} [Answer|Reply] [in|as] JSON with {items}.",
            "[Turn|Convert] this into JSON: {facts}",
            "[Here are some facts|My notes|From a form]: {facts} [Write|Put] them [as|into] JSON.",
            "What are {items}? {facts}",
            "Fill in the schema. {facts}",
        ),
        held_out=("{facts} Please structure this as JSON.", "Parse this for {items}: {facts}"),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        wanted, others = _facts(draw)
        facts = sentence(_stated(draw, [*wanted, *others], from_program=False))
        return _draft(
            draw,
            wanted,
            instruction=draw.phrase(phrasing.text, facts=facts, items=_named(wanted)),
            tools=NO_SUBMIT if draw.chance(0.5) else (),
        )


def _facts(draw: Draw) -> tuple[list[Parameter], list[Parameter]]:
    """Draw one to four facts that the answer has, and up to two that it does not have."""
    parameters = Parameters(draw)
    count, more = draw.weighted({1: 2, 2: 4, 3: 3, 4: 2}), draw.weighted({0: 5, 1: 2, 2: 1})
    drawn: dict[str, Parameter] = {}
    while len(drawn) < count + more:
        if (one := parameters.next()).schema["type"] != "object":
            drawn.setdefault(spoken(one.name), one)
    facts = list(drawn.values())
    return facts[:count], facts[count:]


def _stated(draw: Draw, facts: Sequence[Parameter], *, from_program: bool) -> str:
    """Return a text with all facts: sentences, lines or pairs.

    A program may also print JSON, or the values alone if their types tell them apart.
    """
    if draw.chance(0.5):
        facts = draw.some(facts, len(facts))
    types = ["number" if one.schema["type"] == "integer" else one.schema["type"] for one in facts]
    values_alone = from_program and len({*types}) == len(types) and not {"array", "boolean"} & {*types}
    form = draw.weighted({"sentences": 3, "lines": 2, "pairs": 2, "values": 3 * values_alone, "json": 3 * from_program})
    if form == "json":
        return json.dumps({one.name: one.argument for one in facts}, ensure_ascii=False)
    if form == "sentences":
        return " ".join(map(_sentence, facts))
    if form == "values":
        return ", ".join(map(_shown, facts))
    mark = draw.choice((": ", ": ", " = ", " "))
    pairs = [f"{spoken(one.name)}{mark}{_shown(one)}" for one in facts]
    return "\n".join(pair[0].upper() + pair[1:] for pair in pairs) if form == "lines" else "; ".join(pairs)


def _sentence(fact: Parameter) -> str:
    words = spoken(fact.name)
    if isinstance(fact.argument, bool):
        return f"{words.capitalize()}: {_shown(fact)}."
    return f"The {words} {'are' if isinstance(fact.argument, list) else 'is'} {_shown(fact)}."


def _shown(fact: Parameter) -> str:
    return ("yes" if fact.argument else "no") if isinstance(fact.argument, bool) else fact.shown


def _named(facts: Sequence[Parameter]) -> str:
    """Return the names of facts as a request mentions them."""
    return series([f"`{one.name}`" if one.schema["type"] == "boolean" else f"the {spoken(one.name)}" for one in facts])


def _schema(draw: Draw, facts: Sequence[Parameter]) -> dict[str, Any]:
    """Return the schema of an object with these facts, as people write it or as libraries generate it from a class."""
    generated = draw.chance(0.5)  # with sorted keys, and closed
    properties: dict[str, dict[str, Any]] = {}
    for one in facts:
        schema = {key: value for key, value in one.schema.items() if key != "description"}
        if draw.chance(0.3):
            schema["description"] = draw.choice((f"The {spoken(one.name)}.", spoken(one.name).capitalize()))
        if schema["type"] == "string" and "enum" not in schema and draw.chance(0.2):
            options = {one.argument, *(draw.word() for _ in range(draw.between(1, 3)))}
            schema["enum"] = draw.some(sorted(options), len(options))
        if schema["type"] == "integer" and draw.chance(0.3):
            schema |= {"minimum": draw.choice((0, 0, 1, -99)), "maximum": max(one.argument, draw.choice((10, 99, 999)))}
        properties[one.name] = dict(sorted(schema.items())) if generated else schema
    required = {"required": list(properties)}
    if generated:
        return {"properties": properties, **required, "type": "object", "additionalProperties": False}
    closed = {"additionalProperties": False} if draw.chance(0.3) else {}
    return {"type": "object", "properties": properties, **required, **closed}


def _draft(
    draw: Draw,
    facts: Sequence[Parameter],
    *,
    instruction: str,
    first: Sequence[Act] = (),
    tools: Sequence[str | Mapping[str, Any]],
    about: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    difficulty: int = 1,
) -> Draft:
    """Return a draft whose oracle takes the `first` turns and then answers with the facts."""
    answer = {one.name: one.argument for one in facts}
    end = Act(
        f"I answer with {series([f'`{name}`' for name in answer])}.", content=json.dumps(answer, ensure_ascii=False)
    )
    turns = [*first, end]
    return Draft(
        instruction=instruction,
        steps=[always(act) for act in turns],
        about=[*about, *answer],
        files=files or {},
        tools=tools,
        system=draw.weighted(SYSTEMS),
        output_schema=_schema(draw, facts),
        difficulty=difficulty,
        **json_is(answer),
    )


JSON_ANSWERS: tuple[Operation, ...] = (JsonFromFunction(), JsonFromFile(), JsonFromRequest())
