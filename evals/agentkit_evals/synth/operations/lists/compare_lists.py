"""Compare two lists."""

from __future__ import annotations

from typing import Any

from agentkit_evals.synth.answers import names_are
from agentkit_evals.synth.artifacts.items import ItemList
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import is_free, new_path
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.lists.code import ListOperation
from agentkit_evals.synth.operations.lists.sort_lines import same_lines
from agentkit_evals.synth.operations.steps import run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import quote
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import AnswerKind, ask
from agentkit_evals.synth.world import World


class CompareLists(ListOperation):
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

    def fits(self, first: ItemList, kind: str) -> bool:
        return first.format == "plain" and len(first.items) >= 4

    def draft_over(self, first: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        texts = [item.text for item in first.items]
        shared = draw.some(texts, draw.between(1, min(6, len(texts) - 1)))
        others: list[str] = []
        for _ in range(draw.between(2, 7)):
            text = first.another(draw)
            if not any(text.lower() in other.lower() or other.lower() in text.lower() for other in [*texts, *others]):
                others.append(text)
        seconds = [*shared, *others]
        draw.rng.shuffle(seconds)
        path = new_path(draw, world, first.path, first.path.rpartition(".")[2])
        target = new_path(draw, world, first.path, first.path.rpartition(".")[2], [path])
        if not others or target == path or not is_free(path, world, [first.path]):
            return None
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
            files={path: "".join(f"{text}\n" for text in seconds)},
            difficulty=2,
            **check,
        )
