"""The search for bugs in one package: try faults, keep those that tests notice, check each by running it twice.

A fault is kept if, with every test of the package run twice in the changed state and twice after the fix, with
different hash seeds:

- at least one test that passes in the release fails, the same ones each time, and no more than half of them;
- every other test passes, and no test file fails to load;
- the fix, applied as a patch, gives back the files of the release exactly, and every test passes.

The failing tests are removed from the task's repository; `Bug.test_patch` restores them for scoring.
"""

from __future__ import annotations

import ast
import math
import random
import shlex
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import anyio

from agentkit.task import Strict
from agentkit_environments import HostFailureError, SandboxLostError
from agentkit_evals.errors import FailingTestsError, PackageError
from agentkit_evals.repository import PASSES
from agentkit_evals.synth.bugs.hidden_tests import function_of, path_of, without_tests
from agentkit_evals.synth.bugs.hunks import module_pairs, reversed_hunks
from agentkit_evals.synth.bugs.issue import issue_text
from agentkit_evals.synth.bugs.journal import Journal
from agentkit_evals.synth.bugs.mutate import Mutation, drawn
from agentkit_evals.synth.bugs.package import Package
from agentkit_evals.synth.bugs.sandbox import PackageSandbox, Runner

HASH_SEEDS = (0, 1)
BASELINE_TIMEOUT_S = 180.0
MIN_TIMEOUT_S = 10.0
MIN_PASSING = 0.9
"""Share of a package's tests that must pass without any change."""
MAX_FAILING = 0.5
"""Share of the tests that a bug may fail; a fault that fails more breaks the package as a whole."""
PER_FUNCTION = 2
"""Kept bugs per function."""
TRIES_PER_BUG = 8

Outcome = Literal["kept", "unnoticed", "hangs", "does not load", "too many fail", "unstable", "unlocated", "lasting"]
"""Result of one fault.

kept            a bug
unnoticed       every test that imports the module passes
hangs           the tests do not end in time, or they kill the sandbox
does not load   a test has no result: a test file cannot be loaded, or the run broke off
too many fail   more than `MAX_FAILING` of the tests fail
unstable        two runs of the same files differ
unlocated       a failing test is in no known file
lasting         the fix does not give back the release, or not all tests pass with it
"""


class Bug(Strict):
    """A bug with everything that a task needs. Patches are in git's format."""

    id: str
    kind: str
    path: str
    line: int
    function: str
    base_commit: str
    """Id of the commit that a task starts from: the release with the fault, without the failing tests."""
    bug_patch: str
    """From the release to the start of the task."""
    test_patch: str
    """Restores the failing tests."""
    fix: str
    """The gold patch."""
    issue: str
    fail_to_pass: list[str]
    pass_to_pass: list[str]
    test_files: list[str]
    """Files whose tests score: those with a failing test, and those that import the module."""
    runs: int
    """Runs of all tests that confirmed it: twice with the bug, twice with the fix."""


class Tried(Strict):
    """One fault that was tried."""

    number: int
    kind: str
    path: str
    line: int
    outcome: Outcome
    bug: Bug | None = None
    seconds: float


class Source(Strict):
    """The first line of a package's journal: what the faults and their order depend on."""

    format: Literal["agentkit.bugs"] = "agentkit.bugs"
    generator: str
    name: str
    version: str
    licence: str | None
    sha256: str
    previous: str | None
    seed: int
    runner: Runner


@dataclass(frozen=True, slots=True)
class Baseline:
    """The tests of a release that pass every time."""

    stable: frozenset[str]
    failing: int
    files: tuple[str, ...]
    """Test files with a stable test."""
    duration_s: float
    timeout_s: float


async def baseline(sandbox: PackageSandbox) -> Baseline:
    """Run all tests of the release twice.

    Raises:
        FailingTestsError: fewer than `MIN_PASSING` of them pass, or they do not end in time.
    """
    package, runs = sandbox.package, []
    for seed in HASH_SEEDS:
        await sandbox.reset()
        runs.append(await sandbox.test(package.tests, timeout_s=BASELINE_TIMEOUT_S, hash_seed=seed))
        if runs[-1].timed_out:
            raise FailingTestsError(f"{package.name}: the tests did not end within {BASELINE_TIMEOUT_S:g} s")
    names = frozenset().union(*(run.statuses for run in runs))
    stable = frozenset(name for name in names if all(run.statuses.get(name) in PASSES for run in runs))
    ran = [name for name in names if any(run.statuses.get(name) not in (None, "SKIPPED") for run in runs)]
    if not stable or len(stable) < MIN_PASSING * len(ran):
        raise FailingTestsError(
            f"{package.name}: {len(ran) - len(stable)} of {len(ran)} tests do not pass every time without any change:\n"
            f"{runs[0].output.strip()[-1500:]}"
        )
    located = {path_of(name, package.tests) for name in stable}
    duration_s = max(run.duration_s for run in runs)
    return Baseline(
        stable=stable,
        failing=len(ran) - len(stable),
        files=tuple(path for path in package.tests if path in located),
        duration_s=duration_s,
        timeout_s=max(MIN_TIMEOUT_S, 5 * duration_s),
    )


