"""Launch Triton kernels, and count the launches, so that a test can tell that a kernel ran."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton

LAUNCHES: Counter[str] = Counter()
"""Launches since the process started, by kernel name."""
INTERPRET = (
    bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else os.environ.get("TRITON_INTERPRET") == "1"
)
"""True if kernels run in Triton's interpreter, on CPU tensors. Its `tl.dot` of bfloat16 operands is wrong, so kernels
take `INTERPRET` as a constexpr and convert the operands to float32 then."""

_COUNT_ONLY = ContextVar("_COUNT_ONLY", default=False)


@contextmanager
def only_counting() -> Generator[None, None, None]:
    """Count the launches within, and make none, so that their tensors need no memory."""
    token = _COUNT_ONLY.set(True)
    try:
        yield
    finally:
        _COUNT_ONLY.reset(token)


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run `kernel` on a grid; an empty grid is no launch. Options are constexprs, `num_warps` and `num_stages`."""
    if 0 in grid:
        return
    LAUNCHES[kernel.__name__] += 1
    if _COUNT_ONLY.get():
        return
    options.setdefault("enable_fp_fusion", True)  # Triton 3.10 changes the default, and with it bits
    kernel[tuple(grid)](*args, **options)
