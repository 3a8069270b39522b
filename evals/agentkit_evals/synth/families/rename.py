"""Rename an identifier in every file with a given extension, and nowhere else."""

from __future__ import annotations

import re

from agentkit_evals.synth.family import Act, Draft, Draw, Family, Phrasing, phrasings, plain, submit

ENDINGS = ("py", "js", "txt", "cfg", "md", "csv")
PYTHON = (
    "from {other} import {old}\n\nprint({old}({n}))\n",
    "from {other} import {old}\n\n{more} = {old}({n})\n",
    "import {other}\n\nprint({other}.{old}({n}))\n",
    "# uses {old}\n",
    "print({old})\n",
)
TEXT = (
    "{old} = {n}\n",
    "use {old} {n}\n",
    "{more}: {old}\n",
    "{more} {n}\n{old} {n}\n",
    "# {old}\n{more} = {old}\n",
)


class Rename(Family):
    name = "rename"
    phrasings = phrasings(
        train=(
            "Rename `{old}` to `{new}` in all `.{ending}` files and submit done.",
            "In all `.{ending}` files, rename `{old}` to `{new}`. Then submit done.",
            "The name `{old}` must be `{new}` in every `.{ending}` file. Submit done at the end.",
            "Please rename `{old}` to `{new}` in the `.{ending}` files only and submit done.",
            "Change the name `{old}` to `{new}` in each `.{ending}` file, then submit done.",
            "Every `.{ending}` file should say `{new}`, not `{old}`. Rename it and submit done.",
            "`{old}` has a new name: `{new}`. Use it in all `.{ending}` files and submit done.",
            "I want to rename `{old}` to `{new}`. Do it in every `.{ending}` file and submit done.",
            "Use the name `{new}`, not `{old}`, in all `.{ending}` files. Submit done when it is so.",
            "Replace the name `{old}` by `{new}` in all files that end in `.{ending}`, then submit done.",
            "Find `{old}` in the `.{ending}` files, rename it to `{new}`, and submit done.",
            "All `.{ending}` files must use `{new}` for `{old}`. Change them and submit done.",
        ),
        held_out=(
            "Please use `{new}` for `{old}` in every `.{ending}` file, then submit done.",
            "The new name of `{old}` is `{new}`. Rename it in all `.{ending}` files and submit done.",
            "In each `.{ending}` file, change `{old}` to `{new}`. Submit done at the end.",
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        old, new, other = draw.name(), draw.name(), draw.name()
        ending = draw.pick(ENDINGS)
        code = plain(ending) == "py"

        def write() -> str:
            text = draw.choice(PYTHON if code else TEXT)
            return text.format(old=old, other=other, more=draw.name(), n=draw.number(1, 99))

        files = {f"{draw.name()}.{ending}": write() for _ in range(draw.between(1, 3))}
        if code:
            sign = draw.choice(("+", "-", "*"))
            files[f"{other}.py"] = f"def {old}(x):\n    return x {sign} {draw.number(2, 99)}\n"
        if draw.chance(0.3):  # a longer name that must not change
            longer = draw.choice((f"{old}_{draw.name()}", f"{draw.name()}_{old}"))
            path = draw.choice(list(files))
            files[path] += f"{longer} = {draw.number(1, 99)}\n"
        changed = {path: _renamed(text, old, new) for path, text in files.items()}
        if draw.chance(0.4):  # a file with another extension, which must not change
            note = f"{draw.name()}.{draw.pick([other for other in ENDINGS if other != plain(ending)])}"
            files[note] = changed[note] = draw.choice(TEXT).format(old=old, more=draw.name(), n=draw.number(1, 99))
        command = f"sed -i 's/\\b{old}\\b/{new}/g' *.{ending}"
        compare = " && ".join(
            f'diff -u --label expected --label {path} "$AGENTKIT_VERIFIER_DIR/{path}" {path}' for path in changed
        )
        return Draft(
            instruction=draw.phrase(phrasing.text, old=old, new=new, ending=ending),
            steps=[
                lambda results: Act(f"I look where `{old}` stands, then I rename it.", [("search", {"pattern": old})]),
                lambda results: Act(f"I rename `{old}` to `{new}`.", [("bash", {"command": command})]),
                lambda results: submit("The name is changed."),
            ],
            files=files,
            verifier=compare,
            verifier_files=changed,
            solution=f"{command} && echo done",
        )


def _renamed(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{plain(old)}\b", plain(new), plain(text))
