"""Counting in the interpreter: distinct bytes, whatever their widths, and the operations of `tl.dot`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from agentkit_kernels.aot.calls import Random
from agentkit_kernels.aot.counting import count_call, counting, fault
from agentkit_kernels.calls import Call
from agentkit_kernels.triton.launch import INTERPRET, launch

MAKE = Random()


@triton.jit
def _copy(x, y, N, TIMES: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    for _ in range(TIMES):
        tl.store(y + offsets, tl.load(x + offsets, mask=offsets < N), mask=offsets < N)


def copy(elements: int, *, times: int = 1, launches: int = 1) -> Call:
    x = MAKE.floats(elements, dtype=torch.float32)
    y = torch.empty_like(x)

    def run() -> None:
        for _ in range(launches):
            launch(_copy, (triton.cdiv(elements, 64),), x, y, elements, TIMES=times, SIZE=64)
        torch.testing.assert_close(y, x, rtol=0, atol=0)

    return Call("copy", run, 8 * elements, 0)


@pytest.mark.parametrize("elements", [1, 63, 64, 65, 200])
def test_masked_elements_are_not_counted(elements: int) -> None:
    counted = count_call(copy(elements), file="planted")
    assert counted.touched_bytes == counted.issued_bytes == counted.floor_bytes == 8 * elements
    assert fault(counted) is None


def test_bytes_that_a_launch_reads_again_are_issued_and_touched_once() -> None:
    counted = count_call(copy(100, times=3), file="planted")
    assert counted.touched_bytes == 800 and counted.issued_bytes == 2400
    assert fault(counted) is None


def test_a_second_launch_that_reads_the_same_bytes_touches_no_more() -> None:
    counted = count_call(copy(100, launches=2), file="planted")
    assert counted.touched_bytes == 800 and counted.issued_bytes == 1600


def test_bytes_that_are_written_and_read_back_count_beyond_the_floor() -> None:
    x = MAKE.floats(256, dtype=torch.float32)
    scratch, y = torch.empty_like(x), torch.empty_like(x)

    def through_memory() -> None:
        for source, target in ((x, scratch), (scratch, y)):
            launch(_copy, (4,), source, target, 256, TIMES=1, SIZE=64)

    counted = count_call(Call("twice", through_memory, 2048, 0), file="planted")
    assert counted.touched_bytes == 4096
    assert "2.00 times its floor of 2048" in (fault(counted) or "")


@triton.jit
def _every_second(x, y, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    values, both = tl.load(x + 2 * offsets), tl.load(x + 2 * offsets + 1)
    tl.store(y + offsets, tl.where(both == both, values, 0.0))


def test_a_kernel_that_reads_twice_what_it_must_is_a_fault() -> None:
    x, y = MAKE.floats(512, dtype=torch.float32), torch.empty(256)
    call = Call("every second", lambda: launch(_every_second, (4,), x, y, SIZE=64), 2 * 1024, 0)
    counted = count_call(call, file="planted")
    assert counted.touched_bytes == counted.issued_bytes == 3 * 1024
    assert "1.50 times its floor of 2048" in (fault(counted) or "")


def test_a_floor_that_is_never_touched_is_a_fault() -> None:
    """A floor above what a right kernel touches is wrong."""
    counted = count_call(replace(copy(200), bytes=3 * 4 * 200), file="planted")
    assert "0.67 times its floor of 2400" in (fault(counted) or "")


@triton.jit
def _halves(x, y):
    words = tl.load(x + tl.arange(0, 8))
    bytes_of_words = tl.load(x.to(tl.pointer_type(tl.uint8)) + 8 + tl.arange(0, 64))
    tl.store(y, tl.sum(words) + tl.sum(bytes_of_words.to(tl.int32)))


def test_elements_of_different_widths_that_overlap_count_once() -> None:
    x, y = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with counting() as traffic:
        launch(_halves, (1,), x, y)
    assert traffic.touched_bytes == 8 + 64 + 4 and traffic.issued_bytes == 32 + 64 + 4


@triton.jit
def _dot(x, y):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 32)[None, :]
    tile = tl.load(x + row * 32 + column)
    tl.store(y + row * 16 + tl.arange(0, 16)[None, :], tl.dot(tile, tile.T))


def test_operations_are_those_of_dots() -> None:
    x, y = MAKE.floats(16, 32, dtype=torch.float32), torch.empty(16, 16)
    counted = count_call(Call("dot", lambda: launch(_dot, (2,), x, y), 1, 1), file="planted")
    assert counted.dot_flops == 2 * 2 * 16 * 16 * 32


def test_counting_leaves_the_interpreter_as_it_was() -> None:
    with counting() as traffic:
        copy(10).run()
    before = traffic.issued_bytes
    copy(10).run()
    assert INTERPRET and traffic.issued_bytes == before == 80
