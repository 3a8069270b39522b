"""Read a long file, then write a fact from the instruction together with the value at the end of the file."""

from __future__ import annotations

from agentkit_evals.synth.family import Act, Draft, Draw, Family, Phrasing, phrasings, plain, submit
from agentkit_evals.synth.rows import number_rows

FACTS = ("passphrase", "badge", "ticket", "password", "seal")
ENDS = ("total", "result", "count", "sum")


class Ledger(Family):
    name = "ledger"
    far_fact = True
    phrasings = phrasings(
        train=(
            "The {fact} is `{secret}`. Read `{path}`, then write the {fact}, `-` and its {end} to `out.txt`.",
            "Read `{path}`. Write the {fact} `{secret}`, then `-` and the {end} of the file, to `out.txt`.",
            "Your {fact} is `{secret}`. Write it to `out.txt` with `-` and the {end} of `{path}` behind it.",
            "Keep the {fact} `{secret}` in mind, read `{path}`, and write the {fact}, `-` and the {end} to `out.txt`.",
            "Write to `out.txt`: the {fact} `{secret}`, then `-`, then the {end} from `{path}`.",
            "`{path}` has a {end}. Write it to `out.txt` behind the {fact} `{secret}` and `-`.",
            "Put the {fact} `{secret}` and the {end} of `{path}` into `out.txt`, with `-` between them.",
            "The {fact} `{secret}`, `-` and the {end} of `{path}` belong in `out.txt` in this order.",
            "Find the {end} in `{path}`. Then write your {fact} `{secret}`, `-` and the {end} to `out.txt`.",
            "Take the {fact} `{secret}`, read all of `{path}`, and write the {fact}, `-` and the {end} to `out.txt`.",
        ),
        held_out=(
            "The {fact} is `{secret}`. `{path}` has a {end}. Write both to `out.txt` with `-` between them.",
            "Your {fact} is `{secret}`. Read `{path}` and write the {fact}, `-` and the {end} to `out.txt`.",
            "Read `{path}` to its end and put the {fact} `{secret}`, then `-`, then the {end} into `out.txt`.",
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        secret, found = draw.name(), draw.name()
        fact, end = draw.pick(FACTS), draw.pick(ENDS)
        path = f"{draw.name()}.{draw.pick(('txt', 'log', 'dat'))}"
        title = f"{draw.name()}\n" if draw.chance(0.3) else ""
        line = f"{secret}-{found}"

        def read(results: list[str]) -> Act:
            return Act(f"The {fact} is `{secret}`. I read `{path}`.", [("read_file", {"path": path})])

        def write(results: list[str]) -> Act:
            joined = f"{secret}-{results[0].rsplit('=', 1)[1].strip()}"
            return Act("I write both.", [("write_file", {"path": "out.txt", "content": joined})])

        return Draft(
            instruction=draw.phrase(phrasing.text, fact=fact, secret=secret, path=path, end=end),
            steps=[read, write, lambda results: submit("It is written.")],
            files={path: f"{title}{number_rows(draw)}{end}={found}\n"},
            verifier=f'echo "out.txt: $(head -c 200 out.txt)"; test "$(cat out.txt)" = {plain(line)}',
            solution=f"echo {line} > out.txt && echo done",
        )
