"""Requests that need no tool, or only a calculation."""

from __future__ import annotations

from agentkit_evals.synth.artifacts.texts import fact
from agentkit_evals.synth.catalog import computations
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World
from agentkit_tools import BUILTINS


class Recall(Operation):
    """The answer stands in the request itself."""

    name = "recall"
    uses_world = False
    needs_tool = False
    phrasings = phrasings(
        train=(
            "{facts} What is the {subject}?",
            "{facts} [Now tell me|Tell me] the {subject}.",
            "[Here are some facts|My notes|Remember this]: {facts} What is the {subject}?",
            "What is the {subject}? {facts}",
            "{facts} [I forgot the {subject}. What was it|So what is the {subject}]?",
        ),
        held_out=("{facts} Please repeat the {subject}.", "Given that {facts} what is the {subject}?"),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        facts = [fact(draw) for _ in range(draw.between(2, 6))]
        if len({one.subject for one in facts}) < len(facts):
            return None
        chosen = draw.choice(facts)
        joint = draw.choice((" ", "\n", " "))
        lines = joint.join(
            one.line if one.line.endswith(".") else f"{one.line}." if joint == " " else one.line for one in facts
        )
        return Draft(
            instruction=draw.phrase(phrasing.text, facts=lines, subject=chosen.subject),
            steps=[lambda results: Act(f"The {chosen.subject} is {chosen.value}.", content=chosen.value)],
            answer=chosen.value,
            about=[str(len(facts))],
            tools=_tools(draw),
        )


class Repeat(Operation):
    """Say a text, or pick one from the request."""

    name = "repeat"
    uses_world = False
    needs_tool = False
    phrasings = (
        *phrasings(
            "say",
            train=(
                "Say {text}.",
                "Repeat: {text}",
                "[Answer with|Reply with|Write] {text}.",
                "[Please say|Just say|Only say] {text}.",
                "Echo {text}.",
            ),
            held_out=("Respond with {text} and nothing else.",),
        ),
        *phrasings(
            "first",
            train=(
                "What is the first [word|item|name] of {items}?",
                "Which [word|item] comes first: {items}?",
                "{items}: which one is first?",
            ),
            held_out=("Name the first of these: {items}.",),
        ),
        *phrasings(
            "last",
            train=(
                "What is the last [word|item|name] of {items}?",
                "Which [word|item] comes last: {items}?",
                "{items}: which one is last?",
            ),
            held_out=("Name the last of these: {items}.",),
        ),
        *phrasings(
            "upper",
            train=("[Write|Put] {text} in [capitals|capital letters|upper case].", "What is {text} in upper case?"),
            held_out=("{text} in capital letters, please.",),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        words = [draw.word() for _ in range(draw.between(1, 4))]
        text = draw.choice((" ".join(words), draw.value(), draw.words_value()))
        if phrasing.kind == "upper":
            text = draw.word()
        items = [draw.choice((draw.word, draw.value))() for _ in range(draw.between(2, 5))]
        answer = {"say": text, "first": items[0], "last": items[-1], "upper": text.upper()}[phrasing.kind]
        shown = draw.choice((f'"{text}"', f"`{text}`", text, text))
        return Draft(
            instruction=draw.phrase(phrasing.text, text=shown, items=", ".join(items)),
            steps=[lambda results: Act("I answer.", content=answer)],
            answer=answer,
            about=[str(len(items))],
            tools=_tools(draw),
        )


SMALL_TALK: dict[str, str] = {
    "[Hi|Hello|Hey|Good morning|Hi there|Hello there][|!|.]": "Hello! What can I do for you?",
    "[Thanks|Thank you|Great, thanks|Thank you very much][|!|.]": "You are welcome.",
    "[Who are you|What are you|What is your name]?": "I am agentkit, an agent that works with tools.",
    "[What can you do|How can you help me|What are you good for]?": "I read files, run commands and call tools.",
    "[Bye|Goodbye|See you][|!|.]": "Goodbye.",
    "How are you[| today]?": "I am fine. What can I do for you?",
}


class SmallTalk(Operation):
    """Greetings, thanks, and who the agent is."""

    name = "small_talk"
    uses_world = False
    needs_tool = False
    phrasings = tuple(Phrasing(text, kind=answer) for text, answer in SMALL_TALK.items())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        return Draft(
            instruction=draw.phrase(phrasing.text),
            steps=[lambda results: Act("No tool is needed.", content=phrasing.kind)],
            answer=phrasing.kind.split(".")[0].split("!")[0],
            tools=_tools(draw),
        )


class Compute(Operation):
    """A calculation with numbers of the request, done in Python."""

    name = "compute"
    uses_world = False
    phrasings = (
        *phrasings(
            "{a} + {b}",
            train=(
                "What is {a} [+|plus] {b}?",
                "[Add|Sum] {a} and {b}.",
                "How much is {a} and {b} [together|in total]?",
                "I had {a} {noun}s and got {b} more. How many are there now?",
            ),
            held_out=("{a} and {b} make how many?",),
        ),
        *phrasings(
            "{a} - {b}",
            train=(
                "What is {a} [-|minus] {b}?",
                "Subtract {b} from {a}.",
                "I had {a} {noun}s and sold {b}. How many are left?",
                "How much more is {a} than {b}?",
            ),
            held_out=("Take {b} away from {a}.",),
        ),
        *phrasings(
            "{a} * {b}",
            train=(
                "What is {a} [*|times|x|multiplied by] {b}?",
                "Multiply {a} by {b}.",
                "{a} {noun}s cost {b} [dollars|euros] each. [What is the total|How much is that]?",
            ),
            held_out=("There are {a} boxes with {b} {noun}s each. How many {noun}s are there?",),
        ),
        *phrasings(
            "{a} // {b}",
            train=(
                "What is {a} // {b}?",
                "How often does {b} fit into {a}?",
                "{a} {noun}s are shared by {b} people. How many whole {noun}s does each get?",
            ),
            held_out=("How many full groups of {b} can be made of {a}?",),
        ),
        *phrasings(
            "{a} % {b}",
            train=(
                "What is {a} % {b}?",
                "What is the [rest|remainder] of {a} divided by {b}?",
                "{a} {noun}s are packed in boxes of {b}. How many are left over?",
            ),
            held_out=("What remains of {a} after division by {b}?",),
        ),
        *phrasings(
            "{a} ** 2",
            train=("What is {a} squared?", "What is the square of {a}?", "[Calculate|Compute] {a} to the power of 2."),
            held_out=("Square {a}.",),
        ),
        *phrasings(
            "{a} * {p} / 100",
            train=(
                "What is {p}% of {a}?",
                "[Calculate|Compute] {p} percent of {a}.",
                "How much is {p} % of {a}?",
                "The {noun} costs {a} dollars. What is a tip of {p}%?",
            ),
            held_out=("Of {a} people {p} percent came. How many came?",),
        ),
        *phrasings(
            "sum([{list}])",
            train=("[Add up|Sum|Sum up] {list}.", "What is the [sum|total] of {list}?", "What do {list} add up to?"),
            held_out=("Total of {list}, please.",),
        ),
        *phrasings(
            "max([{list}])",
            train=("[What is|Which is|Find] the [largest|biggest|greatest|maximum] of {list}[?|]",),
            held_out=("Which number is the largest: {list}?",),
        ),
        *phrasings(
            "sum([{list}]) / {count}",
            train=("What is the [average|mean] of {list}?", "[Calculate|Compute] the average of {list}."),
            held_out=("On average, how much are {list}?",),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        a, b, p = (draw.between(2, draw.choice((20, 999, 9999))) for _ in range(3))
        if "//" in phrasing.kind or " % " in phrasing.kind:
            b = draw.between(2, 30)
        numbers = [draw.between(1, draw.choice((10, 100))) for _ in range(draw.between(2, 6))]
        slots = {
            "a": a,
            "b": b,
            "p": p % 100 + 1,
            "list": ", ".join(map(str, numbers)),
            "count": len(numbers),
            "noun": draw.noun(),
        }
        draw.names.update(map(str, (a, b)))
        expression = phrasing.kind.format_map(slots)
        result = str(eval(expression))  # trusted: the phrasings' kinds only
        return Draft(
            instruction=draw.phrase(phrasing.text, **slots),
            steps=[
                lambda results: Act(f"I compute {expression}.", [("python", {"code": f"print({expression})"})]),
                lambda results: submit(f"It is {results[0].strip()}.", results[0].strip()),
            ],
            answer=result,
            about=[phrasing.kind],
        )


class ComputeKnown(Operation):
    """A computation of the catalog with values of the request, done in Python."""

    name = "compute_known"
    uses_world = False
    phrasings = phrasings(train=("{request}",), held_out=())

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        known = draw.choice(computations())
        request = known.request(draw)
        script, result = known.solve(request.arguments)
        return Draft(
            instruction=request.text,
            steps=[
                lambda results: Act(f"I compute {script.splitlines()[-1][6:-1]}.", [("python", {"code": script})]),
                lambda results: submit(f"It is {results[0].strip()}.", results[0].strip()),
            ],
            answer=result,
            about=[known.expression],
        )


def _tools(draw: Draw) -> tuple[str, ...]:
    return tuple(BUILTINS) if draw.chance(0.85) else ()
