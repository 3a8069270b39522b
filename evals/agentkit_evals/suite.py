"""Suites: the tasks of an evaluation.

A suite is a folder of task files, tables (`table.py`) and task directories (`harbor/`), one of these, a data set
(`dataset.py`), a suite file, the name of a packaged suite (`PACKAGED_SUITES`), or `synth`, tasks that are generated
when the suite is loaded:

    name: nightly
    tasks: [smoke.yaml, more/]                                       # files and folders beside this file, in order
    synth: {operations: [count_rows, fix_bug], per_operation: 10}    # held-out tasks
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import Field

from agentkit.errors import TaskFileError
from agentkit.models.scripted import Policy
from agentkit.task import Identifier, RelativePath, Strict, Task, load_task, load_yaml, read_yaml
from agentkit_evals.bfcl import is_bfcl, read_bfcl
from agentkit_evals.dataset import read_rows
from agentkit_evals.errors import SuiteError
from agentkit_evals.harbor import is_task_directory, read_task_directory
from agentkit_evals.swebench import is_swebench, read_swebench
from agentkit_evals.synth import Split, synth_extra
from agentkit_evals.table import read_table

if TYPE_CHECKING:
    from agentkit_evals.synth.task import Operation

HAND_WRITTEN = ("everyday", "impossible", "readme", "own-tools")
GENERATED = "generated"
PACKAGED_SUITES = {name: Path(__file__).parent / "suites" / name for name in (*HAND_WRITTEN, GENERATED)}
"""Suites by name; none of them is training data. A path of the same name takes precedence."""


@dataclass(frozen=True, slots=True)
class Case:
    """One task of a suite, with the fields that reports group by.

    Generated tasks also have a `signature`, which is the task with names and values masked, and an `oracle`, which
    returns a policy that solves the task.
    """

    task: Task
    family: str
    phrasing: str = ""
    held_out_phrasing: bool = False
    signature: str = ""
    oracle: Callable[[], Policy] | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """The tasks of one evaluation, in order, with distinct ids."""

    name: str
    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        if not self.cases:
            raise SuiteError(f"suite {self.name} has no tasks; add task files or `synth`")
        seen: set[str] = set()
        for case in self.cases:
            if case.task.id in seen:
                raise SuiteError(f"suite {self.name}: two tasks have the id {case.task.id!r}; ids must be unique")
            if case.task.verifier is None:
                raise SuiteError(f"suite {self.name}: task {case.task.id!r} has no verifier; add one to score it")
            seen.add(case.task.id)


class SynthSelection(Strict):
    """A choice of generated tasks. Empty `operations` means all; `seed` None uses the seed of the run."""

    operations: list[str] = Field(default_factory=list)
    per_operation: int = Field(default=3, ge=1, le=10_000)
    seed: int | None = Field(default=None, ge=0, lt=1 << 31)
    split: Split = "heldout"


class SuiteFile(Strict):
    """Contents of a suite file."""

    name: Identifier | None = None
    tasks: list[RelativePath] = Field(default_factory=list)
    synth: SynthSelection | None = None


def load_suite(spec: str, *, seed: int = 0, limit: int | None = None, per_operation: int | None = None) -> Suite:
    """Load a suite from a path or a packaged suite, or generate one from `synth` or `synth:OPERATION,OPERATION`.

    Args:
        spec: The path, the name of a packaged suite, or the `synth` selection.
        seed: Seed of the generated tasks.
        limit: Maximum number of tasks: the first ones of a file or folder; for `synth`, from each operation in turn.
        per_operation: Number of tasks to generate per operation; for `synth` only.

    Raises:
        SuiteError: there is no task, an id occurs twice, a task has no verifier, an operation is unknown, or
            `per_operation` is given for tasks that are not generated.
        TaskFileError: a file is wrong; the message has file and line.
        MissingDependencyError: tasks are to be generated, and the `synth` extra is not installed.
    """
    head, _, names = spec.partition(":")
    path = Path(spec)
    if spec in PACKAGED_SUITES and not path.exists():
        path = PACKAGED_SUITES[spec]
    if head == "synth" and not path.exists():
        chosen = [name for name in names.split(",") if name]
        if spec != "synth" and not chosen:
            raise SuiteError(f"{spec} names no operation; give synth:OPERATION,OPERATION, or synth for all")
        if per_operation is None and limit is not None:
            per_operation = -(-limit // len(chosen or load_operations()))
        suite = synth_suite(SynthSelection(operations=chosen, per_operation=per_operation or 3), seed=seed)
        if limit is not None and limit < len(suite.cases):
            suite = Suite(suite.name, in_turn(suite.cases, limit))
    elif per_operation is not None:
        raise SuiteError(f"{spec} is not generated, so the tasks per operation cannot be set; use a limit")
    elif path.is_dir():
        cases = tuple(_folder(path))
        if not cases and (rows := sorted(file.name for file in path.glob("*.jsonl"))):
            raise SuiteError(f"{spec} has no task files, but data sets; give one of them: {', '.join(rows[:8])}")
        suite = Suite(path.resolve().name, cases)
    elif path.is_file() and _is_dataset(path):
        suite = Suite(path.stem, tuple(_dataset(path)))
    elif path.is_file() and _is_suite_file(path):
        suite = _suite_file(path, seed)
    else:
        suite = Suite(path.stem, tuple(_file(path, path.stem)))
    return suite if limit is None else Suite(suite.name, suite.cases[:limit])


def load_operations() -> Mapping[str, Operation]:
    """Return the operations of generated tasks by name.

    Raises:
        MissingDependencyError: the `synth` extra is not installed.
    """
    with synth_extra():
        from agentkit_evals.synth.operations import OPERATIONS
    return OPERATIONS


def synth_suite(selection: SynthSelection, *, seed: int = 0) -> Suite:
    """Generate `per_operation` tasks per operation, each over a world of its own.

    Raises:
        SuiteError: an operation is unknown or named twice.
        MissingDependencyError: the `synth` extra is not installed.
    """
    operations = load_operations()
    from agentkit_evals.synth.world import world_seed  # after the check that the extra is installed

    for name in selection.operations:
        if name not in operations:
            near = difflib.get_close_matches(name, operations, n=1)
            advice = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(operations)}"
            raise SuiteError(f'unknown operation "{name}"; {advice}')
        if selection.operations.count(name) > 1:
            raise SuiteError(f"operation {name} is named twice; name it once")
    first = seed if selection.seed is None else selection.seed
    cases: list[Case] = []
    for name in selection.operations or operations:
        worlds = (world_seed(first, index) for index in itertools.count())
        drawn = (operations[name].sample(world, 0, selection.split) for world in worlds)
        cases += (
            Case(made.task, name, made.phrasing, made.held_out_phrasing, made.signature, made.oracle)
            for made in itertools.islice((made for made in drawn if made is not None), selection.per_operation)
        )
    return Suite("synth", tuple(cases))


def in_turn(cases: Sequence[Case], limit: int) -> tuple[Case, ...]:
    """Return `limit` cases, chosen from each family in turn, in the order of the suite."""
    rank: dict[str, int] = {}
    order: list[tuple[int, int]] = []
    for place, case in enumerate(cases):
        rank[case.family] = rank.get(case.family, 0) + 1
        order.append((rank[case.family], place))
    return tuple(cases[place] for place in sorted(place for _, place in sorted(order)[:limit]))


def _suite_file(path: Path, seed: int) -> Suite:
    content = load_yaml(path, SuiteFile)
    name = content.name or path.stem
    cases: list[Case] = []
    for entry in content.tasks:
        target = path.parent / entry
        if target.is_dir():
            cases += _folder(target)
        elif _is_dataset(target):
            cases += _dataset(target)
        else:
            cases += _file(target, name)
    if content.synth is not None:
        cases += synth_suite(content.synth, seed=seed).cases
    return Suite(name, tuple(cases))


def _is_dataset(path: Path) -> bool:
    """Return whether a file is a data set. BFCL's files end in .json, which may also be one task."""
    if path.suffix != ".json":
        return path.suffix == ".jsonl"
    try:
        first = next(read_rows(path), None)
    except TaskFileError:
        return False
    return first is not None and (is_bfcl(first.data) or is_swebench(first.data))


