"""A tiny package with tests, and source distributions made from it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

MakeSdist = Callable[..., Path]

CALC = '''\
"""Sums of money."""


def total(prices, discount=0):
    """Return the sum of `prices`, less a discount in percent."""
    result = 0
    for price in prices:
        if price < 0:
            raise ValueError("a price is negative")
        result += price
    return result - result * discount // 100


def cheapest(prices, count=1):
    """Return the `count` lowest prices, in order."""
    return sorted(prices)[:count]


def label(price):
    """Return a price as text; nothing for a gift."""
    if price == 0:
        return ""
    return f"{price} EUR"
'''
UNITTESTS = """\
import unittest

from calc import cheapest, label, total


class TotalTest(unittest.TestCase):
    def test_total(self):
        self.assertEqual(total([1, 2, 3]), 6)

    def test_discount(self):
        self.assertEqual(total([100, 100], 10), 180)

    def test_negative(self):
        with self.assertRaises(ValueError):
            total([-1])

    def test_free(self):
        self.assertEqual(total([0]), 0)


class OthersTest(unittest.TestCase):
    def test_cheapest(self):
        self.assertEqual(cheapest([3, 1, 2], 2), [1, 2])
        self.assertEqual(cheapest([3, 1, 2]), [1])

    def test_label(self):
        self.assertEqual(label(5), "5 EUR")
        self.assertEqual(label(0), "")
"""
PYTESTS = """\
import pytest

from calc import cheapest, label, total


@pytest.mark.parametrize(("prices", "expected"), [([1, 2, 3], 6), ([], 0), ([5], 5), ([0], 0)])
def test_total(prices, expected):
    assert total(prices) == expected


def test_discount():
    assert total([100, 100], 10) == 180


def test_negative():
    with pytest.raises(ValueError):
        total([-1])


def test_cheapest():
    assert cheapest([3, 1, 2], 2) == [1, 2]
    assert cheapest([3, 1, 2]) == [1]


class TestLabel:
    def test_price(self):
        assert label(5) == "5 EUR"

    def test_gift(self):
        assert label(0) == ""
"""
METADATA = """\
Metadata-Version: 2.1
Name: calc
Version: {version}
Classifier: License :: OSI Approved :: MIT License
"""


@pytest.fixture
def pytests() -> str:
    """The tests of the package for pytest."""
    return PYTESTS


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Folder that stands for a package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


@pytest.fixture
def make_sdist(index: Path) -> MakeSdist:
    """Function that writes a source distribution of `calc` to the index; `changes` replaces files, None removes one."""

    def make(changes: Mapping[str, str | bytes | None] | None = None, *, version: str = "1.0") -> Path:
        files: dict[str, str | bytes | None] = {
            "PKG-INFO": METADATA.format(version=version),
            "calc.py": CALC,
            "tests/__init__.py": "",
            "tests/test_calc.py": UNITTESTS,
            **(changes or {}),
        }
        path = index / f"calc-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                if content is not None:
                    data = content.encode() if isinstance(content, str) else content
                    entry = tarfile.TarInfo(name if name.startswith("/") else f"calc-{version}/{name}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        return path

    return make
