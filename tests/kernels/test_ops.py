"""Each backend has every operation, so none needs a fallback."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentkit_kernels.cpu.backend import Cpu
from agentkit_kernels.cpu.workers import Workers
from agentkit_kernels.ops import Ops
from agentkit_kernels.reference import Reference
from agentkit_kernels.triton.backend import Triton

OPERATIONS = {name for name, value in vars(Ops).items() if callable(value) and not name.startswith("_")}
BACKENDS: dict[str, Callable[[], object]] = {
    "reference": lambda: Reference("cpu"),
    "cpu": lambda: Cpu(Workers(1)),
    "triton": lambda: Triton.__new__(Triton),  # its own methods; __init__ needs a GPU
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_has_every_method_of_ops(backend: str) -> None:
    ops = BACKENDS[backend]()
    assert len(OPERATIONS) > 20 and Ops not in type(ops).__mro__
    assert {name for name in OPERATIONS if callable(getattr(ops, name, None))} == OPERATIONS
