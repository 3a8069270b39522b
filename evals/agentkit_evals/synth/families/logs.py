"""Count the matching lines of a log with `grep -c`, or find one line with `search`."""

from __future__ import annotations

from agentkit_evals.synth.family import Act, Draft, Draw, Family, Phrasing, answer_is, marked, phrasings, submit

LEVELS = ("ERROR", "WARN", "INFO", "DEBUG", "FATAL", "NOTE")
ENDINGS = ("log", "txt", "out")
LINES = (
    "{level} {name} code={code}",
    "{level} {name} code={code} n={n}",
    "{n} {level} {name} code={code}",
    "{level}: {name} code={code}",
    "{n} {level}: {name} code={code}",
    "[{level}] {name} code={code}",
    "{name} {level} code={code}",
)


class Logs(Family):
    name = "logs"
    phrasings = (
        *phrasings(
            "count",
            train=(
                "How many lines of `{path}` contain `{word}`? Submit the number.",
                "Count the lines [of|in] `{path}` that contain `{word}` and submit the number.",
                "Submit the number of lines in `{path}` that have `{word}` in them.",
                "In `{path}`, how many lines have `{word}` in them? Submit the count.",
                "I need the count of lines with `{word}` in `{path}`. Submit it.",
                "`{word}` stands in some lines of `{path}`. Count these lines and submit the number.",
            ),
            held_out=(
                "Count the lines with `{word}` in the file `{path}`. Submit the count.",
                "How many lines in `{path}` have `{word}`? Submit how many.",
            ),
        ),
        *phrasings(
            "code",
            train=(
                "Find the line of `{path}` that contains `{word}` and submit its code.",
                "One line of `{path}` contains `{word}`. [Submit its code|Which code does it have? Submit it].",
                "Which code does the line with `{word}` in `{path}` have? Submit the code.",
                "Submit the code from the line with `{word}` in `{path}`.",
            ),
            held_out=("Find `{word}` in `{path}` and submit the code of that line.",),
        ),
        *phrasings(
            "where",
            train=(
                "On which line of `{path}` does `{word}` stand? Submit the line number.",
                "Find `{word}` in `{path}` and submit the number of its line.",
                "Submit the line number of `{word}` in `{path}`.",
                "`{word}` is in one line of `{path}`. Submit the number of that line.",
            ),
            held_out=("What is the line number of `{word}` in `{path}`? Submit it.",),
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        path = f"{draw.name()}.{draw.pick(ENDINGS)}"
        line = draw.choice(LINES)
        wanted = draw.name()
        others = [draw.name() for _ in range(3)]
        levels = [marked(level) for level in draw.rng.sample(LEVELS, 3)]

        def write(level: str, name: str) -> str:
            return line.format(level=level, name=name, n=draw.number(1, 59), code=draw.number(1000, 9999))

        if phrasing.kind == "count":
            by_level = draw.chance(0.6)
            word = levels[0] if by_level else wanted
            hits = [
                write(word, draw.choice(others)) if by_level else write(levels[0], word)
                for _ in range(draw.between(4, 39))
            ]
            rest = [write(draw.choice(levels[1:]), draw.choice(others)) for _ in range(draw.between(1, 20))]
            lines = hits + rest
            draw.rng.shuffle(lines)
            answer = str(len(hits))
        else:
            word, code = wanted, draw.value()
            lines = [write(draw.choice(levels), draw.choice(others)) for _ in range(draw.between(9, 59))]
            at = draw.between(0, len(lines))
            hit = line.format(level=draw.choice(levels), name=word, n=draw.number(1, 59), code=code)
            lines.insert(at, hit)
            answer = code if phrasing.kind == "code" else str(at + 1)

        def look(results: list[str]) -> Act:
            if phrasing.kind == "count":
                return Act(f"I count the lines with `{word}`.", [("bash", {"command": f"grep -c '{word}' {path}"})])
            return Act(f"I search `{path}` for `{word}`.", [("search", {"pattern": word, "path": path})])

        def tell(results: list[str]) -> Act:
            found = results[0].strip()
            if phrasing.kind == "code":
                found = found.split("code=")[1].split()[0]
            elif phrasing.kind == "where":
                found = found.split(":")[1]
            return submit(f"The answer is `{found}`.", found)

        return Draft(
            instruction=draw.phrase(phrasing.text, path=path, word=word),
            steps=[look, tell],
            files={path: "".join(f"{text}\n" for text in lines)},
            verifier=answer_is(answer),
            solution=_solution(phrasing.kind, word, path),
        )


def _solution(kind: str, word: str, path: str) -> str:
    if kind == "count":
        return f"grep -c '{word}' {path}"
    if kind == "code":
        return f"sed -n 's/.*{word}.*code=\\([a-z0-9]*\\).*/\\1/p' {path}"
    return f"grep -n '{word}' {path} | cut -d: -f1"
