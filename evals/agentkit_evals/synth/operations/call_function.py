"""Call functions that are defined only in the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentkit_evals.synth.catalog import KnownFunction, functions_by_domain
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.functions import DrawnFunction, draw_function, request
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.parameters import Parameters, series
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import print_answer
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World
from agentkit_tools import BUILTINS

SYSTEMS: dict[str | None, float] = {None: 5, "": 4, "You are a helpful assistant.": 1}
JOINTS = (" Also ", " Then ", " And ", " After that, ", " ")
REFUSALS = (
    "None of the tools can do this.",
    "There is no tool for this.",
    "I cannot do this with the tools that I have.",
)


class CallFunction(Operation):
    """One request for one function, among up to three others."""

    name = "call_function"
    uses_world = False
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        parameters = Parameters(draw)
        function = draw_function(draw, parameters)
        text, arguments = request(draw, function)
        return _draft(draw, text, [(function, arguments)], other_functions(draw, function))


class CallTwice(Operation):
    """Two requests in one, for one function or two, called in one turn."""

    name = "call_twice"
    uses_world = False
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        first = draw_function(draw, Parameters(draw), count=draw.between(1, 3))
        second = draw_function(draw, Parameters(draw), count=draw.between(1, 3))
        calls = []
        texts = []
        for function in (first, second):
            text, arguments = request(draw, function)
            texts.append(text)
            calls.append((function, arguments))
        joint = draw.choice(JOINTS)
        if joint != " ":
            texts[1] = texts[1][0].lower() + texts[1][1:] if not texts[1].startswith("I ") else texts[1]
        return _draft(draw, texts[0] + joint + texts[1], calls, other_functions(draw, first)[:1])


class NoFunction(Operation):
    """A request that no function fits."""

    name = "no_function"
    uses_world = False
    needs_tool = False
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        asked = draw_function(draw, Parameters(draw))
        text, _ = request(draw, asked)
        offered = [draw_function(draw, Parameters(draw)) for _ in range(draw.between(1, 3))]
        return _refusal(draw, text, f"No tool is about {asked.topic}.", offered)


class CallKnownFunction(Operation):
    """One request for one function of the catalog, among up to four others."""

    name = "call_known_function"
    uses_world = False
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        domain = draw.choice([*functions_by_domain()])
        known = draw.choice(functions_by_domain()[domain])
        function = known.draw(draw)
        request = known.call(draw, function)
        others = _other_known(draw, domain, draw.weighted({0: 4, 1: 3, 2: 3, 3: 1, 4: 1}), known)
        return _draft(draw, request.text, [(function, request.arguments)], others)


class CallKnownTwice(Operation):
    """Two requests in one for functions of the catalog, or one request with two or three values of a parameter."""

    name = "call_known_twice"
    uses_world = False
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        domain = draw.choice([*functions_by_domain()])
        known = draw.choice(functions_by_domain()[domain])
        function = known.draw(draw)
        if draw.chance(0.5) and (found := known.call_each(draw, function)):
            text, each = found
            others = _other_known(draw, domain, draw.between(0, 2), known)
            return _draft(draw, text, [(function, arguments) for arguments in each], others)
        other = known if draw.chance(0.5) else draw.choice(functions_by_domain()[domain])
        other_function = function if other is known else other.draw(draw)
        first, second = known.call(draw, function), other.call(draw, other_function)
        if function is other_function and first.arguments == second.arguments:
            return None
        joint = draw.choice((*JOINTS, "\n", " Another one: "))
        joint = joint if first.text[-1] in ".?!" or joint == "\n" else f".{joint}"
        calls = [(function, first.arguments), (other_function, second.arguments)]
        others = _other_known(draw, domain, draw.between(0, 2), known, other)
        return _draft(draw, first.text + joint + second.text, calls, others)


class NoKnownFunction(Operation):
    """A request for a function of the catalog that is not among those offered."""

    name = "no_known_function"
    uses_world = False
    needs_tool = False
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        domain, other = draw.some([*functions_by_domain()], 2)
        missing = draw.choice(functions_by_domain()[domain])
        offered = _other_known(draw, domain if draw.chance(0.25) else other, draw.between(1, 3), missing)
        return _refusal(draw, missing.request(draw).text, "None of the tools is for this.", offered)


def _other_known(draw: Draw, domain: str, count: int, *needed: KnownFunction) -> list[DrawnFunction]:
    """Draw different functions of a domain of the catalog, none of those needed."""
    known = [one for one in functions_by_domain()[domain] if one not in needed]
    return [one.draw(draw) for one in draw.some(known, min(count, len(known)))]


def other_functions(draw: Draw, function: DrawnFunction) -> list[DrawnFunction]:
    """Draw functions that the request does not need, with other names."""
    count = draw.weighted({0: 5, 1: 3, 2: 2, 3: 1})
    found = [draw_function(draw, Parameters(draw)) for _ in range(count)]
    return [other for other in found if other.name != function.name]


def call(calls: Sequence[tuple[DrawnFunction, Mapping[str, Any]]]) -> Act:
    """Return the turn that calls functions with these arguments."""
    stated = "; ".join(
        f"`{function.name}` with {series([f'{name} = {value}' for name, value in arguments.items()])}"
        if arguments
        else f"`{function.name}`"
        for function, arguments in calls
    )
    return Act(f"I call {stated}.", [(function.name, dict(arguments)) for function, arguments in calls])


def _refusal(draw: Draw, text: str, thought: str, offered: Sequence[DrawnFunction]) -> Draft:
    answer = draw.choice(REFUSALS)
    return Draft(
        instruction=text,
        steps=[lambda results: Act(thought, content=answer)],
        verifier='printf %s "$AGENTKIT_ANSWER" | grep -Eqi "no tool|none of the|cannot|not able|unable|can.t"',
        solution=print_answer(answer),
        tools=[function.tool for function in offered],
        about=[function.name for function in offered],
        system=draw.weighted(SYSTEMS),
    )


def _draft(
    draw: Draw, text: str, calls: list[tuple[DrawnFunction, dict[str, Any]]], others: list[DrawnFunction]
) -> Draft | None:
    functions = list({id(function): function for function, _ in calls}.values())
    if len({function.name for function in [*functions, *others]}) < len(functions) + len(others):
        return None
    tools: list[str | Mapping[str, Any]] = [
        function.tool for function in draw.some([*functions, *others], len(functions) + len(others))
    ]
    where = draw.rng.random()
    if where < 0.1:
        tools = [*BUILTINS, *tools]
    elif where < 0.25:
        tools.append("submit")
    results = [function.result(arguments) for function, arguments in calls]

    def tell(texts: list[str]) -> Act:
        answer = "\n".join(texts)
        return (
            submit("I submit the result.", answer) if "submit" in tools else Act("I give the result.", content=answer)
        )

    return Draft(
        instruction=text,
        steps=[
            lambda texts: call(calls),
            tell,
        ],
        answer="\n".join(results),
        tools=tools,
        about=[function.description for function in functions],
        system=draw.weighted(SYSTEMS),
        difficulty=len(calls) + len(others),
    )
