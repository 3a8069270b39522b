"""Add, remove and check items of a list."""

from __future__ import annotations

from dataclasses import replace

from agentkit_evals.synth.artifacts.items import Item, ItemList, draw_items
from agentkit_evals.synth.checks import same_files
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.lists.code import ListOperation, has_state
from agentkit_evals.synth.operations.steps import run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import fixed, quote
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class AddItem(ListOperation):
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

    def draft_over(self, made: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
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
            difficulty=2,
            **same_files({made.path: made.written([*made.items, item])}),
        )


class RemoveItem(ListOperation):
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

    def fits(self, made: ItemList, kind: str) -> bool:
        return made.format != "numbered"

    def draft_over(self, made: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
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
            difficulty=2,
            **same_files({made.path: made.written(rest)}),
        )


class CheckItem(ListOperation):
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

    def new(self, draw: Draw, kind: str) -> ItemList:
        return draw_items(draw, todo=True)

    def fits(self, made: ItemList, kind: str) -> bool:
        return has_state(made, "open" if kind == "done" else "done")

    def draft_over(self, made: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
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
            difficulty=2,
            **same_files({made.path: expected}),
        )
