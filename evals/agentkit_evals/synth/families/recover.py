"""The requested file does not exist: list the directory, find the intended file, submit its value."""

from __future__ import annotations

from agentkit_evals.synth.family import Act, Draft, Draw, Family, Phrasing, answer_is, phrasings, print_answer, submit
from agentkit_evals.synth.values import value_file, value_in

ENDINGS = ("txt", "md", "dat", "cfg", "out", "log")
SUFFIXES = ("_old", "_new", "-2", "_v2", "_final", "-copy", "_1", "-a", "_b")


class Recover(Family):
    name = "recover"
    phrasings = phrasings(
        train=(
            "Submit the value in `{path}`. If it is missing, look for a file with a name like it.",
            "Read `{path}` and submit its value. The file may have been moved or renamed.",
            "[What|Which] value does `{path}` hold? Submit it. Its name may be a little wrong.",
            "I need the value of `{path}`. Find the file and submit the value.",
            "Find the value in `{path}` and submit it. It may stand in a folder.",
            "Open `{path}` and submit the value. If there is no such file, list the directory.",
            "The value in `{path}` is the answer. Submit it. The file may have another ending.",
            "Submit what `{path}` has as its value. Look around if the file is not there.",
            "`{path}` holds a value. Read it and submit the value.",
            "Please read `{path}`, or the file that was meant, and submit its value.",
            "Get the value from `{path}` and submit it. Someone may have moved the file.",
            "Read the file `{path}` [and|, then] submit the value in it.",
        ),
        held_out=(
            "Find `{path}` and submit its value. Someone may have renamed the file.",
            "Please submit the value of `{path}`. If the file is not there, look for it.",
            "Open the file `{path}` and submit its value. Its ending may be wrong.",
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        stem, value = draw.name(), draw.value()
        asked, other = (draw.pick((ending,)) for ending in draw.rng.sample(ENDINGS, 2))
        path = f"{stem}.{asked}"
        how = draw.choice(("ending", "ending", "suffix", "suffix", "folder"))
        folder = draw.name()
        right = {
            "ending": f"{stem}.{other}",
            "suffix": f"{stem}{draw.pick(SUFFIXES)}.{asked}",
            "folder": f"{folder}/{path}",
        }[how]
        decoys = [
            f"{draw.name()}.{draw.choice((asked, other))}" for _ in range(draw.between(0 if how == "folder" else 1, 3))
        ]
        files = {right: value_file(draw, value)} | {decoy: value_file(draw, draw.value()) for decoy in decoys}

        def read(results: list[str]) -> Act:
            return Act(f"I read `{path}` first.", [("read_file", {"path": path})])

        def list_all(results: list[str]) -> Act:
            return Act(f"`{path}` is not there. I list the directory to find `{stem}`.", [("list_dir", {"path": "."})])

        def list_folder(results: list[str]) -> Act:
            return Act(f"There is no `{stem}` here. I look in `{folder}`.", [("list_dir", {"path": folder})])

        def read_right(results: list[str]) -> Act:
            return Act(f"`{right}` must be the file.", [("read_file", {"path": right})])

        def tell(results: list[str]) -> Act:
            found = value_in(results[0])
            return submit(f"The value is `{found}`.", found)

        return Draft(
            instruction=draw.phrase(phrasing.text, path=path),
            steps=[read, list_all, *([list_folder] if how == "folder" else []), read_right, tell],
            files=files,
            verifier=answer_is(value),
            solution=print_answer(value),
        )
