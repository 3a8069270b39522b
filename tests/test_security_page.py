"""Each row of SECURITY.md's tables names its tests, and the tests exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_each_row_names_tests_that_exist() -> None:
    threats = [row.split(" | ")[0].removeprefix("| ") for row in PAGE.splitlines() if row.startswith("| ")]
    rows = [threat for threat in threats if threat != "threat"]
    section = PAGE.partition("## The tests of each row\n")[2].partition("\n## ")[0]
    items = [" ".join(item.split()) for item in re.findall(r"(?:^|\n)- ((?:[^\n]|\n  )+)", section)]
    named = {item.partition(": ")[0]: re.findall(r"`(test_\w+)`", item.partition(": ")[2]) for item in items}
    assert list(named) == rows
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)\(", sources, re.MULTILINE))
    assert all(named.values())
    assert {name for names in named.values() for name in names} <= defined
