"""Compute an arithmetic expression with the `python` tool; the answer is the printed result."""

from __future__ import annotations

from agentkit_evals.synth.family import Act, Draft, Draw, Family, Phrasing, answer_is, listed, phrasings, plain, submit

WORDS = {"+": "plus", "-": "minus", "*": "times"}


class Compute(Family):
    name = "compute"
    phrasings = (
        *phrasings(
            "symbols",
            train=(
                "[Compute|Work out] `{sum}` and submit the result.",
                "What is `{sum}`? Submit the number.",
                "Submit the value of `{sum}`.",
                "I need the result of `{sum}`. Submit it.",
            ),
            held_out=("Please work out the value of `{sum}` and submit it.",),
        ),
        *phrasings(
            "words",
            train=(
                "[Compute|Work out] {sum} and submit the result.",
                "What is {sum}? Submit the number.",
                "Submit the value of {sum}.",
                "How much is {sum}? Submit the result.",
            ),
            held_out=("I need the number that {sum} gives. Submit it.",),
        ),
        *phrasings(
            "list",
            train=(
                "Add the numbers {numbers} and submit the sum.",
                "What is the sum of {numbers}? Submit it.",
                "Submit the sum of the numbers {numbers}.",
            ),
            held_out=("Add {numbers} and submit the result.",),
        ),
        *phrasings(
            "story",
            train=(
                "{a} [boxes|bags|cases] hold {b} [pens|balls|nails] each. How many are there? Submit the number.",
                "There are {a} rows of {b} [trees|seats|plants] each. Submit [their number|how many there are].",
                "One [ticket|book|lamp] costs {b} coins. How many coins do {a} [of them|such things] cost? "
                "Submit the number.",
            ),
            held_out=("There are {a} boxes of {b} pens each. Submit the number of pens.",),
        ),
        *phrasings(
            "file",
            train=(
                "Add all numbers in `{path}` and submit the sum.",
                "What is the sum of the numbers in `{path}`? Submit it.",
                "`{path}` holds numbers. Submit their sum.",
            ),
            held_out=("Submit the sum of all numbers in the file `{path}`.",),
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        files: dict[str, str] = {}
        numbers = [draw.number(*draw.choice(((2, 99), (100, 999), (100, 9999)))) for _ in range(draw.between(2, 4))]
        slots = {"numbers": listed(numbers), "a": numbers[0], "b": numbers[1], "path": "", "sum": ""}
        if phrasing.kind in ("symbols", "words"):
            signs = [draw.choice("+-*") for _ in numbers[1:]]
            say = WORDS if phrasing.kind == "words" else {sign: sign for sign in WORDS}
            pairs = list(zip(signs, numbers[1:], strict=True))
            slots["sum"] = numbers[0] + "".join(f" {say[sign]} {number}" for sign, number in pairs)
            expression = numbers[0] + "".join(f" {sign} {number}" for sign, number in pairs)
            result = str(eval(plain(expression), {"__builtins__": {}}))  # only generated digits and operators
        elif phrasing.kind == "story":
            expression = f"{numbers[0]} * {numbers[1]}"
            result = str(int(plain(numbers[0])) * int(plain(numbers[1])))
        elif phrasing.kind == "list":
            expression = " + ".join(numbers)
            result = str(sum(int(plain(number)) for number in numbers))
        else:
            path = slots["path"] = f"{draw.name()}.{draw.pick(('txt', 'dat', 'csv'))}"
            numbers = [draw.number(1, 9999) for _ in range(draw.between(3, 12))]
            files[path] = "".join(number + draw.choice(("\n", "\n", " ")) for number in numbers)
            expression = f"sum(map(int, open('{path}').read().split()))"
            result = str(sum(int(plain(number)) for number in numbers))

        def compute(results: list[str]) -> Act:
            return Act(f"I compute `{expression}`.", [("python", {"code": f"print({expression})"})])

        def tell(results: list[str]) -> Act:
            found = results[0].strip()
            return submit(f"The result is `{found}`.", found)

        return Draft(
            instruction=draw.phrase(phrasing.text, **slots),
            steps=[compute, tell],
            files=files,
            verifier=answer_is(result),
            solution=f'python3 -c "print({expression})"',
        )
