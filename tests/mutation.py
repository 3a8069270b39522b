"""Mutation testing: change one thing in the source, and see whether a test notices.

    pip install --group mutation
    python tests/mutation.py --count 200 --seed 1    # coverage first, then the mutants; results in mutants.jsonl
    python tests/mutation.py --show                  # the survivors of the last run

Cosmic Ray makes the mutants. Each runs against the tests that execute its lines (by coverage contexts), the fastest
first, up to `TEST_SECONDS` in all. The files named in `FILES` are mutated in place and restored: work in a clean
checkout. Mutants of type annotations and of text are left out, because nothing could notice them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec
from coverage import CoverageData

ROOT = Path(__file__).parents[1]
FILES = (
    "agentkit/agentkit/agent.py",
    "agentkit/agentkit/turn.py",
    "engine/agentkit_engine/async_engine.py",
    "engine/agentkit_engine/chat/v4_*.py",
    "engine/agentkit_engine/runtime/scheduler.py",
    "engine/agentkit_engine/runtime/state.py",
    "evals/agentkit_evals/statistics.py",
    "evals/agentkit_evals/verify.py",
    "tools/agentkit_tools/*.py",
)
RESULTS = ROOT / "mutants.jsonl"
TEST_SECONDS = 40.0
"""Seconds of tests (as timed without a mutation) that one mutant meets at most."""
TIMEOUT_S = 240.0
"""A mutant that takes this long hangs, and so counts as noticed."""
NEEDLESS = ("ReplaceBinaryOperator_BitOr", "ReplaceBinaryOperator_BitAnd", "RemoveDecorator")
"""Operators that change annotations (`X | None`), or take `@property` away, which every caller notices."""


@dataclass(frozen=True, slots=True)
class Covered:
    """The tests of each line, and the seconds of each test."""

    data: CoverageData
    seconds: dict[str, float]

    def tests(self, file: Path, lines: Iterable[int]) -> list[str]:
        """Return the tests that execute one of the lines, fastest first, up to `TEST_SECONDS`.

        Lines that run at import, before any test, get the tests of the whole file.
        """
        contexts = self.data.contexts_by_lineno(str(file))
        executed = [context for line in lines for context in contexts.get(line, [])]
        if executed and not any(executed):
            executed = [context for every in contexts.values() for context in every]
        names = {context.rpartition("|")[0] for context in executed if context}
        chosen: list[str] = []
        total = 0.0
        for name in sorted(names & self.seconds.keys(), key=lambda name: self.seconds[name]):
            total += self.seconds[name]
            if chosen and total > TEST_SECONDS:
                break
            chosen.append(name)
        return chosen


def cover(folder: Path, tests: list[str]) -> Covered:
    """Run the tests once with coverage, a context per test."""
    report = folder / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *tests,
        "--cov-context=test",
        "--cov-report=",
        f"--junitxml={report}",
    ]
    command += [f"--cov={package}" for package in ("agentkit", "agentkit_engine", "agentkit_evals", "agentkit_tools")]
    subprocess.run([*command, "-o", "junit_family=xunit1"], cwd=ROOT, check=True)
    data = CoverageData(str(ROOT / ".coverage"))
    data.read()
    seconds = {}
    for case in ElementTree.parse(report).iter("testcase"):
        seconds[f"{case.get('file')}::{case.get('name')}"] = float(case.get("time") or 0)
    return Covered(data, seconds)


def draw(files: list[Path], seed: int) -> Iterator[MutationSpec]:
    """Yield mutants in random order, at most one per line."""
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/mutants.sqlite", WorkDB.Mode.create) as database:
        init(files, database, {})
        mutants = [mutation for item in database.work_items for mutation in item.mutations]
    lines: dict[tuple[Path, int], list[MutationSpec]] = {}
    for mutant in mutants:
        if not any(name in mutant.operator_name for name in NEEDLESS):
            lines.setdefault((mutant.module_path, mutant.start_pos[0]), []).append(mutant)
    choice = random.Random(seed)
    for line in choice.sample(sorted(lines), len(lines)):
        yield choice.choice(lines[line])


def try_out(mutant: MutationSpec, covered: Covered) -> dict[str, object] | None:
    """Run the mutant's tests: "killed" when one fails or hangs, "survived", or "not covered"; None if it is no code."""
    file = mutant.module_path.resolve()
    tests = covered.tests(file, range(mutant.start_pos[0], mutant.end_pos[0] + 1))
    operator = cosmic_ray.plugins.get_operator(mutant.operator_name)(**mutant.operator_args)
    with use_mutation(file, operator, mutant.occurrence) as (before, after):
        if after is None or not _is_code(after):
            return None
        said = {
            "file": str(file.relative_to(ROOT)),
            "line": mutant.start_pos[0],
            "operator": mutant.operator_name.removeprefix("core/"),
            "before": _line(before, mutant.start_pos[0]),
            "after": _line(after, mutant.start_pos[0]),
            "tests": len(tests),
        }
        if not tests:
            return {**said, "outcome": "not covered"}
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as names:
            names.write("\n".join(tests))  # too long for a command line
            names.flush()
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
            try:
                done = subprocess.run([*command, f"@{names.name}"], cwd=ROOT, capture_output=True, timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return {**said, "outcome": "killed", "by": "timeout"}
        return {**said, "outcome": "killed" if done.returncode else "survived"}


def _is_code(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _line(source: str, number: int) -> str:
    return source.splitlines()[number - 1].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, help="patterns of files to mutate")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tests", nargs="*", default=["tests"], help="what coverage is taken of")
    parser.add_argument("--show", action="store_true", help="list the survivors of the last run")
    arguments = parser.parse_args()
    if arguments.show:
        for line in RESULTS.read_text().splitlines():
            said = json.loads(line)
            if said["outcome"] != "killed":
                print(f"{said['file']}:{said['line']} {said['outcome']}\n- {said['before']}\n+ {said['after']}")
        return
    files = sorted(file for pattern in arguments.files for file in ROOT.glob(pattern))
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("w") as results:
        covered = cover(Path(folder), arguments.tests)
        tried = filter(None, (try_out(mutant, covered) for mutant in draw(files, arguments.seed)))
        for number, said in enumerate(islice(tried, arguments.count), start=1):
            print(number, said["outcome"], f"{said['file']}:{said['line']}", said["after"], flush=True)
            results.write(json.dumps(said) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
