"""Faults that are accepted, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spill:
    """Bytes of registers per thread that a kernel may spill."""

    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Excess:
    """Bytes that a call may touch, as a multiple of its floor."""

    ratio: float
    reason: str


SPILLS: dict[tuple[str, str], Spill] = {
    ("_attend_kernel", "sm_80"): Spill(
        384,
        "during the loop the queries of 16 heads of 512 values take half of the registers, 128 per thread, and a tile "
        "of tensor cores has no fewer rows; in prefill over FP8 rows the rest does not suffice",
    ),
    ("_attend_kernel", "sm_90"): Spill(
        8, "during the loop the queries of 16 heads of 512 values take half of the registers, 128 per thread"
    ),
    ("_entries", "sm_80"): Spill(
        8,
        "HCA keeps the running maximum, sum and average of a window beside its rows; 4 bytes, at tiny sizes",
    ),
    ("_qkv", "sm_100"): Spill(
        16, "the Hadamard rotation keeps a whole index query in registers, beside the codes and scales of its FP8 form"
    ),
}
"""By kernel and target."""
EXCESSES: dict[tuple[str, str], Excess] = {
    ("hyper_connections", "prefill, hc_post_pre"): Excess(
        1.5,
        "the norm of a row's new streams must be known before they are summed, and 16 rows of them, 512 KiB at "
        "V4-Flash's shapes, do not fit into one processor: a second kernel reads them back",
    ),
    ("hyper_connections", "prefill, hc_pre"): Excess(
        1.15, "the partial sums of slabs pass through memory, so that a few rows keep many processors busy"
    ),
    ("attention", "decode"): Excess(
        1.75, "the float32 partial results of splits pass through memory, so that a few rows keep many processors busy"
    ),
    ("indexer", "prefill"): Excess(
        2.3,
        "each row's buffer of candidates is written and read back; it is as large as a query, whatever the number of "
        "entries",
    ),
}
"""By file and the start of a call's label."""


def spill_bytes(kernel: str, target: str) -> int:
    """Return the bytes that a kernel may spill on a target."""
    accepted = SPILLS.get((kernel, target))
    return accepted.bytes if accepted else 0


def touched_ratio(file: str, call: str, default: float) -> float:
    """Return how many times its floor a call may touch."""
    ratios = [one.ratio for (of, start), one in EXCESSES.items() if of == file and call.startswith(start)]
    return max(ratios, default=default)
