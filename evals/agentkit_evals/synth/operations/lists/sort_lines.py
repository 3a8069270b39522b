"""Sort the lines of a list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agentkit_evals.synth.artifacts.items import ItemList
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import new_path
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.operations.lists.code import ListOperation
from agentkit_evals.synth.operations.steps import run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import quote
from agentkit_evals.synth.task import Draft
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World

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


class SortLines(ListOperation):
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

    def fits(self, made: ItemList, kind: str) -> bool:
        return made.format == "plain"

    def draft_over(self, made: ItemList, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        order, _, new = phrasing.kind.partition(" ")
        texts = [item.text for item in made.items]
        if texts == sorted(texts):
            return None
        files: dict[str, str] = {}
        if order == "unique":
            extra = [draw.choice(texts) for _ in range(draw.between(1, 4))]
            doubled = [*texts, *extra]
            draw.rng.shuffle(doubled)
            files = {made.path: "".join(f"{text}\n" for text in doubled)}
        target = new_path(draw, world, made.path, made.path.rpartition(".")[2]) if new else made.path
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
