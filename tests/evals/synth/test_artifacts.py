"""The text of an artifact means what its fields say."""

from __future__ import annotations

import csv
import json
import subprocess

import pytest

from agentkit_evals.synth.artifacts.code import BUILTINS, draw_module
from agentkit_evals.synth.artifacts.items import Item, draw_items
from agentkit_evals.synth.artifacts.ledger import draw_ledger
from agentkit_evals.synth.artifacts.log import FORMATS, draw_log
from agentkit_evals.synth.artifacts.table import Table, draw_table, new_row
from agentkit_evals.synth.draw import Draw, Style

SEEDS = range(60)


def read(table: Table) -> list[dict[str, str]]:
    if table.format == "json":
        objects = json.loads(table.text)
    elif table.format == "jsonl":
        objects = [json.loads(line) for line in table.text.splitlines()]
    elif table.format == "md":
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.text.splitlines()]
        return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    else:
        return list(csv.DictReader(table.text.splitlines(), delimiter=table.delimiter))
    numbers = {column.header for column in table.columns if column.number}
    assert all((key in numbers) == (not isinstance(value, str)) for each in objects for key, value in each.items())
    return [{key: str(value) for key, value in each.items()} for each in objects]


def test_a_usual_file_name_has_a_folder_or_a_suffix() -> None:
    paths = [Draw(str(seed)).usual_path("csv", ["orders"]) for seed in range(200)]
    assert sum(path.rpartition("/")[2].startswith("orders") for path in paths) > 60
    assert "orders.csv" not in paths
    assert any(path.endswith("/orders.csv") for path in paths)


def test_a_table_reads_back_as_its_rows() -> None:
    formats = set()
    for seed in SEEDS:
        table = draw_table(Draw(f"table {seed}"))
        formats.add(table.format)
        decimals = {column.header for column in table.of("decimal")}
        for given, expected in zip(read(table), table.records(), strict=True):
            assert {**given, **{key: float(given[key]) for key in decimals}} == {
                **expected,
                **{key: float(expected[key]) for key in decimals},
            }
        labels = table.cells(table.label)
        assert len({*labels}) == len(labels) == len(table.rows) >= 3
        added = new_row(Draw(f"row {seed}"), table)
        assert len(added) == len(table.columns)
        assert added[table.columns.index(table.label)] not in labels
    assert formats == {"csv", "tsv", "jsonl", "json", "md"}


def test_the_fields_of_a_log_are_in_its_lines() -> None:
    formats = set()
    for seed in SEEDS:
        log = draw_log(Draw(f"log {seed}"))
        formats.add(log.format)
        assert log.text.splitlines() == [entry.text for entry in log.entries]
        for entry in log.entries:
            assert all(value in entry.text for value in entry.fields.values())
            if "level" in entry.fields:
                assert log.level.format(entry.fields["level"]) in entry.text
    assert formats == set(FORMATS)


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_of_a_column_prints_that_field(form: str) -> None:
    log = next(log for log in map(draw_log, (Draw(f"{seed}") for seed in range(200))) if log.format == form)
    for field, command in log.columns.items():
        printed = subprocess.run(["sh", "-c", command], input=log.text, capture_output=True, text=True, check=True)
        found = [line.removeprefix(f"{field}=").rstrip(":") for line in printed.stdout.splitlines()]
        expected = [value.rstrip(":") for value in log.values(field)]
        assert [text.partition("[")[0] for text in found] == expected


def test_a_list_is_written_as_its_items() -> None:
    formats = set()
    for seed in SEEDS:
        made = draw_items(Draw(f"list {seed}"))
        formats.add(made.format)
        assert made.text == made.written(made.items)
        assert made.text.count("\n") == len(made.items) + (2 if made.title else 0)
        texts = [item.text.lower() for item in made.items]
        assert not any(one in other for one in texts for other in texts if one is not other)
        assert made.another(Draw(str(seed))).lower() not in texts
    assert formats == {"plain", "dash", "star", "numbered", "todo"}


def test_a_done_item_has_a_checked_box() -> None:
    todo = next(made for made in (draw_items(Draw(str(seed))) for seed in range(300)) if made.format == "todo")
    assert todo.line(Item("Call Anna")) == "- [ ] Call Anna"
    assert todo.line(Item("Call Anna", done=True)) == "- [x] Call Anna"


def test_the_numbers_of_a_ledger_are_in_the_field_that_it_names() -> None:
    for seed in SEEDS:
        ledger = draw_ledger(Draw(f"ledger {seed}"))
        command = ["awk", f"{{ sum += {ledger.field} }} END {{ print sum }}"]
        printed = subprocess.run(command, input=ledger.text, capture_output=True, text=True, check=True).stdout
        assert float(printed) == pytest.approx(ledger.total, rel=1e-4)


def test_no_parameter_hides_a_builtin_that_the_function_calls() -> None:
    class Hiding(Draw):
        def noun(self) -> str:
            return self.choice(BUILTINS) if self.chance(0.8) else super().noun()

    for seed in range(200):
        assert draw_module(Hiding(f"module/{seed}")).functions


def test_no_module_is_named_like_one_of_python() -> None:
    class Named(Draw):
        def identifier(self, style: Style = "snake", *, parts: int | None = None) -> str:
            return "time"

    module = draw_module(Named("module"))
    assert module.name == "time_functions" and module.path.endswith("time_functions.py")
