"""Writes what was found to `kernels/results/aot.json` and to the table in `kernels/README.md`."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import platform
import tokenize
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from agentkit_kernels.aot import accepted
from agentkit_kernels.aot import calls as catalog
from agentkit_kernels.aot.compiling import Compiled
from agentkit_kernels.aot.counting import MOST_TOUCHED, Counted
from agentkit_kernels.aot.device import compiling_for
from agentkit_kernels.aot.targets import SM_90, TARGETS

PACKAGE = Path(__file__).parents[1]
RESULTS = PACKAGE.parent / "results" / "aot.json"
README = PACKAGE.parent / "README.md"
BEGIN, END = "<!-- aot: begin -->\n", "<!-- aot: end -->"


def sources() -> dict[str, str]:
    """Return a hash of the code of each file that the results depend on; comments and docstrings do not count."""
    kernels = (path for path in PACKAGE.glob("triton/*.py") if path.name != "backend.py")  # it only calls launchers
    files = [*kernels, *PACKAGE.glob("aot/*.py"), PACKAGE / "calls.py"]
    return {path.relative_to(PACKAGE).as_posix(): code_hash(path.read_text()) for path in sorted(files)}


def code_hash(text: str) -> str:
    """Return a hash of Python code that changes of comments, docstrings and blank lines leave as it is."""
    prose = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    code = [line.rstrip() for row, line in enumerate(lines, 1) if row not in prose and line.strip()]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Report:
    """The content of `aot.json`.

    Attributes:
        errors: By file of kernels: the largest relative error against its twin under the interpreter.
    """

    programs: list[Compiled]
    refused: list[str]
    counted: list[Counted]
    errors: Mapping[str, float]
    faults: list[str]

    @classmethod
    def read(cls, path: Path = RESULTS) -> Report:
        """Read a report.

        Raises:
            ValueError: There is no report, or it was made from other sources than those beside it.
        """
        if not path.exists():
            raise ValueError(f"There is no {path.name}. Make it with `make kernels-table`.")
        content = json.loads(path.read_text())
        made_from, now = content["sources"], sources()
        if changed := sorted(name for name in made_from | now if made_from.get(name) != now.get(name)):
            raise ValueError(
                f"{path.name} was made before these files changed: {', '.join(changed)}. "
                "Make it again with `make kernels-table`."
            )
        return cls(
            programs=[Compiled(**program) for program in content["programs"]],
            refused=content["refused"],
            counted=[Counted(**counted) for counted in content["counted"]],
            errors=content["errors"],
            faults=content["faults"],
        )

    def write(self, path: Path = RESULTS) -> None:
        """Write the report, one record per line."""
        path.parent.mkdir(exist_ok=True)
        content = {
            "versions": {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "sources": sources(),
            "errors": self.errors,
            "refused": self.refused,
            "faults": self.faults,
            "programs": [asdict(program) for program in self.programs],
            "counted": [asdict(counted) for counted in self.counted],
        }
        path.write_text("{\n" + ",\n".join(f'"{key}": {_records(value)}' for key, value in content.items()) + "\n}\n")

    def table(self) -> str:
        """Return the table of the README, one row per kernel of a call at V4-Flash's shapes, and what is wrong."""
        columns = ["kernel", "call", *TARGETS, "floor", "touched", "error"]
        rows = [columns, ["---"] * len(columns)]
        counted = {(counted.file, counted.call): counted for counted in self.counted}
        cells: dict[tuple[str, str, str], dict[str, Compiled]] = {}
        for program in self.programs:
            if program.shapes == "flash":
                of_target = cells.setdefault((program.file, program.call, program.kernel), {})
                other = of_target.get(program.target, program)
                of_target[program.target] = max(other, program, key=lambda one: (one.spill_bytes, one.registers))
        for (file, call, kernel), of_target in cells.items():
            traffic = counted.get((file, call))
            rows.append(
                [
                    f"`{file}.{kernel.lstrip('_')}`",
                    call,
                    *(_cell(of_target.get(target)) for target in TARGETS),
                    _size(traffic.flash_floor_bytes) if traffic and traffic.flash_floor_bytes else "",
                    _touched(traffic) if traffic else "",
                    f"{self.errors[file]:.0e}" if file in self.errors else "",
                ]
            )
        lines = [f"| {' | '.join(row)} |" for row in rows]
        for title, found in (("Refused", self.refused), ("Faults", self.faults)):
            if found:
                lines += ["", f"{title}:", "", *(f"- {one}" for one in found)]
        return "\n".join(lines) + "\n"


def uncounted(report: Report) -> list[tuple[str, str]]:
    """Return the calls, as file and name, that are listed but not counted in the report."""
    with compiling_for(SM_90):  # launchers ask for a target
        listed = [
            (file, call.name)
            for file in catalog.kernel_files()
            for call in catalog.counted_calls(file, catalog.OnMeta())
        ]
    return sorted(set(listed) - {(counted.file, counted.call) for counted in report.counted})


def stale(report: Report) -> list[str]:
    """Return the entries of `accepted.py` that nothing in the report needs."""
    spilling = {(program.kernel, program.target) for program in report.programs if program.spill_bytes}
    unused = [f"{kernel} on {target} spills nothing" for kernel, target in accepted.SPILLS.keys() - spilling]
    for file, start in accepted.EXCESSES:
        calls = (one for one in report.counted if one.file == file and one.call.startswith(start))
        if not any(one.touched_bytes > MOST_TOUCHED * one.floor_bytes for one in calls):
            unused.append(f"{file}.py ({start}) touches no more than {MOST_TOUCHED} times its floor")
    on_cores = {(one.file, one.call, one.target) for one in report.programs if one.tensor_cores}
    without = {(one.file, one.call) for one in report.programs if (one.file, one.call, one.target) not in on_cores}
    for file, part in accepted.FLOAT_PRODUCTS:
        if not any(of == file and part in call for of, call in without):
            unused.append(f"{file}.py ({part}) has no product without tensor cores")
    return sorted(unused)


def write_table(report: Report, readme: Path = README) -> None:
    """Replace the table between the markers of the README."""
    readme.write_text(_with_table(readme.read_text(), report.table()))


def table_is_current(report: Report, readme: Path = README) -> bool:
    """Return whether the README shows this report's table."""
    return readme.read_text() == _with_table(readme.read_text(), report.table())


def _with_table(text: str, table: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table}{END}{rest.split(END)[1]}"


def _records(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value, indent=1)
    return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"


def _cell(program: Compiled | None) -> str:
    if program is None:
        return ""
    shared = f"{program.shared_bytes / 1024:.0f} K"
    tensor_cores = "T" if program.tensor_cores else "-"
    return f"{program.registers} · {shared} · {tensor_cores} · {program.wide_share:.0%}"


def _touched(traffic: Counted) -> str:
    """The multiple of the floor, and what it comes to at V4-Flash's shapes."""
    ratio = traffic.touched_bytes / traffic.floor_bytes
    at_flash = f" · {_size(round(ratio * traffic.flash_floor_bytes))}" if traffic.flash_floor_bytes else ""
    return f"{ratio:.2f}{at_flash}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
