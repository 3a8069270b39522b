"""Each reason for which a fault is not kept, and sandboxes that die of one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest

from agentkit_environments import HostFailureError, SandboxLostError
from agentkit_evals.synth.bugs import PackageSpec, generate, make_bugs
from agentkit_evals.synth.bugs.find import Outcome, baseline, importers, try_fault
from agentkit_evals.synth.bugs.mutate import Mutation
from agentkit_evals.synth.bugs.package import Package, read_package
from agentkit_evals.synth.bugs.sandbox import PackageSandbox, TestRun

MakeSdist = Callable[..., Path]

BROKEN_BY_SEED = "result = 0 if __import__('os').environ['PYTHONHASHSEED'] == '1' else 1"
FAULTS: list[tuple[Outcome, str, str]] = [
    ("unnoticed", "prices, discount=0", "prices, discount=False"),
    ("hangs", "result = 0\n", "while True: pass\n"),
    ("does not load", "def total", "raise ImportError\n\ndef total"),
    ("too many fail", "def total", "def total(*a): 1 / 0\n\ncheapest = label = total\n\ndef unused"),
    ("unstable", "result = 0", BROKEN_BY_SEED),
    ("kept", "// 100", "// 10"),
]


@pytest.fixture
async def sandbox(make_sdist: MakeSdist, tmp_path: Path) -> AsyncIterator[PackageSandbox]:
    async with await PackageSandbox.open(
        read_package(make_sdist()), cache=tmp_path / "cache", backend="unsafe-local"
    ) as opened:
        yield opened


@pytest.mark.anyio
async def test_why_a_fault_is_not_kept(sandbox: PackageSandbox) -> None:
    base = await baseline(sandbox)
    assert len(base.stable) == 6 and base.failing == 0 and base.timeout_s >= 10
    text = sandbox.package.text("calc.py")
    assert text is not None
    found = {}
    for number, (outcome, old, new) in enumerate(FAULTS):
        assert text.count(old) >= 1
        changed = text.replace(old, new, 1)
        limits = replace(base, timeout_s=3.0) if outcome == "hangs" else base
        fault = Mutation("by hand", 5, "total", None, changed)
        found[outcome], bug = await try_fault(sandbox, limits, number, "calc.py", fault)
        assert (bug is not None) == (outcome == "kept")
    assert found == {outcome: outcome for outcome, _, _ in FAULTS}


class _Dying:
    """A sandbox that dies the first times that a fault is tried."""

    def __init__(self, error: type[SandboxLostError], times: int) -> None:
        self.error, self.left = error, times

    async def test(
        self, sandbox: PackageSandbox, *arguments: object, stop_at_first: bool = False, **options: object
    ) -> TestRun:
        if stop_at_first and self.left:
            self.left -= 1
            raise self.error("the sandbox is gone")
        return await ALIVE(sandbox, *arguments, stop_at_first=stop_at_first, **options)  # type: ignore[arg-type]


ALIVE = PackageSandbox.test


@pytest.mark.parametrize(("error", "times"), [(SandboxLostError, 2), (SandboxLostError, 99), (HostFailureError, 1)])
def test_a_sandbox_that_dies_of_a_fault_is_replaced(
    make_sdist: MakeSdist,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[SandboxLostError],
    times: int,
) -> None:
    make_sdist()
    dying = _Dying(error, times)
    monkeypatch.setattr(
        PackageSandbox, "test", lambda sandbox, *arguments, **options: dying.test(sandbox, *arguments, **options)
    )
    monkeypatch.setattr(generate, "MAX_SANDBOXES", 3)
    spec = PackageSpec.parse("calc==1.0")
    make = partial(make_bugs, [spec], tmp_path / "out", limit=1, backend="unsafe-local", index=index, formats=["tasks"])
    if times == 2:
        (package,) = anyio.run(make)["packages"]
        assert (package["kept"], package["outcomes"]["hangs"]) == (1, 2)
        return
    with pytest.raises(ExceptionGroup) as caught:
        anyio.run(make)
    assert caught.group_contains(error)
    lines = (tmp_path / "out" / "packages" / "calc-1.0.jsonl").read_text().splitlines()
    assert len(lines) == 1 + (3 if times == 99 else 0)


def test_tests_that_import_a_module_run_first(make_sdist: MakeSdist) -> None:
    changes = {"calc.py": None, "src/calc/__init__.py": "", "src/calc/a.py": "", "src/calc/b.py": ""}
    tests = {"tests/test_calc.py": "import calc.a  # tests", "tests/test_b.py": "from calc import b  # tests"}
    package: Package = read_package(make_sdist({**changes, **tests}))
    assert importers(package, "src/calc/a.py") == ["tests/test_calc.py"]
    assert importers(package, "src/calc/b.py") == ["tests/test_b.py"]
    assert importers(package, "src/calc/__init__.py") == ["tests/test_b.py"]
