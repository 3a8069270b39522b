"""Counts the bytes and floating-point operations of kernels, in Triton's interpreter.

The interpreter computes with addresses, so every load and store shows which bytes it touches. The distinct bytes that a
call reads and those that it writes are what memory moves behind perfect caches; all bytes that loads and stores name,
the issued ones, are what it moves without caches. Operations are those of `tl.dot`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton import knobs
from triton.runtime.interpreter import interpreter_builder

from agentkit_kernels.aot import calls as catalog
from agentkit_kernels.aot.accepted import touched_ratio
from agentkit_kernels.aot.interpreter import fast_interpreter
from agentkit_kernels.calls import FLASH, Call

Addresses = NDArray[np.uint64]
PAGE = 1 << 20
MOST_TOUCHED, LEAST_TOUCHED = 1.1, 0.9
"""Bounds of the distinct bytes that a call touches, as multiples of its floor. A call that touches less than its floor
has a wrong floor."""


class _Touched:
    """A set of elements, by the first bytes of those of each size.

    A page is an array of flags, one per address; elements are aligned to their size and do not cross pages.
    """

    def __init__(self) -> None:
        self._pages: dict[int, dict[int, NDArray[np.bool_]]] = {}

    def add(self, addresses: Addresses, size: int) -> None:
        if not addresses.size:
            return
        pages = self._pages.setdefault(size, {})
        first, last = int(addresses.min()) // PAGE, int(addresses.max()) // PAGE
        for page in range(first, last + 1):
            offsets = addresses - np.uint64(page * PAGE)  # those of other pages become at least PAGE
            if first != last:
                offsets = offsets[offsets < PAGE]
            if offsets.size:
                pages.setdefault(page, np.zeros(PAGE, np.bool_))[offsets] = True

    def bytes(self) -> int:
        """Return the length of the union of all elements."""
        total = 0
        for page in {page for pages in self._pages.values() for page in pages}:
            covered = np.zeros(PAGE, np.bool_)
            for size, pages in self._pages.items():
                if page in pages:
                    covered |= np.repeat(pages[page][::size], size)
            total += int(covered.sum())
        return total


class Traffic:
    """Bytes and operations of the launches of one call."""

    def __init__(self) -> None:
        self.issued_bytes = self.dot_flops = 0
        self.reads, self.writes = _Touched(), _Touched()

    @property
    def touched_bytes(self) -> int:
        """Distinct bytes read, and distinct bytes written."""
        return self.reads.bytes() + self.writes.bytes()

    def access(self, touched: _Touched, pointers: Any, mask: Any) -> None:
        """Add the elements that a tile of pointers names under a mask."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data
        if not mask.data.all():
            addresses, chosen = np.broadcast_arrays(addresses, mask.data)
            addresses = addresses[chosen]
        self.issued_bytes += addresses.size * size
        touched.add(addresses, size)


@contextmanager
def counting() -> Generator[Traffic, None, None]:
    """Count what all launches within move and compute.

    Raises:
        RuntimeError: TRITON_INTERPRET was not set when triton was imported.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError("Counting needs TRITON_INTERPRET=1 in the environment, before triton is imported.")
    traffic = Traffic()
    builder = interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    dot, atomic = builder.create_dot, builder.create_atomic_rmw

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.access(traffic.reads, pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.access(traffic.writes, pointers, mask)
        return store(pointers, value, mask, *rest)

    def counted_atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.access(traffic.reads, pointers, mask)
        traffic.access(traffic.writes, pointers, mask)
        return atomic(operation, pointers, value, mask, *rest)

    def counted_dot(a: Any, b: Any, *rest: Any) -> Any:
        traffic.dot_flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest)

    counted: dict[str, Callable[..., Any]] = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": counted_atomic,
        "create_dot": counted_dot,
    }
    for name, function in counted.items():
        setattr(builder, name, function)
    try:
        yield traffic
    finally:
        for name in counted:
            delattr(builder, name)  # the class's own method again


@dataclass(frozen=True, slots=True)
class Counted:
    """The traffic of one call beside the floor that its file states.

    Attributes:
        floor_bytes: Of the counted shapes.
        flash_floor_bytes: Of V4-Flash's shapes, of the call with the same name; None without one.
    """

    file: str
    call: str
    floor_bytes: int
    touched_bytes: int
    issued_bytes: int
    flops: int
    dot_flops: int
    flash_floor_bytes: int | None


def count_file(file: str) -> list[Counted]:
    """Count all calls of a file of `agentkit_kernels.triton`."""
    flash = {call.name: call.bytes for call in catalog.calls(file, FLASH, catalog.ROWS, catalog.OnMeta())}
    return [
        count_call(call, file=file, flash_floor_bytes=flash.get(call.name))
        for call in catalog.counted_calls(file, catalog.Random())
    ]


def count_call(call: Call, *, file: str, flash_floor_bytes: int | None = None) -> Counted:
    """Run a call in the interpreter and count."""
    with fast_interpreter(), counting() as traffic, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # padding of tiles overflows
        call.run()
    return Counted(
        file=file,
        call=call.name,
        floor_bytes=call.bytes,
        touched_bytes=traffic.touched_bytes,
        issued_bytes=traffic.issued_bytes,
        flops=call.flops,
        dot_flops=traffic.dot_flops,
        flash_floor_bytes=flash_floor_bytes,
    )


def fault(counted: Counted) -> str | None:
    """Return what is wrong with a call's traffic."""
    ratio = counted.touched_bytes / max(counted.floor_bytes, 1)
    most = touched_ratio(counted.file, counted.call, MOST_TOUCHED)
    if LEAST_TOUCHED <= ratio <= most:
        return None
    return (
        f"{counted.file}.py ({counted.call}): touches {counted.touched_bytes} distinct bytes, {ratio:.2f} times its "
        f"floor of {counted.floor_bytes}; {LEAST_TOUCHED} to {most} are expected"
    )


if __name__ == "__main__":
    json.dump([asdict(counted) for file in sys.argv[1:] for counted in count_file(file)], sys.stdout)
