"""Reads a compiled kernel: loads and their widths, inner loops, tensor-core instructions, registers and spills.

PTX is documented in NVIDIA's "PTX ISA", AMD's instructions in "CDNA 3 Instruction Set Architecture".
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import get_ptxas  # each release pairs an assembler with its PTX version

from agentkit_kernels.aot.device import Program

WIDE = 16
"""Bytes of the widest load of one thread that all targets have: 128 bits."""
SCALAR = 4
"""Bytes of the widest load that fills one 32-bit register."""

_PTX_LOAD = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\s+(.*?),\s*\[(.*?)\]")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s*\[.*?\],\s*\[(.*?)\],\s*(\w+)")
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\.\S*global\S*\s*\[")
_GCN_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?([su]?byte|[su]?short|dword)\w*?(?:x(\d))?(?:_\w+)?\s")
_GCN_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}
_GCN_INSTRUCTION = re.compile(r"^\s+((?:v|ds|global|buffer|flat)_\w+)\s+([^;]*)")
_GCN_REGISTERS = re.compile(r"v\[?(\d+)(?::(\d+)\])?")
_GCN_BY_THREAD = {"v_cndmask_b32_e32", "v_cndmask_b32_e64", "v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32"}
"""Instructions whose result depends on the thread, or on a mask of threads, whatever their vector operands are."""
_TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma|v_smfmac)")
_LABEL = re.compile(r"^(\.L\w+|\$L\w+):")
_BRANCH = re.compile(r"\b(?:bra(?:\.uni)?|s_cbranch_\w+|s_branch)\s+(\.L\w+|\$L\w+)")
_COMMENT = re.compile(r"^\s*(?://|;)")
_SOURCE_LINE = re.compile(r"^\s*\.loc\s.*?([\w.]+\.py:\d+):\d+(?:.*@\[\s*(\w+\.py:\d+))?")
_REGISTER = re.compile(r"%[a-z]+\d+")
_THREAD = re.compile(r"%tid\b|%laneid\b")


@dataclass(frozen=True, slots=True)
class Load:
    """One load from global memory, or a copy from there to shared memory.

    Attributes:
        bytes: Bytes per thread.
        by_thread: Whether threads read different addresses. Loads of one address by all threads are cheap: block
            table entries, loop bounds, scales of a whole tile.
        source: The line of Python that it was compiled from, such as `attention.py:71`.
    """

    bytes: int
    by_thread: bool
    source: str


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of one program.

    Attributes:
        spill_bytes: Local memory per thread that registers are spilled to.
        tensor_cores: The tensor-core instruction; empty without one.
        loads: All loads.
        loops: Loads in each innermost loop that loads something.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_cores: str
    loads: Sequence[Load]
    loops: Sequence[Sequence[Load]]

    @property
    def wide_share(self) -> float:
        """The share of the bytes that its inner loops load (without loops: that it loads) in 128 bits or more."""
        loads = [load for loop in self.loops for load in loop] or self.loads
        loads = [load for load in loads if load.by_thread]
        total = sum(load.bytes for load in loads)
        return sum(load.bytes for load in loads if load.bytes >= WIDE) / total if total else 1.0


def resources(program: Program) -> Resources:
    """Read a program's assembly and binary."""
    registers, spill_bytes = _registers(program)
    lines = program.assembly.splitlines()
    loads = dict(_ptx_loads(lines) if program.target.backend == "cuda" else _gcn_loads(lines))
    inner = ([load for line, load in loads.items() if start <= line <= end] for start, end in _inner_loops(lines))
    tensor_cores = _TENSOR_CORES.search(program.assembly)
    return Resources(
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=program.shared_bytes,
        tensor_cores=tensor_cores[1] if tensor_cores else "",
        loads=list(loads.values()),
        loops=[loop for loop in inner if loop],
    )


def _registers(program: Program) -> tuple[int, int]:
    """Return registers per thread, and bytes of them that are spilled."""
    if program.target.backend == "hip":
        return _number(r"\.vgpr_count:\s+(\d+)", program), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", program)
    usage = _printed(triton.knobs.nvidia.cuobjdump.path, "-res-usage", program.binary)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage of {program.binary}: {usage!r}")
    return int(found[1]), _spilled(program) if int(found[2]) else 0


