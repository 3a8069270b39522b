"""Tasks made of others: two requests in one, and a file that says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.oracle import Act, Step, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings, sentence
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World

PARTS = 8  # drafts tried for each request that a task contains


class TwoRequests(Operation):
    """Two tasks of other operations, one after the other, with both answers."""

    name = "two_requests"
    phrasings = phrasings(
        train=(
            "{First} {Second}",
            "{First} Then {second}",
            "{First} Also, {second}",
            "{First} After that, {second}",
            "Two things: {first} {Second}",
            "1. {First}\n2. {Second}",
            "{First} And {second}",
            "First: {first} Second: {second}",
            "{First}\n{Second}",
        ),
        held_out=("{First} When this is done, {second}", "I have two requests. {First} {Second}"),
    )

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        parts = (_part(draw, world, draw.choice(self.operations)) for _ in range(PARTS))
        first = next((part for part in parts if part is not None and not part.verifier), None)
        if first is None:  # only the second may change files
            return None
        there = world.with_files(first.files)
        parts = (_part(draw, there, draw.choice(self.operations)) for _ in range(PARTS))
        second = next((part for part in parts if part is not None and not part.files), None)
        if second is None or first.instruction == second.instruction:
            return None
        one, other = sentence(first.instruction), sentence(second.instruction)
        return Draft(
            instruction=draw.phrase(
                phrasing.text, First=one, first=_lowered(one), Second=other, second=_lowered(other)
            ),
            steps=chained(first.steps, second.steps),
            answer="\n".join(filter(None, (first.answer, second.answer))),
            verifier=second.verifier,
            solution="\n".join(filter(None, (first.solution, second.solution))),
            about=[*first.about, *second.about],
            files=first.files,
            verifier_files=second.verifier_files,
            difficulty=first.difficulty + second.difficulty,
        )


class FollowFile(Operation):
    """A file states the request."""

    name = "follow_file"
    phrasings = phrasings(
        train=(
            "Do what {path} says.",
            "[Follow|Carry out] the instructions in {path}.",
            "[Read|Open] {path} and do what it [says|asks for].",
            "Your task is in {path}.",
            "The request is in {path}. [Do it|Please do it].",
            "See {path} for what I need.",
        ),
        held_out=("Work through {path}.", "Please handle the request in {path}."),
    )

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = operations

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        path = draw.path(draw.choice(("txt", "md")), depth=draw.choice((0, 0, 1)))
        if path in world.files or path.split("/")[0] in world.files:
            return None
        there = world.with_files({path: ""})
        parts = (_part(draw, there, draw.choice(self.operations)) for _ in range(PARTS))
        inner = next((part for part in parts if part is not None and path not in part.files), None)
        if inner is None or path in inner.instruction:
            return None
        files: Mapping[str, str] = {**inner.files, path: f"{inner.instruction}\n"}
        return Draft(
            instruction=draw.phrase(phrasing.text, path=mention(draw, path)),
            steps=[lambda results: Act(f"I read `{path}`.", [("read_file", {"path": path})]), *inner.steps],
            answer=inner.answer,
            verifier=inner.verifier,
            solution=inner.solution,
            about=[inner.instruction, *inner.about],
            files=files,
            verifier_files=inner.verifier_files,
            difficulty=inner.difficulty + 1,
        )


def chained(first: Sequence[Step], second: Sequence[Step]) -> list[Step]:
    """Return the steps of two oracles as one, which submits both answers at the end; "done" is no answer."""
    answers: list[str] = []

    def bridge(results: list[str]) -> Act:
        answers[:] = [_answer(first[-1](results))]
        return second[0]([])

    def end(results: list[str]) -> Act:
        last = second[-1](results)
        told = [answer for answer in (*answers, _answer(last)) if answer != "done"]
        return submit(last.reasoning, "\n".join(told) or "done")

    return [*first[:-1], bridge, *second[1:-1], end]


def _part(draw: Draw, world: World, operation: Operation) -> Draft | None:
    phrasing = draw.choice([one for one in operation.phrasings if not one.held_out])
    draft = operation.draft(draw, world, phrasing)
    if draft is None or draft.alone:
        return None
    if draft.reply != "done":  # its verifier expects no other answer besides
        return replace(draft, answer=draft.reply, verifier="", verifier_files={})
    return draft


def _answer(act: Act) -> str:
    ((_, arguments),) = act.calls
    answer: Any = arguments["answer"]
    return str(answer)


def _lowered(text: str) -> str:
    return text[0].lower() + text[1:] if text[1:2].islower() else text
