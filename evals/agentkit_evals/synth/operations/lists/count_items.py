"""Count the items of a list, or those of one state."""

from __future__ import annotations

from agentkit_evals.synth.answers import number_is
from agentkit_evals.synth.artifacts.items import ItemList, draw_items
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.lists.code import BOXES, MARKS, ListOperation, has_state, noun
from agentkit_evals.synth.operations.steps import look_and_run
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import quote
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class CountItems(ListOperation):
    """The number of items, of open ones or of done ones."""

    name = "count_items"
    phrasings = (
        *phrasings(
            "all",
            train=(
                "How many {noun} are [there |]in {path}?",
                "How many {noun} does {path} [have|list|contain]?",
                "Count [the|all] {noun} in {path}.",
                "[Number|Count] of {noun} in {path}?",
                "[Tell me|I need|Give me|Submit] the number of {noun} in {path}.",
                "How long is the list in {path}? [I mean how many {noun} it has.|Count the {noun}.]",
                "{path}: how many {noun}?",
                "how many {noun} in {path}",
                "[Open|Check|Look at|Read] {path} and [count|tell me how many] {noun}[ there are|].",
                "How many {noun} are on [the|my] list[ in|:] {path}?",
            ),
            held_out=(
                "What is the length of the list in {path}, in {noun}?",
                "I have a list in {path}. How many {noun} are on it?",
                "Please do a quick count of the {noun} {path} holds.",
            ),
        ),
        *phrasings(
            "open",
            train=(
                "How many {noun} are [still open|not done yet|unfinished|left|unchecked] in {path}?",
                "How many open {noun} [are in|does] {path}[ have|]?",
                "Count the [open|unchecked|unfinished|remaining] {noun} in {path}.",
                "[Number of|How many] [open|unfinished|remaining] {noun} in {path}?",
                "In {path}, how many {noun} [are not checked off|are still to do|remain]?",
                "[Tell me|I need|Find out] how many {noun} in {path} are [still open|not done].",
                "How much is left to do in {path}? [Count|Just count] the open {noun}.",
                "{path}: how many [boxes are empty|{noun} are open]?",
            ),
            held_out=(
                "How many {noun} do I still have to do, according to {path}?",
                "Of the {noun} in {path}, how many have an empty box?",
            ),
        ),
        *phrasings(
            "done",
            train=(
                "How many {noun} are [done|finished|completed|checked off|ticked] in {path}?",
                "How many [done|finished|completed] {noun} [are in|does] {path}[ have|]?",
                "Count the [done|finished|completed|checked] {noun} in {path}.",
                "[Number of|How many] [completed|finished|checked] {noun} in {path}?",
                "In {path}, how many {noun} [are checked off|have an x|did we finish]?",
                "[Tell me|I need] the number of {noun} in {path} that are [done|finished].",
                "{path}: how many {noun} are done [already|so far]?",
            ),
            held_out=(
                "How many {noun} of {path} have I finished so far?",
                "How many boxes are ticked in {path}?",
            ),
        ),
    )

    def new(self, draw: Draw, kind: str) -> ItemList:
        return draw_items(draw, todo=kind != "all")

    def fits(self, made: ItemList, kind: str) -> bool:
        return kind == "all" or has_state(made, kind)

    def draft_over(self, made: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        if kind == "all":
            count, pattern = len(made.items), MARKS[made.format]
        else:
            count = sum(item.done == (kind == "done") for item in made.items)
            pattern = rf"^- \{BOXES[kind][:-1]}\]"
        command = f"grep -c '{pattern}' {quote(made.path)}"
        request = ask(draw, phrasing, "number", path=mention(draw, made.path), noun=noun(draw, made))
        return Draft(
            instruction=request.text,
            steps=look_and_run(made.path, f"I count the lines with `{pattern}`.", command, "That is the number."),
            about=[made.shape],
            difficulty=2,
            **number_is(count, layout=request.layout, ignored=[made.path]),
        )