def faults(package: Package, previous: Package | None, seed: int) -> Iterator[tuple[str, Mutation]]:
    """Yield (path, fault) in an order that the seed determines: hunks of history, then mutations of each module in
    turn."""
    if previous is not None:
        hunks = [
            (path, fault) for path, old, new in module_pairs(previous, package) for fault in reversed_hunks(old, new)
        ]
        random.Random(f"{seed}/hunks").shuffle(hunks)
        yield from hunks
    texts = [(path, text) for path in package.modules if (text := package.text(path))]
    random.Random(f"{seed}/modules").shuffle(texts)
    waiting = [(path, drawn(text, random.Random(f"{seed}/{path}"))) for path, text in texts]
    while waiting:
        for path, mutations in list(waiting):
            if (fault := next(mutations, None)) is None:
                waiting.remove((path, mutations))
            else:
                yield path, fault


async def find(
    sandbox: PackageSandbox,
    journal: Journal[Source, Tried],
    *,
    base: Baseline,
    previous: Package | None,
    limit: int,
    timeout_s: float = math.inf,
) -> AsyncIterator[Tried]:
    """Try faults until `limit` bugs are kept or `timeout_s` has passed; continue after those of the journal.

    Yields each new entry.

    Raises:
        OutputError: the journal cannot be written.
        SandboxLostError: the sandbox died. The fault that killed it is in the journal, unless the host is to blame.
    """
    kept = [entry.bug for entry in journal.entries if entry.bug]
    done = {entry.number for entry in journal.entries}
    tries, deadline = TRIES_PER_BUG * limit + 20, anyio.current_time() + timeout_s
    for number, (path, fault) in enumerate(faults(sandbox.package, previous, journal.header.seed)):
        if len(kept) >= limit or len(journal.entries) >= tries or anyio.current_time() >= deadline:
            return
        places = [(bug.path, bug.function) for bug in kept]
        if number in done or places.count((path, fault.function)) >= PER_FUNCTION:
            continue
        started, lost = anyio.current_time(), None
        try:
            outcome, bug = await try_fault(sandbox, base, number, path, fault)
        except PackageError:  # git refuses a patch
            outcome, bug = "lasting", None
        except HostFailureError:
            raise
        except SandboxLostError as exc:
            outcome, bug, lost = "hangs", None, exc
        entry = Tried(
            number=number,
            kind=fault.kind,
            path=path,
            line=fault.line,
            outcome=outcome,
            bug=bug,
            seconds=round(anyio.current_time() - started, 2),
        )
        journal.append(entry)
        if lost:
            raise lost
        if bug:
            kept.append(bug)
        yield entry


