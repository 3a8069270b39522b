"""Contamination: what training rows and the tasks of an evaluation have in common.

Single words may occur in both. These may not:

path       the full path of a file, unless it is one of `CONVENTIONAL`, which a tool prescribes
key        a key of a configuration that consists of several words, such as `max_connections` or `fontSize`
tool       the name of a tool that consists of several words, unless it is built in
phrasing   an instruction with its names masked: paths, quoted text, numbers, identifiers, capitalised words
template   the verb of an instruction with its object, such as (count, guests), unless it is masked or `GENERIC`

`overlaps` is a pure function of texts; `text_of` takes them from a task.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from agentkit.task import Task, ToolConfig
from agentkit_evals.suite import HAND_WRITTEN, PACKAGED_SUITES, load_suite

Kind = Literal["path", "key", "tool", "phrasing", "template"]

CONVENTIONAL = frozenset(
    """.bashrc .env .env.example .env.local .gitignore CHANGELOG.md Cargo.toml Makefile README.md README.txt
    VERSION app.py config.json config.yaml main.go main.py models.py nginx.conf package.json php.ini
    pyproject.toml requirements.txt setup.cfg tox.ini utils.py""".split()
)
"""File names that a tool prescribes or that every project has; only their last component counts."""

GENERIC = frozenset(
    """answer answers characters column columns content contents count counts directory document documents entry
    entries file files folder folders function functions header heading key keys letter letters line lines
    list lists name names number numbers record records result results row rows section sections setting
    settings subfolders sum test tests text texts total value values variable word words""".split()
)
"""Objects that belong to the operation, not to what it is about: "count the lines" is not a template of a suite."""

_VERBS = frozenset(
    """add append apply assign average book build bump call cancel change check combine compare compute convert
    copy correct count create cut delete describe determine drop duplicate edit extract find fix get give
    increase insert join list locate look lower make merge move name open order pay pick play plan print put
    raise rate read record register remove rename repair replace report request reserve reverse run save
    search send set show sort split start store submit subtract sum switch tell track transfer translate turn
    update use wake want work write""".split()
)
_QUESTIONS = ("how many", "how much", "how long", "what is", "what's", "which", "who", "when", "where", "what")
_SKIPPED = frozenset(
    """a all an and any are as at by can could did do does each every first for from has have i i'd i'm in into
    is it its last me my new next of off on one only or our out please second some than that the their them
    these this those to two up us was we what which with would you your""".split()
)
_MASK = "_"
_QUOTED = re.compile(r"`[^`\n]*`|\"[^\"\n]*\"|“[^”\n]*”|(?<!\w)'[^'\n]*'(?!\w)")
_WORD = re.compile(r"\S+")
_PATH = re.compile(r"(?<![\w./-])[\w./-]*[\w-]\.[A-Za-z]\w{0,7}\b(?![/@])|(?<![\w./-])[\w-]+/[\w./-]+")
_KEY = re.compile(r"^\s*(?:export\s+)?([A-Za-z_][\w.-]*)\s*[:=]|[\"']([A-Za-z_][\w.-]*)[\"']\s*:", re.M)


@dataclass(frozen=True, slots=True)
class TaskText:
    """The parts of a task that are compared. `name` is the task's id, or empty for a training row."""

    instruction: str
    paths: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    tools: frozenset[str] = frozenset()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A text of an evaluation's task that occurs in training."""

    task: str
    kind: Kind
    text: str


def overlaps(
    tasks: Iterable[TaskText], training: Iterable[TaskText], *, conventional: Collection[str] = CONVENTIONAL
) -> list[Overlap]:
    """Return every path, key, tool, phrasing and template of `tasks` that occurs in `training`, in the order of tasks.

    Args:
        tasks: The evaluation.
        training: The training rows; they are read once.
        conventional: File names that may occur in both.
    """
    seen = {item for row in training for item in _items(row, conventional)}
    return [
        Overlap(task.name, kind, text)
        for task in tasks
        for kind, text in sorted(set(_items(task, conventional)))
        if (kind, text) in seen
    ]


