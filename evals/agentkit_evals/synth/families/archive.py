"""Recall a value from the top of a long file after reading all of it."""

from __future__ import annotations

from agentkit_evals.synth.family import (
    Act,
    Draft,
    Draw,
    Family,
    Phrasing,
    answer_is,
    marked,
    phrasings,
    plain,
    print_answer,
    submit,
)
from agentkit_evals.synth.rows import number_row, number_rows

KEYS = ("code", "badge", "ticket", "seal", "label")
COLORS = ("red", "blue", "green", "gold")


class Archive(Family):
    name = "archive"
    far_fact = True
    phrasings = (
        *phrasings(
            "header",
            train=(
                "Read `{path}` and submit the {key} in its first line.",
                "The first line of `{path}` holds a {key}. [Read the file|Read it] and submit the {key}.",
                "Submit the {key} that stands at the top of `{path}`.",
                "Which {key} does `{path}` have in its first line? Submit it.",
                "`{path}` is a long file. Submit the {key} from its first line.",
                "Open `{path}`, find the {key} at the top, and submit it.",
                "I need the {key} at the top of `{path}`. Submit it.",
                "What is the {key} of `{path}`? It stands in the first line. Submit it.",
            ),
            held_out=(
                "`{path}` has a {key} at the top. Read the file and submit the {key}.",
                "Submit the {key} in the first line of the file `{path}`.",
            ),
        ),
        *phrasings(
            "choice",
            train=(
                "`{path}` holds {colors} codes. Its last line says which one to use. Submit that code.",
                "The last line of `{path}` names a color. Submit the code of that color.",
                "Read `{path}` to the end and submit the code of the color in its last line.",
            ),
            held_out=("Submit the code of the color that the last line of `{path}` names.",),
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        path = f"{draw.name()}.{draw.pick(('txt', 'log', 'dat'))}"
        key = draw.pick(KEYS)
        if phrasing.kind == "header":
            colors, chosen = [key], key
            codes = {key: draw.name()}
            tail = draw.choice(("end\n", "", f"{number_row(draw)}end\n"))
        else:
            colors = [marked(color) for color in draw.rng.sample(COLORS, 2)]
            chosen = draw.choice(colors)
            codes = {color: draw.name() for color in colors}
            tail = f"use={chosen}\n"
        head = number_row(draw).join(f"{color}={code}\n" for color, code in codes.items())
        answer = codes[chosen]

        def tell(results: list[str]) -> Act:
            lines = dict(line.split("=") for line in results[0].splitlines() if "=" in line)
            wanted = lines.get("use", plain(key))
            return submit(f"The code of {wanted} is asked for.", lines[wanted])

        return Draft(
            instruction=draw.phrase(phrasing.text, path=path, key=key, colors=" and ".join(colors)),
            steps=[
                lambda results: Act(f"I read all of `{path}`.", [("read_file", {"path": path})]),
                tell,
            ],
            files={path: head + number_rows(draw) + tail},
            verifier=answer_is(answer),
            solution=print_answer(answer),
        )
