"""Errors of the benchmarks.

BenchmarkError
├── PeerMissingError      the library to compare with is not installed
└── OutputsDifferError    engine and peer disagree, so their speeds must not be compared
"""

from __future__ import annotations


class BenchmarkError(Exception):
    """Base class of the benchmarks' own errors."""


class PeerMissingError(BenchmarkError):
    """The library to compare with is not installed."""


class OutputsDifferError(BenchmarkError):
    """Engine and peer computed different things."""