def text_of(task: Task) -> TaskText:
    """Return the parts of a task that are compared.

    Paths are those of its files and those in its instruction. Keys are those in its files, whatever their
    format, and the properties of its output schema.
    """
    files = task.environment.files
    paths = {*files, *(found.strip(".") for found in _PATH.findall(task.instruction))}
    keys = {name for text in files.values() for found in _KEY.findall(text) for name in found if name}
    keys |= {*(task.output_schema or {}).get("properties", ())}
    tools = {tool.name for tool in task.tools if isinstance(tool, ToolConfig)}
    return TaskText(task.instruction, frozenset(paths), frozenset(keys), frozenset(tools), task.id)


def packaged_texts() -> list[TaskText]:
    """Return the texts of the hand-written suites, which no training row may share."""
    return [text_of(case.task) for name in HAND_WRITTEN for case in load_suite(str(PACKAGED_SUITES[name])).cases]


class Guard:
    """Recognises generated tasks that share a text with an evaluation, so that they are not drawn."""

    def __init__(self, tasks: Iterable[TaskText], *, conventional: Collection[str] = CONVENTIONAL) -> None:
        self._conventional = conventional
        self._items = {item for task in tasks for item in _items(task, conventional)}

    def shares(self, task: Task) -> bool:
        """Return whether the evaluation has a path, key, tool, phrasing or template of the task."""
        return any(item in self._items for item in _items(text_of(task), self._conventional))


def phrasing(instruction: str, names: Iterable[str] = ()) -> str:
    """Return an instruction in lower case with its names masked.

    Args:
        instruction: The instruction.
        names: Names to mask besides those that are recognised, such as paths with spaces.
    """
    text = instruction
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", _MASK, text)
    text = re.sub(r"[()]", " ", _QUOTED.sub(_MASK, text))
    words: list[str] = []
    for found in _WORD.finditer(text):
        word = found.group().strip(".,:;!?()-–")
        starts = not words or text[: found.start()].rstrip().endswith((".", "!", "?", ":"))
        masked = _MASK if _is_name(word, starts) else word.casefold()
        if word and not (masked == _MASK and words[-1:] == [_MASK]):
            words.append(masked)
    return " ".join(words)


def template(instruction: str, names: Iterable[str] = ()) -> tuple[str, str] | None:
    """Return the verb, or question word, of an instruction and its object, or None.

    None stands for an instruction without a known verb, and for an object that is missing, masked or generic.
    """
    words = phrasing(instruction, names).split()
    for place, word in enumerate(words):
        question = next((each for each in _QUESTIONS if " ".join(words[place : place + 2]).startswith(each)), None)
        if question is None and word not in _VERBS:
            continue
        verb = question if question in (word, " ".join(words[place : place + 2])) else word
        rest = words[place + len((verb or word).split()) :]
        thing = next((each for each in rest if each not in _SKIPPED), None)
        return None if verb is None or thing is None or thing == _MASK or thing in GENERIC else (verb, thing)
    return None


def _items(row: TaskText, conventional: Collection[str]) -> Iterator[tuple[Kind, str]]:
    for path in row.paths:
        if PurePosixPath(path).name not in conventional or "/" in path:
            yield "path", path
    for key in row.keys:
        if _several_words(key):
            yield "key", key
    for tool in row.tools:
        if _several_words(tool):
            yield "tool", tool
    yield "phrasing", phrasing(row.instruction, row.paths)
    if (found := template(row.instruction, row.paths)) is not None:
        yield "template", " ".join(found)


def _several_words(name: str) -> bool:
    return len(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+|\d+", name)) > 1


def _is_name(word: str, starts_sentence: bool) -> bool:
    """Return whether a word is a path, a number, an identifier, or capitalised within a sentence."""
    if word == _MASK or re.search(r"[\d_/@#=<>\\]|[^\s.:][.:]+\w", word):
        return True
    plain = word.replace("'", "")
    if plain in ("I", "Im", "Id", "Ive"):
        return False
    return plain[1:] != plain[1:].lower() or (plain[:1].isupper() and not starts_sentence)
