"""The base of operations over tables, and the Python and shell that their oracles run.

The code has a few fixed shapes with the path, headers and values filled in.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentkit_evals.synth.artifacts.table import Column, Table, TableFormat, draw_table
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.operations.steps import run
from agentkit_evals.synth.oracle import Act, Step, submit
from agentkit_evals.synth.shell import quote
from agentkit_evals.synth.task import OperationOver

_LOAD = {
    "csv": "import csv\nrows = list(csv.DictReader(open({path!r})))",
    "tsv": "import csv\nrows = list(csv.DictReader(open({path!r}), delimiter='\\t'))",
    "jsonl": "import json\nrows = [json.loads(line) for line in open({path!r})]",
    "json": "import json\nrows = json.load(open({path!r}))",
    "md": "lines = [line.strip('|\\n ').split(' | ') for line in open({path!r})]\n"
    "rows = [dict(zip(lines[0], line)) for line in lines[2:]]",
}


class TableOperation(OperationOver[Table]):
    """An operation over a table."""

    artifact = Table

    def new(self, draw: Draw, kind: str) -> Table:
        return draw_table(draw)


def load(table: Table, name: str = "rows") -> str:
    """Return Python that reads a table into `rows`, a list of dictionaries."""
    code = _LOAD[table.format]
    if table.delimiter == ";":
        code = "import csv\nrows = list(csv.DictReader(open({path!r}), delimiter=';'))"
    return code.format(path=table.path).replace("rows = ", f"{name} = ")


def look(*tables: Table) -> Act:
    """Return the turn that looks at the first lines of each table."""
    calls = [run(f"head -n {9 if table.format == 'json' else 3} {quote(table.path)}") for table in tables]
    return Act(f"I look at the first lines of {' and '.join(f'`{table.path}`' for table in tables)}.", calls)


def value(column: Column) -> str:
    """Return the expression of a row's cell, converted if the column has numbers."""
    cell = f"row[{column.header!r}]"
    return f"int({cell})" if column.kind == "int" else f"float({cell})" if column.kind == "decimal" else cell


def computed(tables: Sequence[Table], reasoning: str, code: str) -> list[Step]:
    """Return an oracle that looks at the tables, runs Python, and submits what it printed."""
    return [
        lambda results: look(*tables),
        lambda results: Act(reasoning, [("python", {"code": code})]),
        lambda results: submit("The output is the answer.", results[0]),
    ]


def written(tables: Sequence[Table], reasoning: str, code: str) -> list[Step]:
    """Return an oracle that looks at the tables, runs Python that writes a file, and reports that it is done."""
    return [
        lambda results: look(*tables),
        lambda results: Act(reasoning, [("python", {"code": code})]),
        lambda results: submit("The file is written."),
    ]


_DUMP = {
    "csv": "with open({path!r}, 'w') as out:\n    writer = csv.DictWriter(out, rows[0], lineterminator='\\n')\n"
    "    writer.writeheader()\n    writer.writerows(rows)",
    "jsonl": "with open({path!r}, 'w') as out:\n    for row in rows:\n"
    "        out.write(json.dumps(row, ensure_ascii=False) + '\\n')",
    "json": "json.dump(rows, open({path!r}, 'w'), indent=2, ensure_ascii=False)",
    "md": "lines = [rows[0], ['---'] * len(rows[0]), *(row.values() for row in rows)]\n"
    "with open({path!r}, 'w') as out:\n    for line in lines:\n"
    "        out.write('| ' + ' | '.join(map(str, line)) + ' |\\n')",
}
_DUMP["tsv"] = _DUMP["csv"].replace("rows[0],", "rows[0], delimiter='\\t',")


def dump(form: TableFormat, path: str) -> str:
    """Return Python that writes `rows` to a file."""
    return _DUMP[form].format(path=path)


def script(*parts: str) -> str:
    """Join pieces of Python, with the imports that they need first and once."""
    code = "\n".join(part for part in parts if part)
    lines = [line for line in code.split("\n") if not line.startswith("import ")]
    imports = [f"import {name}" for name in ("csv", "json") if f"{name}." in code]
    return "\n".join([*imports, *lines])


def solution(code: str) -> str:
    """Return the shell command that runs the oracle's Python."""
    return f"python3 - <<'END_OF_CODE'\n{code}\nEND_OF_CODE"
