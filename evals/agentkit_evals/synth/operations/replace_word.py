"""Replace a word everywhere in a list, a log or a ledger."""

from __future__ import annotations

import re

from agentkit_evals.synth.artifacts.items import ItemList, draw_items
from agentkit_evals.synth.artifacts.ledger import Ledger, draw_ledger
from agentkit_evals.synth.artifacts.log import Log, draw_log
from agentkit_evals.synth.checks import same_files
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import find
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.steps import run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import quote
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import Artifact, World

WORD = re.compile(r"(?<![\w.-])[A-Za-z]{3,14}(?![\w.-])")


class ReplaceWord(Operation):
    name = "replace_word"
    phrasings = phrasings(
        train=(
            "Replace {old} [by|with] {new} in {path}.",
            "In {path}, [replace every|replace each|replace all|swap every] {old} [for|with] {new}.",
            "[Please replace|Substitute] {new} for {old} [everywhere in|throughout|in] {path}.",
            "Change {old} to {new} [everywhere |wherever it occurs |]in {path}.",
            "{path} [says|has|uses] {old}, [but it should be|it should say|make it] {new}.",
            "[Could you|Can you] [replace {old} with|change {old} to] {new} in {path}[, please|]?",
            "[Find|Search for] {old} in {path} and replace it [by|with] {new}.",
            "Rename {old} to {new} in {path}[, all occurrences|, everywhere|].",
            "We call {old} now {new}; [update|change|adapt] {path}.",
            "[Edit|Open] {path}: {old} becomes {new}[, in every line|].",
            "All [occurrences of|mentions of] {old} in {path} [should|must] become {new}.",
            "replace {old} with {new} in {path}",
            "There's a mistake in {path}: {old} instead of {new}. [Fix it|Correct it].",
        ),
        held_out=(
            "Wherever {path} has {old}, put {new}.",
            "Swap {old} for {new} across {path}.",
            "The word {old} in {path} is wrong; {new} is right, so correct that.",
            "Let {path} read {new} where it now reads {old}.",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        found: tuple[Artifact, dict[str, str]] | None
        kind = draw.weighted({"items": 3, "ledger": 2, "log": 1})
        if kind == "items":
            found = find(draw, world, ItemList, draw_items, _fits)
        elif kind == "ledger":
            found = find(draw, world, Ledger, draw_ledger, _fits)
        else:
            found = find(draw, world, Log, draw_log, _fits)
        if found is None:
            return None
        made, files = found
        old, new = _draw_word(draw, made.text), draw.noun()
        if old is None or new in made.text or old.lower() == new.lower():
            return None
        command = f"sed -i 's/{old}/{new}/g' {quote(made.path)}"
        return Draft(
            instruction=ask(
                draw,
                phrasing,
                "done",
                path=mention(draw, made.path),
                old=mention_value(draw, old),
                new=mention_value(draw, new),
            ).text,
            steps=[
                lambda results: Act(f"I replace {old} by {new}.", [run(command)]),
                lambda results: submit("The word is replaced."),
            ],
            solution=command,
            about=[kind],
            files=files,
            difficulty=1,
            **same_files({made.path: made.text.replace(old, new)}),
        )


def _draw_word(draw: Draw, text: str) -> str | None:
    """Draw a word of a text that is never part of another word."""
    words = WORD.findall(text)
    for _ in range(10 if words else 0):
        word: str = draw.choice(words)
        if text.count(word) == len(re.findall(rf"(?<![\w.-]){word}(?![\w.-])", text)):
            return draw.named(word)
    return None


def _fits(made: Artifact) -> bool:
    return len(made.text) < 6000 and WORD.search(made.text) is not None
