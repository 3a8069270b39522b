"""What every room's tests share: which sandboxes may be missing, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where Docker is required (`AGENTKIT_REQUIRE_DOCKER=1`, as CI sets it), a skipped Docker test is a failure."""
    report = yield
    if report.skipped and "docker" in item.keywords and os.environ.get("AGENTKIT_REQUIRE_DOCKER") == "1":
        report.outcome = "failed"
        report.longrepr = f"AGENTKIT_REQUIRE_DOCKER=1, but this Docker test was skipped: {report.longrepr}"
    return report
