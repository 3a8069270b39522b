"""The verifier of a table's row: `python3 -I check.py` in a sandbox, with `expected.json` beside it.

This file is copied into the sandbox, so it uses only the standard library.

- **An accepted answer** names the expected value as a whole word, ignoring case and spacing, and has at most
  `EXTRA_WORDS` other words. If the value is a number, every other number of the answer occurs in the request.
- **Saying no.** The answer to an impossible request has a phrase of `REFUSALS` and at most `REFUSAL_WORDS` words. Every
  number and every quoted text in it occurs in the request, in a path, in a file or in `known`; anything else is an
  invention. Numbers up to the number of files and of lines of a file are counts, not inventions.
- **Files.** Files named in `after` have these contents, without regard to trailing spaces and blank lines at the end;
  JSON files are compared as JSON. All other files are unchanged. After an impossible request there is no new file.
- **Commands** of `prints` run with an empty environment, and their output is compared.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

EXTRA_WORDS = 15
REFUSAL_WORDS = 60
REFUSALS = (
    "not found", "does not exist", "doesn't exist", "do not exist", "don't exist", "did not exist", "not exist",
    "no such", "there is no", "there are no", "there isn't", "there aren't", "there is not", "there's no", "has no ",
    "have no ", "contains no ", "cannot", "can't", "can not", "could not", "couldn't", "unable to", "not able to",
    "not possible", "impossible", "is missing", "are missing", "not present", "not available", "not defined", "not set",
    "not specified", "does not contain", "doesn't contain", "do not contain", "does not have", "doesn't have",
    "do not have", "don't have", "did not find", "didn't find", "no file", "no key", "no column", "no entry", "no line",
    "no tool", "not in the file", "not in ", "isn't in ", "unknown", "ambiguous", "unclear", "contradict", "conflict",
    "more than one", "which one", "which of", "please clarify", "not clear", "differ", "two different", "not unique",
    "no single", "not a single", "a tie", "undefined", "invalid", "not valid", "not a valid", "not a number", "no data",
    "no number", "no value", "no answer", "no way", "none of", "nobody", "only has", "only have",
)  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_QUOTED = re.compile(r"`([^`\n]+)`|\"([^\"\n]+)\"|“([^”\n]+)”|(?<!\w)'([^'\n]+)'(?!\w)")


def accepts(answer: str, expected: Any, ask: str = "") -> bool:
    """Return whether an answer names an expected value, without many other words or another number."""
    text, value = _plain(answer), _plain(str(expected))
    if len(text.split()) > len(value.split()) + EXTRA_WORDS:
        return False
    if (number := _as_number(value)) is not None:
        found = {_as_number(each) for each in _NUMBER.findall(text)}
        return number in found and found <= {number, *(_as_number(each) for each in _NUMBER.findall(_plain(ask)))}
    return text == value or names(text, value)


def names(answer: str, value: Any) -> bool:
    """Return whether a text names a value: as whole words, ignoring case and spacing."""
    return re.search(rf"(?<!\w){re.escape(_plain(str(value)))}(?!\w)", _plain(answer)) is not None


def refuses(answer: str, known: str) -> str | None:
    """Return why an answer does not say that a request is impossible; None if it does.

    Args:
        answer: The answer.
        known: The request, the paths and contents of all files, and so on. Values of the answer must occur in it.
    """
    text, known = _plain(answer), _plain(known)
    if not any(phrase in text + " " for phrase in REFUSALS):
        return "the answer does not say that it is impossible"
    if len(text.split()) > REFUSAL_WORDS:
        return f"the answer has more than {REFUSAL_WORDS} words"
    numbers = {_as_number(each) for each in _NUMBER.findall(known)} | {
        _as_number(each) for each in re.findall(r"\d+", known)
    }
    for each in _NUMBER.findall(text):
        if _as_number(each) not in numbers:
            return f"the answer invents {each}"
    for groups in _QUOTED.findall(text):
        if (quoted := "".join(groups).strip(" .:,")) not in known:
            return f"the answer invents {quoted!r}"
    return None


def problem(expected: Mapping[str, Any], answer: str, workdir: Path) -> str | None:
    """Return what is wrong with an answer and a workdir; None if nothing is."""
    ask, files = expected["ask"], expected["files"]
    for value in expected.get("never", ()):
        if names(answer, value):
            return f"the answer names {value!r}"
    if expected["impossible"]:
        counts = range(max([len(files), *(len(text.splitlines()) for text in files.values())]) + 1)
        known = [ask, *files, *files.values(), *expected.get("known", ()), *counts]
        wrong = refuses(answer, "\n".join(map(str, known)))
        new = [path for path in _paths(workdir) if path not in files]
        return wrong or (f"new file {new[0]}" if new else _changed(expected, workdir))
    if "answer" in expected:
        accepted = expected["answer"] if isinstance(expected["answer"], list) else [expected["answer"]]
        if not any(accepts(answer, value, ask) for value in accepted):
            return f"the answer is {answer[:200]!r}, expected {accepted}"
    if "lists" in expected:
        missing = [value for value in expected["lists"] if not names(answer, value)]
        words = sum(len(str(value).split()) for value in expected["lists"])
        if missing:
            return f"the answer does not name {missing}"
        if len(answer.split()) > words + EXTRA_WORDS + len(expected["lists"]):
            return "the answer has many other words"
    return _changed(expected, workdir) or _printed(expected, workdir)


def _changed(expected: Mapping[str, Any], workdir: Path) -> str | None:
    after = {**expected["files"], **expected.get("after", {})}
    for path, text in after.items():
        if path in expected.get("edits", ()):
            continue
        file = workdir / path
        if text is None:
            if file.exists():
                return f"{path} still exists"
        elif not file.is_file():
            return f"{path} is missing"
        elif not _same(path, file.read_text(encoding="utf-8", errors="replace"), text):
            return f"{path} has other contents"
    return None


def _same(path: str, found: str, text: str) -> bool:
    if path.endswith(".json"):
        try:
            return bool(json.loads(found) == json.loads(text))
        except ValueError:
            return False
    return _lines(found) == _lines(text)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _printed(expected: Mapping[str, Any], workdir: Path) -> str | None:
    for command, output in expected.get("prints", {}).items():
        ran = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=workdir,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
        )
        found = ran.stdout.decode(errors="replace")
        if ran.returncode != 0 or _lines(found) != _lines(output):
            return f"{command!r} exits with {ran.returncode} and prints {found[:200]!r}, expected {output!r}"
    return None


def _paths(workdir: Path) -> Iterator[str]:
    for file in sorted(workdir.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            yield file.relative_to(workdir).as_posix()


def _plain(text: str) -> str:
    return " ".join(text.replace("’", "'").casefold().split())


def _as_number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def main() -> None:
    """Exit with 1 and the reason if the answer or the workdir is wrong."""
    place = Path(os.environ["AGENTKIT_VERIFIER_DIR"])
    expected = json.loads((place / "expected.json").read_text(encoding="utf-8"))
    answer = Path(os.environ["AGENTKIT_ANSWER_FILE"]).read_text(encoding="utf-8", errors="replace")
    if wrong := problem(expected, answer, Path.cwd()):
        sys.exit(wrong)


if __name__ == "__main__":
    main()
