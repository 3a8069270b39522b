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
    ("_down", "sm_100"): Spill(
        24, "the tiny model's MXFP4 experts with float32 activations, whose products are summed without tensor cores"
    ),
    ("_linear", "sm_80"): Spill(4, "one register of the head's product: its inputs are bfloat16 and its sums float32"),
    ("_linear", "sm_90"): Spill(4, "one register of float32 products with packed weights, at tiny shapes"),
    ("_compress", "sm_80"): Spill(
        8,
        "HCA keeps the running maximum, sum and average of a window beside its rows; 4 bytes, at tiny sizes",
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
    ("attention", "decode, chosen"): Excess(
        4.0,
        "the float32 partial results of splits pass through memory, so that a few rows keep many processors busy: at "
        "V4-Flash's shapes a split of 128 keys reads 75 kB of FP8 rows, and its results are 147 kB; without their "
        "padding, 131 kB, the kernel spills 48 bytes on sm_90",
    ),
    ("attention", "decode, all"): Excess(3.6, "as for chosen entries"),
    ("indexer", "prefill"): Excess(
        2.3,
        "each row's buffer of candidates is written and read back; it is as large as a query, whatever the number of "
        "entries",
    ),
}
"""By file and the start of a call's label."""
FLOAT_PRODUCTS: dict[tuple[str, str], str] = dict.fromkeys(
    [
        ("linear", "float32"),
        ("experts", "float32"),
        ("attention", "float32 activations"),
        ("indexer", "float32 activations"),
    ],
    "float32 operands are multiplied in float32, to which NVIDIA's tensor cores would not be exact: they round to TF32",
)
"""Reasons why products need no tensor cores, by file and a part of a call's label."""


def spill_bytes(kernel: str, target: str) -> int:
    """Return the bytes that a kernel may spill on a target."""
    accepted = SPILLS.get((kernel, target))
    return accepted.bytes if accepted else 0


def float_product(file: str, call: str) -> bool:
    """Return whether a product is computed in float32, and so needs no tensor cores."""
    return any(of == file and part in call for of, part in FLOAT_PRODUCTS)


def touched_ratio(file: str, call: str, default: float) -> float:
    """Return how many times its floor a call may touch."""
    ratios = [one.ratio for (of, start), one in EXCESSES.items() if of == file and call.startswith(start)]
    return max(ratios, default=default)
