"""Write the packaged suite `generated`, small held-out tasks of operations: `python -m agentkit_evals.synth.packaged`.

The files are committed, so that `agentkit demo` needs no packages of the `synth` extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from agentkit.task import Task
from agentkit_evals.suite import GENERATED, PACKAGED_SUITES
from agentkit_evals.synth.operations import OPERATIONS
from agentkit_evals.synth.world import world_seed

SEED = 4
CHOSEN = (
    *("read_setting", "change_setting", "ask_note", "ask_mail", "ask_agenda", "count_files", "find_text"),
    *("create_file", "move_file", "append_line", "list_files", "recover", "missing", "replace_word"),
    *("compute", "run_script", "fix_bug", "rename_identifier", "call_function", "two_requests"),
    *("count_rows", "look_up_row", "add_row", "aggregate_column", "convert_table", "sort_table"),
    *("count_items", "has_item", "add_item", "check_item", "count_lines", "find_line"),
)
"""Operations whose tasks can be understood at a glance."""
MOST_FILES, MOST_CHARACTERS, LONGEST_INSTRUCTION = 6, 1600, 140


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for one YAML file per task.")] = PACKAGED_SUITES[GENERATED],
) -> None:
    """Write the first small held-out task of each chosen operation, and remove other task files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for name, task in tasks():
        (folder / f"{name}.yaml").write_text(yaml_of(task), encoding="utf-8")
    print(folder)


def tasks() -> Iterator[tuple[str, Task]]:
    """Yield the chosen operations with their tasks, each from worlds of its own."""
    for place, name in enumerate(CHOSEN):
        drawn = (OPERATIONS[name].sample(world_seed(SEED, index), 0, "heldout") for index in count(1000 * place))
        yield name, next(made.task for made in drawn if made is not None and _is_small(made.task))


def yaml_of(task: Task) -> str:
    """Return a task as YAML, with texts of several lines as blocks."""
    data = task.model_dump(mode="json", exclude_defaults=True)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _is_small(task: Task) -> bool:
    files: Any = task.environment.files
    characters = sum(map(len, files.values()))
    return (
        len(files) <= MOST_FILES
        and characters <= MOST_CHARACTERS
        and len(task.instruction) <= LONGEST_INSTRUCTION
        and "\n" not in task.instruction
    )


if __name__ == "__main__":
    typer.run(main)
