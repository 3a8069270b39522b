"""Change one setting of a JSON, YAML or INI file and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from agentkit_evals.synth.family import Act, Draft, Draw, Family, Phrasing, phrasings, replace_in_file, submit
from agentkit_evals.synth.words import SETTINGS

CHECK = """\
import configparser, json, os, sys

def read(path):
    text = open(path).read()
    if path.endswith(".json"):
        return json.loads(text)
    if path.endswith(".ini"):
        parser = configparser.ConfigParser()
        parser.read_string(text)
        return {section: dict(parser[section]) for section in parser.sections()}
    lines = (line.split(" #")[0].rstrip() for line in text.splitlines())
    return [line.replace('"', "").replace("'", "") for line in lines if line.strip()]

folder = os.environ["AGENTKIT_VERIFIER_DIR"]
for name in os.listdir(folder + "/expected"):
    given, expected = read(name), read(folder + "/expected/" + name)
    if given != expected:
        sys.exit(name + " is not as asked\\n  expected: " + repr(expected) + "\\n  given:    " + repr(given))
"""


class Config(Family):
    name = "config"
    phrasings = phrasings(
        train=(
            "Set `{key}` to `{new}` in `{path}` and submit done.",
            "In `{path}`, set `{key}` to `{new}`. Then submit done.",
            "Change `{key}` in `{path}` to `{new}` and submit done.",
            "Please change the value of `{key}` to `{new}` in `{path}`, then submit done.",
            "The value of `{key}` in `{path}` [should|must] be `{new}`. Change it and submit done.",
            "`{path}` has a wrong value for `{key}`. Set it to `{new}` and submit done.",
            "Edit `{path}` so that `{key}` is `{new}`. Submit done when it is [so|done].",
            "I need `{key}` to be `{new}` in `{path}`. Change only this and submit done.",
            "Make `{new}` the value of `{key}` in `{path}`. Then submit done.",
            "Open `{path}`, change `{key}` to `{new}`, and submit done.",
            "The file `{path}` needs a new value for `{key}`: `{new}`. Set it, then submit done.",
            "Give `{key}` the value `{new}` in the file `{path}` and submit done.",
        ),
        held_out=(
            "In the file `{path}` the value of `{key}` must be `{new}`. Edit it and submit done.",
            "Please edit `{path}`: `{key}` should be `{new}`. Then submit done.",
            "Open the file `{path}` and make `{key}` be `{new}`. Submit done.",
        ),
    )

    def draft(self, draw: Draw, phrasing: Phrasing) -> Draft:
        ending = draw.choice(("json", "yaml", "ini"))
        path = f"{draw.name()}.{ending}"
        keys = [self._key(draw) for _ in range(draw.between(2, 5))]
        chosen = draw.between(0, len(keys) - 1)
        kinds = [draw.choice(("name", "number", "flag")) for _ in keys]
        values = [self._value(draw, kind) for kind in kinds]
        new = self._other(draw, kinds[chosen], values[chosen])
        sections = [draw.name() for _ in range(draw.choice((1, 1, 2) if ending == "ini" else (0, 0, 1)))]
        split = draw.between(1, len(keys) - 1) if len(sections) == 2 else 0
        quoted = ending == "json"
        lines = [
            _line(ending, key, value, quoted and kind == "name")
            for key, value, kind in zip(keys, values, kinds, strict=True)
        ]
        changed = _line(ending, keys[chosen], new, quoted and kinds[chosen] == "name")
        before = _write(ending, sections, split, lines)
        after = _write(ending, sections, split, [*lines[:chosen], changed, *lines[chosen + 1 :]])
        files = {path: before}
        if draw.chance(0.3):
            files[f"{draw.name()}.{ending}"] = _write(ending, sections, split, lines[::-1])

        def read(results: list[str]) -> Act:
            return Act(f"I read `{path}`, then I set `{keys[chosen]}` to `{new}`.", [("read_file", {"path": path})])

        def edit(results: list[str]) -> Act:
            arguments = {"path": path, "old": lines[chosen], "new": changed}
            return Act(f"I change `{lines[chosen]}` to `{changed}`.", [("edit_file", arguments)])

        return Draft(
            instruction=draw.phrase(phrasing.text, key=keys[chosen], new=new, path=path),
            steps=[read, edit, lambda results: submit("The file is changed.")],
            files=files,
            verifier='python3 "$AGENTKIT_VERIFIER_DIR/check.py"',
            verifier_files={
                "check.py": CHECK,
                **{f"expected/{name}": after if name == path else text for name, text in files.items()},
            },
            solution=f"{replace_in_file(path, lines[chosen], changed)} && echo done",
        )

    def _key(self, draw: Draw) -> str:
        return draw.word(SETTINGS) if draw.chance(0.6) else draw.name()

    def _value(self, draw: Draw, kind: str) -> str:
        if kind == "flag":
            return draw.pick(("true", "false"))
        return draw.name() if kind == "name" else draw.number(1, 9999)

    def _other(self, draw: Draw, kind: str, old: str) -> str:
        while (new := self._value(draw, kind)) == old:
            pass
        return new


def _line(ending: str, key: str, value: str, quoted: bool) -> str:
    if ending == "json":
        return f'"{key}": "{value}"' if quoted else f'"{key}": {value}'
    return f"{key}: {value}" if ending == "yaml" else f"{key} = {value}"


def _write(ending: str, sections: Sequence[str], split: int, lines: Sequence[str]) -> str:
    """Return the whole file. `sections` has at most two names; the second starts at line `split` (INI only)."""
    if ending == "ini":
        parts = [lines[:split], lines[split:]] if len(sections) == 2 else [lines]
        return "\n".join(
            f"[{name}]\n" + "".join(f"{line}\n" for line in part) for name, part in zip(sections, parts, strict=True)
        )
    if ending == "yaml":
        head, indent = (f"{sections[0]}:\n", "  ") if sections else ("", "")
        return head + "".join(f"{indent}{line}\n" for line in lines)
    indent = "    " if sections else "  "
    body = ",\n".join(indent + line for line in lines)
    return f'{{\n  "{sections[0]}": {{\n{body}\n  }}\n}}\n' if sections else f"{{\n{body}\n}}\n"