def _spilled(program: Program) -> int:
    """Return what ptxas stores to spill registers; the stack also holds arrays, such as those of sine and cosine."""
    arch = re.search(r"^\.target (\w+)", program.assembly, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(program.assembly)
        output = _printed(
            get_ptxas(program.target.arch).path,
            "--verbose",
            f"--gpu-name={arch[1] if arch else program.target.name}",
            source,
            "--output-file",
            source.with_suffix(".cubin"),
        )
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", output)))


def _printed(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _number(pattern: str, program: Program) -> int:
    found = re.search(pattern, program.assembly)
    if found is None:
        raise ValueError(f"The assembly of {program.kernel} for {program.target.name} has no {pattern}.")
    return int(found[1])


def _inner_loops(lines: Sequence[str]) -> list[tuple[int, int]]:
    """Return first and last line of each loop that contains no other.

    LLVM marks their first blocks in comments, which may take several lines. A branch back alone is no sign of a loop:
    it also leads to shared ends of branches.
    """
    ends = {branch[1]: i for i, line in enumerate(lines) if (branch := _BRANCH.search(line))}
    loops = []
    for i, line in enumerate(lines):
        if label := _LABEL.match(line):
            comments = itertools.takewhile(_COMMENT.match, itertools.islice(lines, i + 1, i + 20))
            if "Inner Loop Header" in "".join([line, *comments]):
                loops.append((i, ends[label[1]]))
    return loops


def _ptx_loads(lines: Sequence[str]) -> Iterator[tuple[int, Load]]:
    varying = _varying(lines)
    source, inline = "", False
    for i, line in enumerate(lines):
        if "inline asm" in line:
            inline = "begin" in line
        elif place := _SOURCE_LINE.match(line):
            # Inside inline assembly, LLVM adds the line within the assembly to the line of Python.
            source = source if inline else place[2] or place[1]
        elif load := _PTX_LOAD.search(line):
            size = int(load[1] or 1) * int(load[2]) // 8
            yield i, Load(size, not varying.isdisjoint(_REGISTER.findall(load[4])), source)
        elif copy := _PTX_COPY.search(line):
            yield i, Load(int(copy[2], 0), not varying.isdisjoint(_REGISTER.findall(copy[1])), source)
        elif _PTX_BULK.search(line):
            yield i, Load(WIDE, True, source)  # the size is in a register; such copies are always wide


def _varying(lines: Sequence[str]) -> set[str]:
    """Return the registers that may differ between the threads of a program: those computed from a thread's index."""
    uses: list[tuple[list[str], list[str], bool]] = []
    for line in lines:
        instruction = line.split("//")[0]
        if ";" not in instruction or instruction.lstrip().startswith("."):
            continue
        # An instruction's results come first: one register, a pair `%r1|%p2`, or a list in braces.
        result = re.search(r"\{[^}]*\}|%[a-z]+\d+(?:\|%[a-z]+\d+)?", instruction.split(" ", 1)[-1])
        if result is None or re.match(r"\s*(?:@\S+\s+)?(?:st|bra|red|bar)\b", instruction):
            continue
        after = instruction.split(result[0], 1)[1]
        uses.append((_REGISTER.findall(result[0]), _REGISTER.findall(after), bool(_THREAD.search(after))))
    varying: set[str] = set()
    grew = True
    while grew:
        grew = False
        for results, operands, thread in uses:
            if (thread or not varying.isdisjoint(operands)) and not varying.issuperset(results):
                varying.update(results)
                grew = True
    return varying


def _gcn_loads(lines: Sequence[str]) -> Iterator[tuple[int, Load]]:
    source = ""
    uniform: set[int] = set()  # vector registers that hold the same value for all threads, as far as is known
    for i, line in enumerate(lines):
        if place := _SOURCE_LINE.match(line):
            source = place[2] or place[1]
        elif instruction := _GCN_INSTRUCTION.match(line):
            results, *operands = map(_vector_registers, instruction[2].split(", "))
            same = uniform.issuperset(set().union(*operands)) and instruction[1] not in _GCN_BY_THREAD
            if load := _GCN_LOAD.search(line):
                yield i, Load(_GCN_BYTES[load[1]] * int(load[2] or 1), not same, source)
            if "store" not in instruction[1]:
                uniform = uniform | results if same else uniform - results


def _vector_registers(operand: str) -> set[int]:
    """Return the numbers of the vector registers in an operand, such as `v3` or `v[4:7]`."""
    found = _GCN_REGISTERS.match(operand)
    return set(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else set()
