"""Helpers for the tests of every room: sandboxes that may be missing, and other processes."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def own_state_folder(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path, None, None]:
    """Keep the key of disk caches out of the home folder of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def heeded_signals() -> None:
    """Heed Ctrl-C: a shell starts a background job with SIGINT and SIGQUIT ignored, and so would be all children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)


class WaitUntil(Protocol):
    def __call__(self, condition: Callable[[], bool], awaited: str, *, timeout_s: float = 20.0) -> None: ...


@pytest.fixture(scope="session")
def wait_until() -> WaitUntil:
    """Wait for what sends no event, such as the end of somebody else's process: `wait_until(condition, awaited)`."""

    def wait(condition: Callable[[], bool], awaited: str, *, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout_s} s for {awaited}")
            time.sleep(0.01)

    return wait


class Tag:
    """A number that nothing else on this machine uses, so that `sleep <tag>` can be found from outside any sandbox."""

    def __init__(self, wait_until: WaitUntil) -> None:
        self._wait_until = wait_until
        self.value = f"{1_000_000 + secrets.randbelow(8_000_000)}"

    def pids(self) -> list[int]:
        """Return the living processes of this machine that have the tag among their arguments."""
        found = []
        for directory in Path("/proc").iterdir():
            if directory.name.isdecimal() and int(directory.name) != os.getpid():
                try:
                    arguments = (directory / "cmdline").read_bytes().split(b"\0")
                    state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if self.value.encode() in arguments and state not in "ZX":
                    found.append(int(directory.name))
        return found

    def alive(self) -> int:
        return len(self.pids())

    def wait(self, count: int) -> None:
        """Wait until exactly `count` processes are alive; fail if that takes too long."""
        self._wait_until(lambda: self.alive() == count, f"{count} living processes with `{self.value}`")


@pytest.fixture
def tag(wait_until: WaitUntil) -> Tag:
    return Tag(wait_until)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where Docker or a sandbox is required (by the environment, as CI does), a skipped test of it is a failure.

    A reason that begins with "not applicable" is exempt: another case of the same test covers what is required.
    """
    report = yield
    for marker in ("docker", "sandbox"):
        required = f"AGENTKIT_REQUIRE_{marker.upper()}"
        exempt = "Skipped: not applicable" in str(report.longrepr)
        if report.skipped and not exempt and marker in item.keywords and os.environ.get(required) == "1":
            report.outcome = "failed"
            report.longrepr = f"{required}=1, but this test was skipped: {report.longrepr}"
    return report
