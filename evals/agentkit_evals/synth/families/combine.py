"""Read several small files in one parallel turn, join their values in the requested order, submit."""

from __future__ import annotations

from agentkit_evals.synth.family import (
    Act,
    Draft,
    Draw,
    Family,
    Phrasing,
    answer_is,
    listed,
    phrasings,
    plain,
    print_answer,
    submit,
)
from agentkit_evals.synth.values import value_file, value_in

SEPARATORS = ("-", "+", ":", "/", ".", "_", "=", "#", ",", "~", "*", "%")
ENDINGS = ("txt", "md", "dat", "cfg", "out", "log")


class Combine(Family):
    name = "combine"
    phrasings = phrasings(
        train=(
            "[Read|Open] {files} and submit their values in this order, joined with {sep}.",
            "[Read|Open] {files}. Join their values with {sep} in this order and submit the result.",
            "Submit the values of {files}, in this order, joined with {sep}.",
            "The files {files} hold one value each. Submit the values in this order with {sep} between them.",
            "Join the values of {files} with {sep} and submit the [result|answer]. Keep the order.",
            "I need the values of {files} in one line, in this order, with {sep} between them. Submit the line.",
            "There is one value in each of {files}. Put {sep} between the values and submit them in this order.",
            "Which values do {files} have? Submit them in this order, joined with {sep}.",
            "Find the values in {files}. The answer is these values in order, joined with {sep}. Submit it.",
            "Take one value from each of {files}, join them in order with {sep}, and submit the answer.",
            "Use {sep} to join the values that are in {files}. Keep the order and submit the result.",
            "With {sep} between them, submit the values of the files {files} in this order.",
        ),
        held_out=(
            "The values of {files} have to be joined in this order with {sep}. Submit the result.",
            "[Open|Read] the files {files}, put {sep} between their values in order, and submit the line.",
            "I need one answer: the values in {files}, in this order, joined with {sep}. Submit it.",
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        count = draw.choice((2, 2, 3, 3, 4))
        ending = draw.pick(ENDINGS)
        paths = [f"{draw.name()}.{ending}" for _ in range(count)]
        values = [draw.value() for _ in range(count)]
        separator = draw.pick(SEPARATORS)
        files = {path: value_file(draw, value) for path, value in zip(paths, values, strict=True)}
        for _ in range(draw.choice((0, 0, 1, 2))):
            files[f"{draw.name()}.{ending}"] = value_file(draw, draw.value())
        quoted = [f"`{path}`" for path in paths]
        answer = separator.join(values)

        def read(results: list[str]) -> Act:
            reasoning = f"I read {listed(quoted)} and join the values with `{separator}`."
            return Act(reasoning, [("read_file", {"path": path}) for path in paths])

        def join(results: list[str]) -> Act:
            found = [value_in(result) for result in results]
            joined = plain(separator).join(found)
            return submit(f"The values are {listed([f'`{value}`' for value in found])}. I submit them.", joined)

        return Draft(
            instruction=draw.phrase(phrasing.text, files=listed(quoted), sep=f"`{separator}`"),
            steps=[read, join],
            files=files,
            verifier=answer_is(answer),
            solution=print_answer(answer),
        )
