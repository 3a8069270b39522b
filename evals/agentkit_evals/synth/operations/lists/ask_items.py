"""Questions about the items of a list."""

from __future__ import annotations

from agentkit_evals.synth.answers import names_are
from agentkit_evals.synth.artifacts.items import ItemList, draw_items
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.lists.code import BOXES, ListOperation, chosen, has_state, noun, show
from agentkit_evals.synth.operations.steps import look_and_run, run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import fixed, quote
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class ListItems(ListOperation):
    """The items of a list: all, the open ones or the done ones."""

    name = "list_items"
    phrasings = (
        *phrasings(
            "all",
            train=(
                "[Which|What] {noun} are [there |]in {path}?",
                "[Which|What] {noun} does {path} [list|contain|have]?",
                "[List|Show me|Give me|Tell me|Read me] [all |]the {noun} in {path}.",
                "What is on [the|my] list in {path}?",
                "[Read|Open] {path} and [list|tell me] the {noun}.",
                "[Submit|Return|Report] all {noun} of {path}, without [the |]numbers or marks.",
            ),
            held_out=(
                "Which {noun} did I put on the list in {path}?",
                "I'd like to hear all {noun} that are in {path}.",
            ),
        ),
        *phrasings(
            "open",
            train=(
                "[Which|What] {noun} are [still open|not done yet|unfinished|left] in {path}?",
                "[List|Show me|Give me|Tell me] the [open|unfinished|unchecked|remaining] {noun} in {path}.",
                "What is [still |]left to do in {path}?",
                "What do I [still have|have] to do? [See|It's in|Check] {path}.",
                "In {path}, which {noun} [are not checked off|have no x|remain]?",
                "[Go through|Check|Read] {path} and list [everything|what] that is not done.",
                "{path}: which {noun} are open?",
                "open {noun} in {path}?",
            ),
            held_out=(
                "Which {noun} in {path} are still waiting?",
                "What remains to be done according to {path}?",
                "Find everything in {path} that I haven't ticked off.",
            ),
        ),
        *phrasings(
            "done",
            train=(
                "[Which|What] {noun} are [done|finished|completed|checked off] in {path}?",
                "[List|Show me|Give me|Tell me] the [done|finished|completed|checked] {noun} in {path}.",
                "What [is|have we] [already |]done, according to {path}?",
                "In {path}, which {noun} [are checked|have an x|did we finish]?",
                "{path}: which {noun} are [already |]done?",
                "What did I [finish|complete|get done]? [See|Look at|Check] {path}.",
            ),
            held_out=(
                "Which {noun} from {path} are behind me?",
                "What has been ticked off in {path}?",
            ),
        ),
    )

    def new(self, draw: Draw, kind: str) -> ItemList:
        return draw_items(draw, todo=kind != "all")

    def fits(self, made: ItemList, kind: str) -> bool:
        return len(chosen(made, kind)) in range(1, 9) and (kind == "all" or has_state(made, kind))

    def draft_over(self, made: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        names = [item.text for item in chosen(made, kind)]
        others = [item.text for item in made.items if item.text not in names]
        request = ask(draw, phrasing, "list", path=mention(draw, made.path), noun=noun(draw, made))
        command = show(made)
        if kind != "all":
            command = rf"sed -n 's/^- \{BOXES[kind][:-1]}\] //p' {quote(made.path)}"
        if request.layout == "commas":
            command += " | paste -sd, | sed 's/,/, /g'"
        return Draft(
            instruction=request.text,
            steps=look_and_run(
                made.path, f"I print the {'' if kind == 'all' else kind + ' '}items.", command, "These are the items."
            ),
            about=[made.shape],
            difficulty=2,
            **names_are(names, others=others, layout=request.layout),
        )


class NthItem(ListOperation):
    """The first, last or third item of a list."""

    name = "nth_item"
    phrasings = phrasings(
        train=(
            "What is the {nth} [item|entry] in {path}?",
            "[What|Which] is the {nth} of the {noun} in {path}?",
            "[Tell me|Give me|Read me|I need] the {nth} [item|entry|line] of the list in {path}.",
            "Which [item|entry] comes {nth} in {path}?",
            "{path}: {nth} [item|entry]?",
            "[Submit|Return|Report] the {nth} [item|entry] of {path}.",
            "What does the {nth} [item|entry] of {path} say?",
            "[Open|Read|Check] {path} and [tell me|submit] the {nth} item.",
            "In {path}, what [stands|is] {nth} on the list?",
            "the {nth} of the {noun} in {path}, please",
            "[Could you|Can you] read me the {nth} item of {path}?",
            "I want [to know |]the {nth} [item|entry] on my list, {path}.",
        ),
        held_out=(
            "What did I write as the {nth} entry of {path}?",
            "Of all {noun} in {path}, which one is {nth}?",
            "Look into {path}: which of the {noun} is the {nth}?",
        ),
    )

    def draft_over(self, made: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        orders = {"first": 0, "last": len(made.items) - 1, "second": 1, "third": 2, "fourth": 3, "fifth": 4}
        nth, at = draw.choice([pair for pair in orders.items() if 0 <= pair[1] < len(made.items)])
        part = "tail -n 1" if nth == "last" else f"sed -n {at + 1}p"
        command = f"{part} {quote(made.path)}" if made.format == "plain" else f"{show(made)} | {part}"
        texts = [item.text for item in made.items]
        request = ask(draw, phrasing, "value", path=mention(draw, made.path), noun=made.noun, nth=nth)
        return Draft(
            instruction=request.text,
            steps=look_and_run(made.path, f"I print the {nth} item.", command, "That is the item."),
            about=[made.shape],
            difficulty=2,
            **names_are([texts[at]], others=texts[:at] + texts[at + 1 :], layout=request.layout),
        )


class HasItem(ListOperation):
    """Say yes or no to the question if a list has an item."""

    name = "has_item"
    phrasings = phrasings(
        train=(
            "Is {item} [on the list |]in {path}?",
            "Does {path} [contain|list|include|mention|have] {item}?",
            "Is {item} [listed|included|mentioned] in {path}?[ Yes or no?|]",
            "[Check|See|Look] [if|whether] {item} is in {path}.",
            "[Can you check|Could you see|Do you know] if {item} is [on|in] the list {path}?",
            "Did I [put|write|note] {item} [in|into] {path}?",
            "{item} in {path}, yes or no?",
            "[Tell me|I need to know] whether {path} [has|includes] {item}. [Answer yes or no.|Yes or no.|]",
            "Is there {item} among the {noun} in {path}?",
            "Is {item} one of the {noun} in {path}?",
            "Have I already got {item} in {path}?",
            "{path}: is {item} there?",
        ),
        held_out=(
            "Can {item} be found in {path}? Yes or no.",
            "Have we listed {item} in {path}?",
            "Yes or no: {path} includes {item}.",
        ),
    )

    def draft_over(self, made: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        there = draw.chance(0.5)
        text = draw.named(draw.choice(made.items).text) if there else made.another(draw)
        if (text in made.text) != there:
            return None
        command = f"grep {fixed(text)} {quote(made.path)}"
        return Draft(
            instruction=ask(
                draw, phrasing, "done", path=mention(draw, made.path), item=mention_value(draw, text), noun=made.noun
            ).text,
            steps=[
                lambda results: Act(f"I look for {text} in `{made.path}`.", [run(command)]),
                lambda results: submit(f"It is {'there' if there else 'not there'}.", "yes" if there else "no"),
            ],
            about=[made.shape, str(there)],
            difficulty=1,
            **names_are(["yes" if there else "no"], others=["no" if there else "yes"]),
        )
