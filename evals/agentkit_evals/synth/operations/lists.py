"""Questions about lists, and changes to them: to-do lists, shopping lists, names."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agentkit_evals.synth.answers import names_are, number_is
from agentkit_evals.synth.artifacts.items import Item, ItemList, draw_items
from agentkit_evals.synth.checks import same_files
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import find, is_free, new_path
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.steps import look_and_run, run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import fixed, quote
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.wording import AnswerKind, ask
from agentkit_evals.synth.world import World

MARKS = {"plain": ".", "dash": "^- ", "star": r"^\* ", "numbered": "^[0-9]", "todo": r"^- \["}
STRIP = {"dash": "s/^- //p", "star": r"s/^\* //p", "numbered": r"s/^[0-9]*\. //p", "todo": r"s/^- \[.\] //p"}
BOXES = {"open": "[ ]", "done": "[x]"}


def show(made: ItemList) -> str:
    """Return a command that prints the items without marks."""
    return f"cat {quote(made.path)}" if made.format == "plain" else f"sed -n '{STRIP[made.format]}' {quote(made.path)}"


def noun(draw: Draw, made: ItemList) -> str:
    return made.noun if draw.chance(0.7) else draw.choice(("items", "entries", "things"))


class CountItems(Operation):
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

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        make = functools.partial(draw_items, todo=kind != "all")
        found = find(draw, world, ItemList, make, lambda made: kind == "all" or _has(made, kind))
        if found is None:
            return None
        made, files = found
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
            files=files,
            difficulty=2,
            **number_is(count, layout=request.layout, ignored=[made.path]),
        )


class ListItems(Operation):
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

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind

        def fits(made: ItemList) -> bool:
            return len(_chosen(made, kind)) in range(1, 9) and (kind == "all" or _has(made, kind))

        found = find(draw, world, ItemList, functools.partial(draw_items, todo=kind != "all"), fits)
        if found is None:
            return None
        made, files = found
        names = [item.text for item in _chosen(made, kind)]
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
            files=files,
            difficulty=2,
            **names_are(names, others=others, layout=request.layout),
        )


class NthItem(Operation):
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

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        found = find(draw, world, ItemList, draw_items)
        if found is None:
            return None
        made, files = found
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
            files=files,
            difficulty=2,
            **names_are([texts[at]], others=texts[:at] + texts[at + 1 :], layout=request.layout),
        )


class HasItem(Operation):
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

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        found = find(draw, world, ItemList, draw_items)
        if found is None:
            return None
        made, files = found
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
            files=files,
            difficulty=1,
            **names_are(["yes" if there else "no"], others=["no" if there else "yes"]),
        )


class AddItem(Operation):
    """Append an item in the style of the list."""

    name = "add_item"
    phrasings = phrasings(
        train=(
            "Add {item} to {path}.",
            "[Please add|Put|Append|Write] {item} [to|at the end of] the list in {path}.",
            "[Could you|Can you|Would you] add {item} to {path}[, please|]?",
            "{path} is missing {item}. [Add it|Please add it|Put it at the end].",
            "Add {item} [as a new item|as the last item|as another entry] [to|in] {path}.",
            "I forgot {item}; [add|append] it to {path}.",
            "One more for {path}: {item}.",
            "[Extend|Complete] {path} with {item}.",
            "[New entry|New item] for {path}: {item}",
            "In {path}, add {item} [at the end|at the bottom|as the last entry].",
            "We [also |]need {item}. [Put it on the list|Add it to the list] in {path}.",
            "[Append|Add] a line [for|with] {item} to the list {path}, [in the same style|formatted like the others].",
            "add {item} to {path}",
        ),
        held_out=(
            "{item} should be on the list {path} too.",
            "Make {item} the last entry of {path}.",
            "The list {path} needs one more entry: {item}.",
            "Don't let me forget {item}; it belongs in {path}.",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        found = find(draw, world, ItemList, draw_items)
        if found is None:
            return None
        made, files = found
        item = Item(made.another(draw))
        line = made.line(item, len(made.items) + 1)
        command = f"echo {quote(line)} >> {quote(made.path)}"
        return Draft(
            instruction=ask(
                draw, phrasing, "done", path=mention(draw, made.path), item=mention_value(draw, item.text)
            ).text,
            steps=[
                lambda results: Act("I look at the end of the list.", [run(f"tail -n 2 {quote(made.path)}")]),
                lambda results: Act(f"I append `{line}`.", [run(command)]),
                lambda results: submit("The item is added."),
            ],
            solution=command,
            about=[made.shape],
            files=files,
            difficulty=2,
            **same_files({made.path: made.written([*made.items, item])}),
        )


class RemoveItem(Operation):
    """Delete an item of a list."""

    name = "remove_item"
    phrasings = phrasings(
        train=(
            "Remove {item} from {path}.",
            "[Delete|Drop|Take|Strike] {item} from [the list in |]{path}.",
            "[Please remove|Please delete|Cross out] {item} [in|from] {path}[ completely|].",
            "[Could you|Can you] [remove|delete] {item} from {path}[, please|]?",
            "{item} is no longer needed in {path}. [Remove it|Delete it].",
            "{path} should not [have|list|contain] {item} [any more|anymore]. [Remove it|Please fix that].",
            "Take {item} off the list in {path}.",
            "We don't need {item} any more; [delete it from|remove it from] {path}.",
            "[Edit|Open] {path} and [remove|delete] {item}.",
            "In {path}, [delete|remove] [the line|the entry] {item}.",
            "remove {item} from {path}",
            "[Get rid of|Erase] {item} in {path}[ and keep the rest|].",
        ),
        held_out=(
            "{item} has to go from {path}.",
            "Leave everything in {path} but {item}; that one goes.",
            "The entry {item} in {path} is obsolete, so delete it.",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        found = find(draw, world, ItemList, draw_items, lambda made: made.format != "numbered")
        if found is None:
            return None
        made, files = found
        item = draw.choice(made.items)
        draw.named(item.text)
        if made.text.count(item.text) != 1:
            return None

        def delete(results: list[str]) -> Act:
            number = results[0].split(":")[0]
            return Act(f"I delete line {number}.", [run(f"sed -i {number}d {quote(made.path)}")])

        rest = [other for other in made.items if other is not item]
        line = 1 + made.text.splitlines().index(made.line(item))
        return Draft(
            instruction=ask(
                draw, phrasing, "done", path=mention(draw, made.path), item=mention_value(draw, item.text)
            ).text,
            steps=[
                lambda results: Act(
                    f"I look for {item.text}.", [run(f"grep -n {fixed(item.text)} {quote(made.path)}")]
                ),
                delete,
                lambda results: submit("The item is removed."),
            ],
            solution=f"sed -i {line}d {quote(made.path)}",
            about=[made.shape],
            files=files,
            difficulty=2,
            **same_files({made.path: made.written(rest)}),
        )


class CheckItem(Operation):
    """Check off a to-do item, or open it again."""

    name = "check_item"
    phrasings = (
        *phrasings(
            "done",
            train=(
                "[Mark|Check off|Tick off|Check] {item} [as done |]in {path}.",
                "{item} is [done|finished]. [Update|Check it off in|Mark it in] {path}.",
                "I [finished|did|have done] {item}; [check it off in|tick it off in|mark it as done in] {path}.",
                "In {path}, [set|mark] {item} [as done|to done|as completed].",
                "[Please tick|Tick|Check] the box of {item} in {path}.",
                "[Could you|Can you] check off {item} in {path}?",
                "[Put an x|Set the x] [for|at|in front of] {item} in {path}.",
                "{path}: {item} is done.",
            ),
            held_out=(
                "{item} has been taken care of, so please tick it in {path}.",
                "Consider {item} completed and update {path} accordingly.",
            ),
        ),
        *phrasings(
            "open",
            train=(
                "[Uncheck|Untick|Reopen] {item} in {path}.",
                "{item} is not done [yet|after all]. [Uncheck it in|Reopen it in|Fix that in] {path}.",
                "In {path}, [set|mark] {item} as [open|not done|unfinished] again.",
                "[Clear|Empty|Remove the x from] the box of {item} in {path}.",
                "[Could you|Can you] uncheck {item} in {path}[, please|]?",
                "I [have to|must] do {item} again; [uncheck|reopen] it in {path}.",
            ),
            held_out=(
                "{item} still needs work; open it again in {path}.",
                "Undo the tick at {item} in {path}.",
            ),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        make = functools.partial(draw_items, todo=True)
        found = find(draw, world, ItemList, make, lambda made: _has(made, "open" if kind == "done" else "done"))
        if found is None:
            return None
        made, files = found
        at = draw.choice([at for at, item in enumerate(made.items) if item.done != (kind == "done")])
        old, new = made.items[at], replace(made.items[at], done=kind == "done")
        draw.named(old.text)
        if made.text.count(old.text) != 1:
            return None
        edit = {"path": made.path, "old": made.line(old), "new": made.line(new)}
        expected = made.text.replace(made.line(old), made.line(new))
        return Draft(
            instruction=ask(
                draw, phrasing, "done", path=mention(draw, made.path), item=mention_value(draw, old.text)
            ).text,
            steps=[
                lambda results: Act(f"I look for {old.text}.", [run(f"grep {fixed(old.text)} {quote(made.path)}")]),
                lambda results: Act(f"I change `{edit['old']}` to `{edit['new']}`.", [("edit_file", edit)]),
                lambda results: submit("The item is changed."),
            ],
            solution=f"printf %s {quote(expected)} > {quote(made.path)}",
            about=[made.shape],
            files=files,
            difficulty=2,
            **same_files({made.path: expected}),
        )


SAME_LINES = '''\
"""Compare the lines of a file with those expected, in any order or sorted."""
import json, os, sys

with open(os.path.join(os.environ["AGENTKIT_VERIFIER_DIR"], "lines.json"), encoding="utf-8") as file:
    expected = json.load(file)
if not os.path.isfile(expected["path"]):
    sys.exit(expected["path"] + " is missing")
with open(expected["path"], encoding="utf-8") as file:
    lines = [line.strip() for line in file if line.strip()]
if sorted(lines) != sorted(expected["lines"]):
    sys.exit("the lines are not those expected")
if expected["order"]:
    keys = (str, str.casefold, lambda line: [c for c in line.casefold() if c.isalnum()])
    if not any(lines == sorted(lines, key=key, reverse=expected["order"] == "reverse") for key in keys):
        sys.exit("the lines are not sorted")
'''


def same_lines(path: str, lines: Sequence[str], order: str = "") -> dict[str, Any]:
    """Return the `verifier` and `verifier_files` of a draft after which a file has these lines.

    `order` is "" for any order, "sorted" or "reverse".
    """
    expected = json.dumps({"path": path, "lines": list(lines), "order": order}, ensure_ascii=False)
    return {
        "verifier": 'python3 "$AGENTKIT_VERIFIER_DIR/same_lines.py"',
        "verifier_files": {"same_lines.py": SAME_LINES, "lines.json": expected},
    }


class SortLines(Operation):
    """Sort a plain list, or write it without repetitions, in place or into another file."""

    name = "sort_lines"
    phrasings = (
        *phrasings(
            "sorted",
            train=(
                "Sort {path} [alphabetically|by name|in alphabetical order].",
                "[Put|Bring] the {noun} in {path} [in|into] alphabetical order.",
                "[Please sort|Sort] the lines of {path}.",
                "[Could you|Can you] sort {path} [alphabetically|from A to Z]?",
                "The {noun} in {path} should be [sorted|in alphabetical order]. [Fix it|Do that].",
                "Order the {noun} in {path} from A to Z.",
                "{path} is a mess. Sort it [alphabetically|by line].",
            ),
            held_out=("Rearrange {path} so that its {noun} run from A to Z.", "I want {path} alphabetized."),
        ),
        *phrasings(
            "sorted new",
            train=(
                "Sort {path} [alphabetically |]and [write|save] the result to {new}.",
                "[Write|Save] the {noun} of {path} in alphabetical order to {new}.",
                "[Make|Create] {new} with the {noun} of {path}, sorted [alphabetically|from A to Z].",
                "Sort the {noun} in {path}; the [result|sorted list] goes to {new}.",
                "I need a sorted copy of {path} [in|as] {new}.",
            ),
            held_out=("{new} should have the {noun} of {path} from A to Z.",),
        ),
        *phrasings(
            "reverse new",
            train=(
                "Sort {path} in reverse [alphabetical |]order and [write|save] it to {new}.",
                "[Write|Save] the {noun} of {path} from Z to A to {new}.",
                "[Make|Create] {new} with the lines of {path} [in descending order|sorted backwards].",
            ),
            held_out=("{new} should list the {noun} of {path} from Z to A.",),
        ),
        *phrasings(
            "unique new",
            train=(
                "[Remove|Drop] the duplicates from {path} and [write|save] the result to {new}.",
                "[Write|Save] {path} without [duplicates|repeated lines|repetitions] to {new}.",
                "[Make|Create] {new} with every line of {path} [just once|once].",
                "Some {noun} in {path} are there twice. [Write|Save] each one once to {new}.",
                "Deduplicate {path} into {new}.",
                "I need the [unique|distinct] lines of {path} in {new}.",
            ),
            held_out=(
                "{new} should have the {noun} of {path}, but no line twice.",
                "Clean {path} of doubles; the outcome belongs in {new}.",
            ),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        order, _, new = phrasing.kind.partition(" ")
        found = find(draw, world, ItemList, draw_items, lambda made: made.format == "plain")
        if found is None:
            return None
        made, files = found
        texts = [item.text for item in made.items]
        if texts == sorted(texts):
            return None
        if order == "unique":
            extra = [draw.choice(texts) for _ in range(draw.between(1, 4))]
            doubled = [*texts, *extra]
            draw.rng.shuffle(doubled)
            files = {made.path: "".join(f"{text}\n" for text in doubled)}
        target = new_path(draw, world, made.path, made.path.rpartition(".")[2], files) if new else made.path
        path, out = quote(made.path), quote(target)
        command = {
            "sorted": f"sort {path} > {out}" if new else f"sort -o {path} {path}",
            "reverse": f"sort -r {path} > {out}",
            "unique": f"sort -u {path} > {out}",
        }[order]
        thought = {"sorted": "sort the lines", "reverse": "sort in reverse", "unique": "write each line once"}[order]
        return Draft(
            instruction=ask(
                draw, phrasing, "done", path=mention(draw, made.path), noun=made.noun, new=mention(draw, target)
            ).text,
            steps=[
                lambda results: Act(f"I {thought}.", [run(command)]),
                lambda results: submit("The file is written."),
            ],
            solution=command,
            about=[made.shape],
            files=files,
            difficulty=1,
            **same_lines(target, texts, "" if order == "unique" else order),
        )


class CompareLists(Operation):
    """Merge two lists into a new file, or tell what they share and what only one of them has."""

    name = "compare_lists"
    phrasings = (
        *phrasings(
            "union",
            train=(
                "Merge {a} and {b} into {new}, [without duplicates|each line once|no line twice].",
                "[Combine|Join] {a} and {b} [into|in] {new} and [drop|remove] [duplicates|repeated lines].",
                "[Write|Save] all {noun} of {a} and {b} to {new}, [each only once|without repetitions].",
                "[Make|Create] {new} with [everything|all lines] from {a} and {b}, but nothing twice.",
                "I need one list {new} of the {noun} in {a} and {b}[, no duplicates|, without doubles].",
            ),
            held_out=("{new} should have every line that {a} or {b} has, just once.",),
        ),
        *phrasings(
            "both",
            train=(
                "Append {b} to {a} and [write|save] the result [to|as] {new}.",
                "[Write|Save] {a} followed by {b} to {new}.",
                "[Concatenate|Put together] {a} and {b} [into|as] {new}.",
                "[Make|Create] {new} from {a} and {b}, one after the other.",
            ),
            held_out=("{new} should be {a} and then {b}.",),
        ),
        *phrasings(
            "common",
            train=(
                "[Which|What] {noun} are in both {a} and {b}?",
                "[Which|What] {noun} do {a} and {b} have in common?",
                "[List|Find|Show me|Give me] the {noun} that are in {a} and also in {b}.",
                "Compare {a} and {b}: [which|what] lines are in both?",
                "What [is the overlap of|do I find in both] {a} and {b}?",
                "[Find|Tell me] the common {noun} of {a} and {b}.",
            ),
            held_out=("Which of the {noun} in {a} can also be found in {b}?", "What do the lists {a} and {b} share?"),
        ),
        *phrasings(
            "only",
            train=(
                "[Which|What] {noun} are in {a} but not in {b}?",
                "[List|Find|Show me|Give me] the {noun} of {a} that are [missing from|not in] {b}.",
                "Compare {a} [with|to] {b}: [which|what] {noun} are missing in {b}?",
                "[Which|What] lines [does only {a} have|are only in {a}], compared to {b}?",
                "What is in {a} that {b} [does not have|lacks]?",
                "{a} minus {b}: which {noun} [are left|remain]?",
            ),
            held_out=("Which {noun} of {a} did I forget in {b}?", "What does {b} lack that {a} has?"),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        found = find(draw, world, ItemList, draw_items, lambda made: made.format == "plain" and len(made.items) >= 4)
        if found is None:
            return None
        first, files = found
        texts = [item.text for item in first.items]
        shared = draw.some(texts, draw.between(1, min(6, len(texts) - 1)))
        others: list[str] = []
        for _ in range(draw.between(2, 7)):
            text = first.another(draw)
            if not any(text.lower() in other.lower() or other.lower() in text.lower() for other in [*texts, *others]):
                others.append(text)
        seconds = [*shared, *others]
        draw.rng.shuffle(seconds)
        path = new_path(draw, world, first.path, first.path.rpartition(".")[2], files)
        target = new_path(draw, world, first.path, first.path.rpartition(".")[2], [path, *files])
        if not others or target == path or not is_free(path, world, [first.path]):
            return None
        files = {**files, path: "".join(f"{text}\n" for text in seconds)}
        slots = {"a": mention(draw, first.path), "b": mention(draw, path), "new": mention(draw, target)}
        answer: AnswerKind = "list" if kind in ("common", "only") else "done"
        request = ask(draw, phrasing, answer, noun=first.noun, **slots)
        a, b, out = quote(first.path), quote(path), quote(target)
        command = {
            "union": f"sort -u {a} {b} > {out}",
            "both": f"cat {a} {b} > {out}",
            "common": f"grep -Fxf {a} {b}",
            "only": f"grep -vxFf {b} {a}",
        }[kind]
        if request.layout == "commas":
            command += " | paste -sd, | sed 's/,/, /g'"
        done = submit("The file is written.")
        check: dict[str, Any]
        if answer == "done":
            lines = [*texts, *others] if kind == "union" else [*texts, *seconds]
            check = {**same_lines(target, lines), "solution": command}
        else:
            wanted = shared if kind == "common" else [text for text in texts if text not in shared]
            rest = [text for text in (*texts, *others) if text not in wanted]
            check = names_are(wanted, others=rest, layout=request.layout)
        if answer == "list" and len(check["reply"]) > 400:
            return None
        return Draft(
            instruction=request.text,
            steps=[
                lambda results: Act("I compare the lists." if answer == "list" else "I merge them.", [run(command)]),
                lambda results: submit("These are the lines.", results[0]) if answer == "list" else done,
            ],
            about=[first.shape],
            files=files,
            difficulty=2,
            **check,
        )


def _has(made: ItemList, kind: str) -> bool:
    """Return whether a list has boxes, and at least one of them open or done."""
    return made.format == "todo" and any(item.done == (kind == "done") for item in made.items)


def _chosen(made: ItemList, kind: str) -> list[Item]:
    return [item for item in made.items if kind == "all" or item.done == (kind == "done")]


LISTS = (
    *(CountItems(), ListItems(), NthItem(), HasItem(), AddItem(), RemoveItem(), CheckItem(), SortLines()),
    CompareLists(),
)
