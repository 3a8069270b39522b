"""Facts that lie far back: more than a window of tokens of other text comes between a fact and its use.

`far_name` and `far_note` need one line of a long text or of the request, which compressed attention over four tokens
carries. `far_poll` needs what a long stretch of lines has in common, which no single line states.
"""

from __future__ import annotations

from agentkit_evals.synth.artifacts.texts import fact, filler
from agentkit_evals.synth.checks import same_files
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.mention import mention
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.task import Draft, Operation
from agentkit_evals.synth.world import World

LEAST, MOST = 60, 80
"""Lines of filler: about eight tokens each, so more than 450 tokens, where a window has 256."""
KINDS = ("code", "badge", "ticket", "label", "owner", "title", "address", "reference", "password", "room")
COUNT = (100, 150)
"""Lines of a poll, each of one name: more than one entry of heavily compressed attention, which pools 128 tokens."""


def fillers(draw: Draw) -> str:
    """Return lines that state no fact."""
    return "".join(f"{filler(draw)}\n" for _ in range(draw.between(LEAST, MOST)))


class FarNote(Operation):
    """The first line of a long file, which is read to its end."""

    name = "far_note"
    far_fact = True
    uses_world = False
    phrasings = phrasings(
        train=(
            "What is the {subject} at the top of {path}?",
            "The first line of {path} states the {subject}. [Tell me|Give me|Submit] it.",
            "[Read|Open] {path} and tell me the {subject}.",
            "{path} is long, but I only need the {subject} [at the beginning|in its first line].",
            "I need the {subject} from {path}. [It is at the top.|It is in the first line.|]",
            "Which {subject} does {path} begin with?",
        ),
        held_out=(
            "Look at the very start of {path}: what is the {subject}?",
            "{path} opens with the {subject}. What is it?",
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        path = draw.path(draw.choice(("txt", "md", "log")))
        one = fact(draw)
        text = f"{one.line}\n{fillers(draw)}"
        return Draft(
            instruction=draw.phrase(phrasing.text, subject=one.subject, path=mention(draw, path)),
            steps=[
                lambda results: Act(f"I read `{path}`.", [("read_file", {"path": path})]),
                lambda results: submit(f"The {one.subject} is {one.value}.", one.value),
            ],
            files={path: text},
            answer=one.value,
            about=[one.line],
            difficulty=2,
        )


class FarName(Operation):
    """A value of the request, written to a file together with the end of a long file."""

    name = "far_name"
    far_fact = True
    uses_world = False
    phrasings = phrasings(
        train=(
            "The {kind} is {value}. Read {path}, then write the {kind} and the last line of {path} to {out}.",
            "[Write|Save] the {kind} {value} and[, on the next line,|] the last line of {path} to {out}.",
            "My {kind} is {value}. [Read|Open] {path} and put my {kind} and the last line of it into {out}.",
            "{out} should have two lines: {value}, and the last line of {path}.",
            "Take the {kind} {value}, read all of {path}, and write the {kind} and then its last line to {out}.",
        ),
        held_out=("Put {value}, and below it the last line of {path}, into {out}.",),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        path, out = draw.path("txt", depth=0), draw.choice(("out.txt", "result.txt", "answer.txt", "summary.txt"))
        value, last = draw.value(), draw.words_value()
        if path == out:
            return None
        content = f"{value}\n{last}\n"
        return Draft(
            instruction=draw.phrase(
                phrasing.text, kind=draw.choice(KINDS), value=value, path=mention(draw, path), out=out
            ),
            steps=[
                lambda results: Act(f"I keep {value} and read `{path}`.", [("read_file", {"path": path})]),
                lambda results: Act("I write both lines.", [("write_file", {"path": out, "content": content})]),
                lambda results: submit("It is written."),
            ],
            files={path: f"{fillers(draw)}{last}\n"},
            solution=f"printf '%s\\n' '{value}' > {out}; tail -n 1 '{path}' >> {out}",
            difficulty=3,
            **same_files({out: content}),
        )


class FarPoll(Operation):
    """The name that most lines of a poll have, with other text after the poll."""

    name = "far_poll"
    far_fact = True
    spread_fact = True
    uses_world = False
    phrasings = phrasings(
        train=(
            "{path} [is|holds|has] the votes of a poll. Who has most votes?",
            "[Read|Open] the poll {path} and [tell me|submit] the name with most votes.",
            "Which name has most votes in the poll {path}?",
            "Who won the poll in {path}?",
            "The votes stand at the top of {path}. Which name [is most frequent|has the most]?",
        ),
        held_out=("Look at the votes in {path}: who is first?", "Name the winner of the poll {path}."),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        path = draw.path(draw.choice(("txt", "log", "csv")))
        names = [draw.thing("first_name") for _ in range(3)]
        if len(set(names)) < 3:
            return None
        total = draw.between(*COUNT)
        most = total * draw.between(60, 75) // 100
        votes = [names[0]] * most + [draw.choice(names[1:]) for _ in range(total - most)]
        draw.rng.shuffle(votes)
        return Draft(
            instruction=draw.phrase(phrasing.text, path=mention(draw, path)),
            steps=[
                lambda results: Act(f"I read the poll `{path}`.", [("read_file", {"path": path})]),
                lambda results: submit(f"Most votes are for {names[0]}.", names[0]),
            ],
            files={path: "".join(f"{vote}\n" for vote in votes) + fillers(draw)},
            answer=names[0],
            about=[names[0]],
            difficulty=2,
        )


FAR: tuple[Operation, ...] = (FarNote(), FarName(), FarPoll())
