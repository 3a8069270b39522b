"""What can go wrong in a benchmark.

BenchmarkError
├── PeerMissingError      the library to compare with is not installed
└── OutputsDifferError    engine and peer disagree, so their speeds must not be compared
"""

from __future__ import annotations


class BenchmarkError(Exception):
    """Base of every error the benchmarks raise on purpose."""


class PeerMissingError(BenchmarkError):
    """The library to compare with is not installed."""


class OutputsDifferError(BenchmarkError):
    """Engine and peer computed different things."""
