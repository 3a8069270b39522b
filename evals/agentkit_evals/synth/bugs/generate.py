"""Bugs of many packages: fetch, search, export, and a card with what was made.

OUT/cache/                 source distributions and wheels
OUT/packages/NAME-VERSION.jsonl    one line per fault that was tried, as it is tried; a later run continues it
OUT/tasks, swebench, harbor        exports, written from the journals (`export.py`)
OUT/card.json              per package: numbers, kinds of faults, seconds, share kept
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from agentkit_environments import HostFailureError, SandboxLostError
from agentkit_evals.errors import PackageError, not_written
from agentkit_evals.provenance import Provenance, generator_name
from agentkit_evals.synth.bugs.export import EXPORT_FORMATS, ExportFormat, export
from agentkit_evals.synth.bugs.find import Baseline, Source, Tried, baseline, find
from agentkit_evals.synth.bugs.journal import Journal
from agentkit_evals.synth.bugs.package import Package, PackageSpec, fetch, local_package, read_package
from agentkit_evals.synth.bugs.sandbox import PackageSandbox, runner_of
from agentkit_evals.verify import Backend

GENERATOR = "synth.bugs"
MAX_SANDBOXES = 10
"""Sandboxes per package: a fault can make tests kill theirs."""


@dataclass(frozen=True, slots=True)
class PackageProgress:
    """State of one package, reported after each fault."""

    package: str
    kept: int
    tried: int
    problem: str | None = None


async def make_bugs(
    specs: Sequence[PackageSpec | Path],
    out: Path,
    *,
    limit: int = 20,
    seed: int = 0,
    formats: Sequence[ExportFormat] = EXPORT_FORMATS,
    jobs: int = 2,
    backend: Backend = "process",
    index: Path | None = None,
    timeout_s: float = math.inf,
    report: Callable[[PackageProgress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Make up to `limit` bugs in each package, export them, and return the card.

    A package that cannot be used is listed in the card. If none can be used, that is raised: for a single package, with
    the reason, which is then not reported.

    Args:
        specs: Packages to fetch, and folders that hold one.
        out: Output folder; what an earlier run with the same settings has found is kept.
        limit: Bugs per package.
        seed: Determines which faults are tried, and in which order.
        formats: Formats of the export.
        jobs: Packages at a time, each in a sandbox of its own.
        backend: Sandbox backend.
        index: A folder of source distributions, in place of the package index.
        timeout_s: Seconds after which the search in a package ends.
        report: Called after each fault, and when one of several packages is refused.

    Raises:
        PackageError: no package can be used.
        SandboxUnavailableError: no sandbox can be opened.
        RunDirectoryError: `out` holds the output of other settings.
        OutputError: a file cannot be written. The next run continues.
    """
    cards: dict[int, dict[str, Any]] = {}
    refused: dict[int, PackageError] = {}
    limiter = anyio.CapacityLimiter(jobs)
    writing = anyio.Lock()

    async def make(number: int, spec: PackageSpec | Path) -> None:
        async with limiter:
            try:
                cards[number] = await _package(
                    spec, out, limit, seed, formats, backend, index, timeout_s, report, writing
                )
            except PackageError as exc:
                refused[number] = exc
                if len(specs) > 1:
                    report(PackageProgress(str(spec), 0, 0, str(exc)))

    async with anyio.create_task_group() as group:
        for number, spec in enumerate(specs):
            group.start_soon(make, number, spec)
    if refused and not cards:
        first = refused[min(refused)]
        if len(specs) == 1:
            raise first
        raise PackageError(f"none of the {len(specs)} packages can be used; the reason of each was reported") from first
    card = _card([cards[number] for number in sorted(cards)], limit, seed)
    card["refused"] = [{"package": str(specs[n]), "reason": str(refused[n])[:300]} for n in sorted(refused)]
    try:
        (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    except OSError as exc:
        raise not_written(exc, out) from exc
    return card


async def _package(
    spec: PackageSpec | Path,
    out: Path,
    limit: int,
    seed: int,
    formats: Sequence[ExportFormat],
    backend: Backend,
    index: Path | None,
    timeout_s: float,
    report: Callable[[PackageProgress], None],
    writing: anyio.Lock,
) -> dict[str, Any]:
    started = anyio.current_time()
    package, previous = await anyio.to_thread.run_sync(_releases, spec, out / "cache", index)
    source = Source(
        generator=generator_name(GENERATOR),
        name=package.name,
        version=package.version,
        licence=package.licence,
        sha256=package.sha256,
        previous=previous.version if previous else None,
        seed=seed,
        runner=runner_of(package),
    )
    journal = Journal(out / "packages" / f"{package.name}-{package.version}.jsonl", source, Tried)
    before = len(journal.entries)
    base = await _search(package, previous, journal, out / "cache", limit, backend, timeout_s, report)
    bugs = [entry.bug for entry in journal.entries if entry.bug][:limit]
    provenance = Provenance(
        generator=source.generator,
        seed=seed,
        package=package.name,
        version=package.version,
        licence=package.licence,
        sha256=package.sha256,
    )
    async with writing:
        if bugs:
            await anyio.to_thread.run_sync(export, package, source.runner, bugs, provenance, out, formats)
    return _package_card(journal, base, limit, anyio.current_time() - started, resumed=before)


async def _search(
    package: Package,
    previous: Package | None,
    journal: Journal[Source, Tried],
    cache: Path,
    limit: int,
    backend: Backend,
    timeout_s: float,
    report: Callable[[PackageProgress], None],
) -> Baseline:
    """Fill the journal with `limit` bugs. A sandbox that a fault has killed is replaced."""
    label = f"{package.name}-{package.version}"
    for attempt in range(1, MAX_SANDBOXES + 1):
        try:
            async with await PackageSandbox.open(package, cache=cache, backend=backend) as sandbox:
                base = await baseline(sandbox)
                search = find(sandbox, journal, base=base, previous=previous, limit=limit, timeout_s=timeout_s)
                async for _ in search:
                    kept = sum(entry.bug is not None for entry in journal.entries)
                    report(PackageProgress(label, kept, len(journal.entries)))
                return base
        except HostFailureError:
            raise
        except SandboxLostError:
            if attempt == MAX_SANDBOXES:
                raise
    raise AssertionError("the last attempt returns or raises")


def _releases(spec: PackageSpec | Path, cache: Path, index: Path | None) -> tuple[Package, Package | None]:
    if isinstance(spec, Path):
        return local_package(spec), None
    try:
        package = read_package(fetch(spec, cache, index), spec)
        if spec.previous is None:
            return package, None
        earlier = PackageSpec(spec.name, spec.previous)
        return package, read_package(fetch(earlier, cache, index), earlier)
    except OSError as exc:
        raise not_written(exc, cache) from exc


def _package_card(
    journal: Journal[Source, Tried], base: Baseline, limit: int, seconds: float, *, resumed: int
) -> dict[str, Any]:
    tried = journal.entries
    kept = [entry for entry in tried if entry.bug][:limit]
    confirmed = sum(entry.outcome in ("kept", "unstable", "lasting") for entry in tried)
    header = journal.header
    return {
        "package": header.name,
        "version": header.version,
        "licence": header.licence,
        "sha256": header.sha256,
        "previous": header.previous,
        "runner": header.runner,
        "tests": len(base.stable),
        "tests_failing_before": base.failing,
        "tests_s": round(base.duration_s, 2),
        "tried": len(tried),
        "kept": len(kept),
        "share_kept": round(len(kept) / max(1, len(tried)), 3),
        "outcomes": dict(sorted(Counter(entry.outcome for entry in tried).items())),
        "kinds": dict(sorted(Counter(entry.kind for entry in kept).items())),
        "checked_twice": confirmed,
        "passed_both_checks": sum(entry.bug is not None for entry in tried),
        "seconds": round(sum(entry.seconds for entry in tried), 1),
        "wall_s": round(seconds, 1),
        "resumed_from": resumed,
    }


def _card(packages: list[dict[str, Any]], limit: int, seed: int) -> dict[str, Any]:
    def total(key: str) -> dict[str, int]:
        return dict(sorted(sum((Counter(each[key]) for each in packages), Counter[str]()).items()))

    return {
        "generator": generator_name(GENERATOR),
        "command": sys.argv[1:],
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        "seed": seed,
        "limit": limit,
        "bugs": sum(each["kept"] for each in packages),
        "packages_with_bugs": sum(each["kept"] > 0 for each in packages),
        "tried": sum(each["tried"] for each in packages),
        "kinds": total("kinds"),
        "outcomes": total("outcomes"),
        "seconds": round(sum(each["seconds"] for each in packages), 1),
        "packages": packages,
    }
