"""The fast interpreter: the results of Triton's own."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from agentkit_kernels.aot.interpreter import fast_interpreter
from agentkit_kernels.triton.launch import launch


@pytest.fixture(autouse=True, scope="module")
def interpreted_fast() -> Generator[None, None, None]:
    """Leave the interpreter as it is, in place of the fixture of all tests."""
    yield


@triton.jit
def _round_trip(x, narrow, wide, total, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + offsets).to(tl.bfloat16)
    tl.store(narrow + offsets, values)
    tl.store(wide + offsets, values.to(tl.float32))
    tl.store(total + tl.program_id(0), tl.sum(offsets % 3, 0))


def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    narrow, wide, total = (
        torch.empty_like(x, dtype=torch.bfloat16),
        torch.empty_like(x),
        torch.empty(4, dtype=torch.int32),
    )
    launch(_round_trip, (4,), x, narrow, wide, total, SIZE=len(x) // 4)
    return narrow.view(torch.int16), wide.view(torch.int32), total


def test_conversions_and_patched_functions_give_the_same_bits() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, 3.4e38, -1.2e-38])
    x = torch.cat([special, torch.randn(120) * 10.0 ** torch.randint(-30, 30, (120,))])
    expected = run(x)
    with fast_interpreter():
        for actual, of_triton in zip(run(x), expected, strict=True):
            assert torch.equal(actual, of_triton)


def test_subnormal_bfloat16_numbers_keep_their_values() -> None:
    x = torch.arange(1, 129, dtype=torch.int16).view(torch.bfloat16)
    with fast_interpreter():
        _, wide, _ = run(x.float())
    assert torch.equal(wide.view(torch.float32), x.float())


def test_the_interpreter_gets_its_functions_back() -> None:
    before = interpreter._convert_float, interpreter._get_np_dtype, interpreter._patch_lang
    with pytest.raises(RuntimeError, match="planted"), fast_interpreter():
        assert interpreter._get_np_dtype(tl.bfloat16) == np.dtype(np.uint16)
        assert interpreter._get_np_dtype(tl.block_type(tl.pointer_type(tl.int8), [4])) == np.dtype(np.uint64)
        raise RuntimeError("planted")
    assert before == (interpreter._convert_float, interpreter._get_np_dtype, interpreter._patch_lang)
