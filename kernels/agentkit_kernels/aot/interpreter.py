"""Makes Triton's interpreter fast enough to count and to test in.

Most of its time goes into three functions of `triton.runtime.interpreter`. `_patch_lang` searches `triton.language` for
functions to replace, at every launch and at every call of a jitted function (`tl.sum` is one); here each module with
kernels does so once, and what it has replaced stays. `_convert_float` converts between any two formats bit by bit;
bfloat16 and float32 differ by a shift. `_get_np_dtype` builds a table at every call; here it remembers the answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_SLOW = ("_patch_lang", "_convert_float", "_get_np_dtype")


class _Kept:
    """The scope of a patch that stays."""

    def restore(self) -> None: ...


@contextmanager
def fast_interpreter() -> Generator[None, None, None]:
    """Interpret the launches within faster, with the same results.

    The one difference: subnormal bfloat16 numbers become the float32 numbers that they are.
    """
    patch, convert, np_dtype = (getattr(interpreter, name) for name in _SLOW)
    patched = set[int]()

    def patch_once(function: Callable[..., Any]) -> _Kept:
        if id(function.__globals__) not in patched:  # modules live as long as the process
            patch(function)
            patched.add(id(function.__globals__))
        return _Kept()

    def convert_by_shift(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return np.left_shift(values.view(np.uint16), 16, dtype=np.uint32)
        if source == tl.float32 and target == tl.bfloat16 and rounding_mode is None:
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return convert(values, source, target, rounding_mode)

    of_scalar = functools.cache(np_dtype)

    def np_dtype_of_scalar(kind: tl.dtype) -> Any:
        return np_dtype(kind) if kind.scalar.is_ptr() else of_scalar(kind.scalar)

    with ExitStack() as stack:
        for name, function in zip(_SLOW, (patch_once, convert_by_shift, np_dtype_of_scalar), strict=True):
            stack.callback(setattr, interpreter, name, getattr(interpreter, name))
            setattr(interpreter, name, function)
        yield