class _Rejected(Exception):
    """A fault is not kept."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


async def try_fault(
    sandbox: PackageSandbox, base: Baseline, number: int, path: str, fault: Mutation
) -> tuple[Outcome, Bug | None]:
    """Return the outcome of one fault, with the bug if it is kept.

    Raises:
        PackageError: git refuses a patch of the fault.
        SandboxLostError: the sandbox died.
    """
    try:
        return "kept", await _bug(sandbox, base, number, path, fault)
    except _Rejected as rejected:
        return rejected.outcome, None


async def _bug(sandbox: PackageSandbox, base: Baseline, number: int, path: str, fault: Mutation) -> Bug:
    package = sandbox.package
    near = [file for file in importers(package, path) if file in base.files] or [*base.files]
    failing, output = await _failing_tests(sandbox, base, near, path, fault)
    by_file: dict[str, set[str]] = {}
    for name in failing:
        if (file := path_of(name, package.tests)) is None or b"\r" in package.files[file]:
            raise _Rejected("unlocated")
        by_file.setdefault(file, set()).add(function_of(name))

    bug_patch, commit = await _start_of_task(sandbox, path, fault, by_file)
    test_patch = await _patch_to_release(sandbox, commit, [*by_file])
    fix = await _patch_to_release(sandbox, commit, [path])
    await _confirm(sandbox, base, commit, test_patch, fix, frozenset(failing))

    test_files = sorted({*by_file, *near})
    scored = {name for name in base.stable if path_of(name, package.tests) in test_files}
    return Bug(
        id=f"{package.name}-{package.version}-{number:04}",
        kind=fault.kind,
        path=path,
        line=fault.line,
        function=fault.function,
        base_commit=commit,
        bug_patch=bug_patch,
        test_patch=test_patch,
        fix=fix,
        issue=issue_text(package, path, fault.function, fault.docstring, failing, output),
        fail_to_pass=failing,
        pass_to_pass=sorted(scored - {*failing}),
        test_files=test_files,
        runs=2 * len(HASH_SEEDS),
    )


async def _failing_tests(
    sandbox: PackageSandbox, base: Baseline, near: list[str], path: str, fault: Mutation
) -> tuple[list[str], str]:
    """Return the stable tests that fail with a fault, and the output of all tests: the first run with the bug."""
    await sandbox.reset()
    await sandbox.write(path, fault.text)
    quick = await sandbox.test(near, timeout_s=base.timeout_s, stop_at_first=True)
    if quick.timed_out:
        raise _Rejected("hangs")
    if not quick.failed and quick.statuses:
        raise _Rejected("unnoticed")
    await sandbox.reset()
    await sandbox.write(path, fault.text)
    red = await sandbox.test(base.files, timeout_s=base.timeout_s, hash_seed=HASH_SEEDS[0])
    if red.timed_out:
        raise _Rejected("hangs")
    if any(name not in red.statuses for name in base.stable):
        raise _Rejected("does not load")
    failing = sorted(name for name in base.stable if red.statuses[name] not in PASSES)
    if not failing:
        raise _Rejected("unstable")
    if len(failing) > MAX_FAILING * len(base.stable):
        raise _Rejected("too many fail")
    return failing, red.output


async def _start_of_task(
    sandbox: PackageSandbox, path: str, fault: Mutation, by_file: Mapping[str, set[str]]
) -> tuple[str, str]:
    """Make the fault and remove the failing tests; return the patch from the release, and the commit."""
    await sandbox.reset()
    await sandbox.write(path, fault.text)
    for file, functions in by_file.items():
        source = sandbox.package.text(file)
        text = without_tests(source, functions) if source else None
        if text is None:
            await sandbox.shell(f"rm -- {shlex.quote(file)}")
        else:
            await sandbox.write(file, text)
    return await sandbox.diff(), await sandbox.shell("git commit-tree -m 'Start of the task' $(git write-tree)")


async def _confirm(
    sandbox: PackageSandbox, base: Baseline, commit: str, test_patch: str, fix: str, failing: frozenset[str]
) -> None:
    """Run all tests for the second time with the bug, and twice with the fix; compare the files with the release."""

    async def failing_with(patch: str, hash_seed: int) -> frozenset[str] | None:
        await sandbox.reset(commit)
        await sandbox.apply(patch)
        run = await sandbox.test(base.files, timeout_s=base.timeout_s, hash_seed=hash_seed)
        return None if run.timed_out else frozenset(n for n in base.stable if run.statuses.get(n) not in PASSES)

    for hash_seed in HASH_SEEDS[1:]:
        if await failing_with(test_patch, hash_seed) != failing:
            raise _Rejected("unstable")
    for hash_seed in HASH_SEEDS:
        if await failing_with(test_patch + fix, hash_seed) != frozenset():
            raise _Rejected("lasting")
    await sandbox.reset(commit)
    await sandbox.apply(test_patch + fix)
    if await sandbox.shell(f"git add -A -f && git diff --cached --name-only {sandbox.release}"):
        raise _Rejected("lasting")


async def _patch_to_release(sandbox: PackageSandbox, commit: str, paths: list[str]) -> str:
    """Return the patch that gives files their content in the release."""
    await sandbox.reset(commit)
    await sandbox.shell(shlex.join(["git", "checkout", "-q", sandbox.release, "--", *paths]))
    return await sandbox.diff()


def importers(package: Package, path: str) -> list[str]:
    """Return the test files that import a module by its name, or all test files if none does."""
    module = path.removesuffix(".py").removeprefix("src/").removesuffix("/__init__").replace("/", ".")
    found = [file for file in package.tests if module in _imported(package.text(file) or "")]
    return found or [*package.tests]


def _imported(text: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
