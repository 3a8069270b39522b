"""Compiles calls for a target and finds what is wrong with the programs that come out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from triton import OutOfResources
from triton.compiler.errors import CompilationError

from agentkit_kernels.aot import calls as catalog
from agentkit_kernels.aot.accepted import float_product, spill_bytes
from agentkit_kernels.aot.assembly import SCALAR, WIDE, Load, Resources, resources
from agentkit_kernels.aot.device import Program, compiling_for
from agentkit_kernels.aot.targets import TARGETS, Target
from agentkit_kernels.calls import TINY, Call

SCALAR_SHARE = 0.25
"""An inner loop may load this share of its bytes in scalars: scales of groups, and indices of rows to gather, which
all threads of a row load alike and which therefore weigh more here than in memory."""
_REFUSED = re.compile(r"type (\w+) not supported in this architecture")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One program of a call."""

    file: str
    kernel: str
    call: str
    shapes: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    tensor_cores: str
    wide_share: float


@dataclass(slots=True)
class Outcome:
    """The result of compiling some calls.

    Attributes:
        refused: Number formats that a target lacks, with the call that needs one.
        faults: What must be repaired, or listed with a reason.
    """

    programs: list[Compiled] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def joined(outcomes: Iterable[Outcome]) -> Outcome:
    """Join outcomes."""
    whole = Outcome()
    for outcome in outcomes:
        whole.programs += outcome.programs
        whole.refused += outcome.refused
        whole.faults += outcome.faults
    return whole


def compile_file(file: str, target: str, shapes: str) -> Outcome:
    """Compile all calls of a file of `agentkit_kernels.triton` at a model's shapes, for decoding and prefill."""
    listed = catalog.calls(file, catalog.COMPILED[shapes], catalog.ROWS, catalog.OnMeta())
    return compile_calls(listed, TARGETS[target], file=file, shapes=shapes)


def compile_calls(calls: Iterable[Call], target: Target, *, file: str, shapes: str) -> Outcome:
    """Compile calls for a target; they are made while it is the active one, because launchers may ask for it."""
    with compiling_for(target) as launched:
        return joined(_compile_call(call, target, launched, file, shapes) for call in calls)


def _compile_call(call: Call, target: Target, launched: list[Program], file: str, shapes: str) -> Outcome:
    outcome = Outcome()
    place = f"{target.name} {file}.py ({shapes}, {call.name})"
    launched.clear()
    try:
        call.run()
    except OutOfResources as error:
        outcome.faults.append(f"{place}: {error}")
        return outcome
    except CompilationError as error:
        if refused := _REFUSED.search(f"{error.__cause__} {error}"):
            outcome.refused.append(f"{place}: {refused[1]}")
        else:
            outcome.faults.append(f"{place}: does not compile: {error}")
        return outcome
    programs = {program.key: (program, resources(program)) for program in launched}.values()
    for program, costs in programs:
        accepted = spill_bytes(program.kernel, target.name)
        found = faults(costs, accepted, wide=shapes != TINY.name)
        outcome.faults += [f"{place} {program.kernel}: {fault}" for fault in found]
        outcome.programs.append(
            Compiled(
                file=file,
                kernel=program.kernel,
                call=call.name,
                shapes=shapes,
                target=target.name,
                registers=costs.registers,
                spill_bytes=costs.spill_bytes,
                shared_bytes=costs.shared_bytes,
                num_warps=program.num_warps,
                tensor_cores=costs.tensor_cores,
                wide_share=round(costs.wide_share, 3),
            )
        )
    if call.tensor_cores and not (float_product(file, call.name) or any(costs.tensor_cores for _, costs in programs)):
        outcome.faults.append(f"{place}: uses no tensor cores")
    return outcome


def faults(costs: Resources, accepted_spill: int = 0, *, wide: bool = True) -> list[str]:
    """Return what is wrong with a program, whatever it computes.

    Args:
        wide: Whether its tiles have enough elements to load several per thread; those of a tiny model do not.
    """
    found = []
    if costs.spill_bytes > accepted_spill:
        found.append(f"spills {costs.spill_bytes} bytes of registers per thread")
    for loop in costs.loops if wide else ():
        loads = [load for load in loop if load.by_thread]
        # A line that loads one scalar per thread and iteration loads a tile with no more elements than threads.
        times = Counter(load.source for load in loads)
        scalar = [load for load in loads if load.bytes <= SCALAR and times[load.source] > 1]
        if _bytes(scalar) > SCALAR_SHARE * _bytes(loads):
            widths = sorted({load.bytes for load in scalar})
            lines = ", ".join(sorted({load.source for load in scalar}))
            found.append(
                f"an inner loop loads {_bytes(scalar)} of {_bytes(loads)} bytes per thread in scalars of "
                f"{' and '.join(map(str, widths))} bytes, at {lines}; a load can bring {WIDE}"
            )
    return found


def _bytes(loads: Iterable[Load]) -> int:
    return sum(load.bytes for load in loads)