def _dataset(path: Path) -> Iterable[Case]:
    """Return the tasks of a data set. Its first row determines the kind of rows."""
    for row in read_rows(path):
        if is_bfcl(row.data):
            return (Case(task, family) for task, family in read_bfcl(path))
        if is_swebench(row.data):
            return (Case(task, family) for task, family in read_swebench(path))
        raise row.error(
            f"unknown kind of row with the keys {', '.join(list(row.data)[:8])}; expected BFCL rows (id, question, "
            "function) or SWE-bench rows (instance_id, base_commit, problem_statement, ...)"
        )
    raise SuiteError(f"{path} has no rows; expected one JSON object per line")


def _folder(path: Path) -> Iterable[Case]:
    return [case for file in task_files(path) for case in _file(file, path.resolve().name)]


def _file(path: Path, family: str) -> Iterable[Case]:
    """Return the tasks of a table, or the one task of a task file or directory."""
    if path.is_dir():
        return [_case(read_task_directory(path), family)]
    if "rows" in _keys(path):
        return [_case(task, family) for task in read_table(path)]
    return [_case(load_task(path), family)]


def task_files(folder: Path) -> list[Path]:
    """Return all task files, tables and task directories in and below a folder, sorted; suite files are left out.

    A folder that is a task directory is the only one; the files in a task directory are part of that task.
    """
    if is_task_directory(folder):
        return [folder]
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        tasks = [name for name in folders if is_task_directory(Path(place, name))]
        folders[:] = [name for name in folders if name not in tasks]
        found += [Path(place, name) for name in tasks]
        found += [path for name in files if (path := Path(place, name)).suffix in (".yaml", ".yml")]
    return sorted(path for path in found if path.is_dir() or not _is_suite_file(path))


def _case(task: Task, family: str) -> Case:
    return Case(task, str(task.metadata.get("family", family)))


def _is_suite_file(path: Path) -> bool:
    """Return whether a YAML file is a suite file."""
    keys = _keys(path)
    return "instruction" not in keys and bool({"tasks", "synth"} & keys)


def _keys(path: Path) -> set[str]:
    """Return the top-level keys of a YAML file. A broken file has none: the task reader then reports its error."""
    try:
        root, _ = read_yaml(path)
    except TaskFileError:
        return set()
    nodes = [key for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    return {key.value for key in nodes if isinstance(key, yaml.ScalarNode)}
