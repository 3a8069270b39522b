"""Find the most frequent of the votes at the top of a long file, asked for at the end.

`archive` and `ledger` need one position of the distant past. This family needs a whole stretch of it combined, which
is the purpose of heavily compressed attention (`hca`).
"""

from __future__ import annotations

from agentkit_evals.synth.family import (
    Act,
    Draft,
    Draw,
    Family,
    Phrasing,
    answer_is,
    phrasings,
    plain,
    print_answer,
    submit,
)
from agentkit_evals.synth.rows import number_rows

LEAST, MOST = 64, 96  # votes: 128 to 192 tokens, one for each vote and one for each newline


class Poll(Family):
    name = "poll"
    far_fact = spread_fact = True
    phrasings = phrasings(
        train=(
            "`{path}` is a poll. Submit the name that has most votes.",
            "The votes of a poll stand at the top of `{path}`. Submit the name with most votes.",
            "Read the poll `{path}` and submit the name that most votes are for.",
            "Which name has most votes in the poll `{path}`? Submit it.",
            "Who has most votes in `{path}`? Read the poll and submit the name.",
            "`{path}` holds the votes of a poll. [Read it|Read the file] and submit the first in the poll.",
            "Open the poll `{path}`, look at the votes, and submit the name with most of them.",
            "I need the name with most votes in the poll `{path}`. Submit it.",
        ),
        held_out=(
            "Read `{path}`. It is a poll: submit the name with most votes.",
            "Submit the name that has most votes in the poll `{path}`.",
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        path = f"{draw.name()}.{draw.pick(('txt', 'log', 'dat'))}"
        winner, second, third = (draw.name(syllables=1) for _ in range(3))
        total = draw.between(LEAST, MOST)
        most = total * draw.between(60, 75) // 100
        votes = [winner] * most + [draw.choice((second, third)) for _ in range(total - most)]
        draw.rng.shuffle(votes)

        def tell(results: list[str]) -> Act:
            found = [line for line in results[0].splitlines() if line.isalpha()]
            return submit("I count the votes.", max(sorted(set(found)), key=found.count))

        return Draft(
            instruction=draw.phrase(phrasing.text, path=path),
            steps=[lambda results: Act(f"I read the poll `{path}`.", [("read_file", {"path": path})]), tell],
            files={path: "".join(f"{vote}\n" for vote in votes) + number_rows(draw)},
            verifier=answer_is(plain(winner)),
            solution=print_answer(winner),
        )
