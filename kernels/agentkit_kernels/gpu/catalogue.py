"""Every configuration of every kernel beside its floor: the calls that each file of `triton/` lists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import agentkit_kernels.triton
from agentkit_kernels.gpu.bench import Bench
from agentkit_kernels.gpu.record import Goal, Measurement

_FOLDER = Path(agentkit_kernels.triton.__file__).parent


def kernels() -> dict[str, list[str]]:
    """Return the kernels that each file of `triton/` launches, from its source: the jitted functions that it names
    without calling them."""
    found = {}
    for file in sorted(_FOLDER.glob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        jitted = {
            node.name
            for node in nodes
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)
        }
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        named = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
        if names := sorted(jitted & named):
            found[file.stem] = names
    return found


def decode_calls(bench: Bench) -> Iterator[Measurement]:
    """All calls of decoding with one row, and then with 32 if there is time."""
    for rows in bench.pick((1, 32), (2,)):
        yield from _calls(bench, rows, other_phase="prefill")


def prefill_calls(bench: Bench) -> Iterator[Measurement]:
    """All calls of prefill."""
    yield from _calls(bench, bench.pick(2048, 3), other_phase="decode")


def _calls(bench: Bench, rows: int, *, other_phase: str) -> Iterator[Measurement]:
    for name in kernels():
        module = import_module(f"{agentkit_kernels.triton.__name__}.{name}")
        for call in module.calls(bench.shapes, rows, bench):
            if not call.name.startswith(other_phase):
                what = f"{name}: {call.name}, {rows} rows"
                yield bench.measure(what, call.run, Goal("us"), bytes=call.bytes, flops=call.flops)
