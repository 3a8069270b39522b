"""Sums, averages and comparisons of the numbers in receipts, timesheets and measurements."""

from __future__ import annotations

from agentkit_evals.synth.answers import names_are, number_is
from agentkit_evals.synth.artifacts.ledger import Ledger, draw_ledger
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.find import find, is_free
from agentkit_evals.synth.mention import mention, mention_value
from agentkit_evals.synth.operations.steps import look, look_and_run, run
from agentkit_evals.synth.oracle import Act, submit
from agentkit_evals.synth.phrasing import Phrasing, phrasings
from agentkit_evals.synth.shell import fixed, quote
from agentkit_evals.synth.task import Draft, Operation, OperationOver
from agentkit_evals.synth.wording import ask
from agentkit_evals.synth.world import World


class SumNumbers(Operation):
    """The sum or the average of the numbers in one file, or the sum over the files of a folder."""

    name = "sum_numbers"
    phrasings = (
        *phrasings(
            "sum",
            train=(
                "[Add up|Sum up|Sum|Total] the {noun} in {path}.",
                "What is the [total|sum] of the {noun} in {path}?",
                "How much [is|does] [everything|it all] in {path} [together|in total|come to]?",
                "[Compute|Calculate|Work out] the [total|sum] of [all|the] {noun} in {path}.",
                "[Total|Sum] of {path}?",
                "{path}: what do the {noun} add up to?",
                "[Tell me|I need|Give me|Submit] the [total|sum] of the {noun} in {path}.",
                "What do the [numbers|{noun}] in {path} add up to?",
                "[Could you|Can you|Would you] add up the {noun} in {path}[, please|]?",
                "[Open|Read|Take] {path} and [add up|sum] all the numbers.",
                "How high is the [total|sum] in {path}?",
                "In {path}, [add up|sum up] all {noun} and give me the [total|result].",
                "My {noun} are in {path}. What is the [total|sum]?",
            ),
            held_out=(
                "If I put all {noun} in {path} together, what do I get?",
                "What is the grand total for the {noun} listed in {path}?",
                "Please do the sum over {path}.",
            ),
        ),
        *phrasings(
            "average",
            train=(
                "What is the [average|mean] of the {noun} in {path}?",
                "[Compute|Calculate|Work out|Find] the [average|mean] of the [numbers|{noun}] in {path}.",
                "[Average|Mean] of the {noun} in {path}?",
                "{path}: what is the average?",
                "[Tell me|I need|Give me] the [average|mean] of [all|the] {noun} in {path}.",
                "How high are the {noun} in {path} on average?",
                "[Could you|Can you] average the [numbers|{noun}] in {path}?",
            ),
            held_out=("On average, how high are the {noun} of {path}?", "What mean do the {noun} in {path} have?"),
        ),
        *phrasings(
            "folder",
            train=(
                "[Add up|Sum up|Total] the {noun} in all files [in|of] {folder}.",
                "What is the [total|sum] of the {noun} in all files in {folder}?",
                "The folder {folder} has several files with {noun}. What do they add up to [in total|altogether]?",
                "[Compute|Calculate] the [total|sum] over all files in {folder}.",
                "How much is everything in {folder} [together|in total]?",
                "[Tell me|I need|Give me] the total of all {noun} in {folder}, over all files.",
                "[Go through|Read] the files in {folder} and add up the {noun}.",
            ),
            held_out=(
                "Take every file in {folder}: what is the sum of all {noun}?",
                "What do all the {noun} under {folder} come to?",
            ),
        ),
    )

    def draft(self, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        files: dict[str, str]
        if kind == "folder":
            count = draw.between(2, 4)
            folder = draw.folder() + draw.choice(("", f"/{draw.noun()}"))
            for _ in range(10):
                ledger = draw_ledger(draw)
                lines = ledger.text.splitlines(keepends=True)
                if len(lines) == len(ledger.entries) >= 2 * count:
                    break
            else:
                return None
            if not is_free(folder, world):
                return None
            stem = draw.noun()
            files = {f"{folder}/{stem}{number + 1}.txt": "".join(lines[number::count]) for number in range(count)}
            paths, first = f"{quote(folder)}/*.txt", f"{folder}/{stem}1.txt"
        else:
            found = find(draw, world, Ledger, draw_ledger)
            if found is None:
                return None
            ledger, files = found
            folder, paths, first = "", quote(ledger.path), ledger.path
        shown = r'printf "%.2f\n", ' if ledger.decimal or kind == "average" else "print "
        if kind == "average":
            program = f"NF > 1 {{s += {ledger.field}; n++}} END {{{shown}s / n}}"
        else:
            program = f"{{s += {ledger.field}}} END {{{shown}s}}"
        request = ask(
            draw,
            phrasing,
            "number",
            path=mention(draw, first),
            folder=draw.choice((folder, f"`{folder}`", f"{folder}/", f"`{folder}/`")),
            noun=draw.choice((ledger.noun, ledger.noun, "numbers")),
        )
        value = ledger.total / (len(ledger.entries) if kind == "average" else 1)
        steps = look_and_run(first, "I add up the numbers.", f"awk '{program}' {paths}", "That is the result.")
        if kind == "folder":
            steps[0] = lambda results: Act("I look at the files.", [run(f"head -n 3 {paths}")])
        return Draft(
            instruction=request.text,
            steps=steps,
            about=[ledger.shape],
            files=files,
            difficulty=3,
            **number_is(
                round(value, 2),
                layout=request.layout,
                decimals=1 if kind == "average" else 2 if ledger.decimal else 0,
                ignored=[first],
            ),
        )


class CompareNumbers(OperationOver[Ledger]):
    """The number of a name, the name with the largest or smallest number, a difference, or a price times a count."""

    name = "compare_numbers"
    artifact = Ledger
    phrasings = (
        *phrasings(
            "one",
            train=(
                "[How much|How high] is {name} in {path}?",
                "What [number|value] does {name} have in {path}?",
                "[Find|Look up|Get|Tell me] the [number|value] [of|for] {name} in {path}.",
                "{path}: {name}?",
                "I need the [number|value|figure] for {name}. [It's in|See|Check] {path}.",
                "In {path}, what [is|stands] next to {name}?",
                "[Could you|Can you] look up {name} in {path}?",
                "[What is|Submit] the [entry|value] [of|for] {name} in {path}[.|, please.]",
            ),
            held_out=("What did we note for {name} in {path}?", "Which figure goes with {name} in {path}?"),
        ),
        *phrasings(
            "most",
            train=(
                "[Which|What] has the [highest|largest|biggest] [number|value] in {path}?",
                "[Find|Tell me|Give me|Name] the entry with the [highest|largest] [number|value] in {path}.",
                "[Which|What] entry of {path} is the [highest|largest|biggest]?",
                "Who or what [is on top|comes first|has the most] in {path}?",
                "In {path}, which [one|entry|name] has the [largest|highest|biggest] number?",
                "[Look at|Check|Open] {path}: which of the {noun} is the [highest|largest|biggest]?",
            ),
            held_out=("Which name in {path} goes with the greatest number?", "What tops the {noun} in {path}?"),
        ),
        *phrasings(
            "least",
            train=(
                "[Which|What] has the [lowest|smallest] [number|value] in {path}?",
                "[Find|Tell me|Give me|Name] the entry with the [lowest|smallest] [number|value] in {path}.",
                "[Which|What] entry of {path} is the [lowest|smallest]?",
                "Who or what [comes last|has the least] in {path}, by number?",
                "In {path}, which [one|entry|name] has the [smallest|lowest] number?",
            ),
            held_out=("Which name in {path} goes with the least number?",),
        ),
        *phrasings(
            "difference",
            train=(
                "How much [more|higher|larger] is {name} than {other} in {path}?",
                "What is the difference between {name} and {other} in {path}?",
                "[Compute|Calculate|Work out] the difference [of|between] {name} and {other} in {path}.",
                "By how much does {name} [exceed|beat] {other} in {path}?",
                "{path}: {name} minus {other}?",
                "[Subtract|Take] {other} from {name}, both are in {path}. What [is left|do you get]?",
            ),
            held_out=(
                "How far apart are {name} and {other} in {path}?",
                "What remains of {name} after subtracting {other}? See {path}.",
            ),
        ),
        *phrasings(
            "times",
            train=(
                "[How much are|What do I get for] {count} times {name} in {path}?",
                "[Multiply|Take] the [number|value] of {name} in {path} [by|times] {count}. What [is that|do you get]?",
                "What is {count} times {name}, [using|going by|according to] {path}?",
                "Look up {name} in {path} and multiply it by {count}.",
                "{path} has a number for {name}. [Multiply it by|What is it times] {count}?",
            ),
            held_out=("If {name} in {path} were {count} times as high, how high would it be?",),
        ),
        *phrasings(
            "pair",
            train=(
                "How much are {name} and {other} together in {path}?",
                "[Add|Sum up] {name} and {other} [from|in] {path}.",
                "What is the sum of {name} and {other} in {path}?",
                "What do {name} and {other} [cost|make|come to] together[, going by|? See|? Check] {path}?",
            ),
            held_out=("Put {name} and {other} of {path} together: what is the sum?",),
        ),
    )

    def new(self, draw: Draw, kind: str) -> Ledger:
        return draw_ledger(draw)

    def fits(self, ledger: Ledger, kind: str) -> bool:
        return all(ledger.text.lower().count(name.lower()) == 1 for name, _ in ledger.entries)

    def draft_over(self, ledger: Ledger, draw: Draw, world: World, phrasing: Phrasing) -> Draft | None:
        kind = phrasing.kind
        path = quote(ledger.path)
        ranked = sorted(ledger.entries, key=lambda entry: float(entry[1]))
        if kind in ("most", "least"):
            (name, number), neighbour = (ranked[-1], ranked[-2]) if kind == "most" else (ranked[0], ranked[1])
            if float(number) == float(neighbour[1]):
                return None
            request = ask(draw, phrasing, "value", path=mention(draw, ledger.path), noun=ledger.noun)
            part = "tail -n 1" if kind == "most" else "head -n 1"
            command = f"awk 'NF > 1 {{print {ledger.field}, $0}}' {path} | sort -n | {part}"
            others = [each for each, _ in ledger.entries if each != name]
            return Draft(
                instruction=request.text,
                steps=[
                    lambda results: look(ledger.path),
                    lambda results: Act("I sort by number.", [run(command)]),
                    lambda results: submit(f"It is {name}.", name),
                ],
                about=[ledger.shape],
                difficulty=3,
                **names_are([name], others=others, layout=request.layout),
            )
        (name, one), (other, two) = draw.some(ledger.entries, 2)
        if kind == "difference" and float(one) < float(two):
            name, one, other, two = other, two, name, one
        draw.named(name)
        draw.named(other)
        count = str(draw.between(2, 12))
        expression = {"difference": f"{one} - {two}", "times": f"{count} * {one}", "pair": f"{one} + {two}"}.get(
            kind, one
        )
        value = {
            "difference": float(one) - float(two),
            "times": int(count) * float(one),
            "pair": float(one) + float(two),
        }.get(kind, float(one))
        patterns = f"-e {quote(name)} -e {quote(other)}" if kind in ("difference", "pair") else fixed(name)
        request = ask(
            draw,
            phrasing,
            "number",
            path=mention(draw, ledger.path),
            name=mention_value(draw, name),
            other=mention_value(draw, other),
            count=count,
        )
        compute = Act(f"I compute {expression}.", [("python", {"code": f"print(round({expression}, 2))"})])
        return Draft(
            instruction=request.text,
            steps=[
                lambda results: Act(f"I look up {name}.", [run(f"grep {patterns} {path}")]),
                *([] if kind == "one" else [lambda results: compute]),
                lambda results: submit("That is the number.", one if kind == "one" else results[0]),
            ],
            about=[ledger.shape],
            difficulty=1 if kind == "one" else 3,
            **number_is(
                round(value, 2),
                layout=request.layout,
                decimals=2 if ledger.decimal else 0,
                ignored=[ledger.path, count],
            ),
        )


LEDGERS: tuple[Operation, ...] = (SumNumbers(), CompareNumbers())
