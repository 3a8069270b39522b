"""Compiling without a GPU: good kernels pass on every target, and each planted fault is found."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import agentkit_engine
from agentkit_kernels.aot import __main__ as command
from agentkit_kernels.aot import accepted as accepted_module
from agentkit_kernels.aot import calls as catalog
from agentkit_kernels.aot import report as report_module
from agentkit_kernels.aot.accepted import Excess, Spill
from agentkit_kernels.aot.assembly import Load, Resources, resources
from agentkit_kernels.aot.calls import OnMeta
from agentkit_kernels.aot.compiling import Compiled, Outcome, compile_calls, faults
from agentkit_kernels.aot.counting import Counted, fault
from agentkit_kernels.aot.device import compiling_for
from agentkit_kernels.aot.report import BEGIN, END, Report, code_hash, sources, stale, table_is_current, write_table
from agentkit_kernels.aot.targets import GFX942, SM_80, SM_90, SM_100, TARGETS, Target
from agentkit_kernels.calls import TINY, Call
from agentkit_kernels.triton.launch import INTERPRET, launch

pytestmark = pytest.mark.skipif(INTERPRET, reason="compiles kernels, which TRITON_INTERPRET=1 prevents")
MAKE = OnMeta()
read = Report.read
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@triton.jit
def _product(x, w, y, K, stride, TILE: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr):
    """y = x · wᵀ of one tile, with `tl.dot` or without."""
    row = tl.arange(0, TILE)[:, None]
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)[None, :]
        a, b = tl.load(x + row * stride + k), tl.load(w + row * stride + k)
        if DOT:
            sums = tl.dot(a, b.T, sums)
        else:
            sums += tl.sum(a[:, None, :].to(tl.float32) * b[None, :, :].to(tl.float32), 2)
    tl.store(y + row * TILE + tl.arange(0, TILE)[None, :], sums)


def product(tile: int, depth: int, *, dot: bool = True, stride: int = 4096, num_stages: int = 2) -> Call:
    x, w, y = MAKE.floats(tile, 4096), MAKE.floats(tile, 4096), MAKE.floats(tile, tile, dtype=torch.float32)
    options = {"TILE": tile, "DEPTH": depth, "DOT": dot, "num_stages": num_stages}
    run = lambda: launch(_product, (1,), x, w, y, 4096, stride, **options)  # noqa: E731
    return Call("product", run, 0, 0, tensor_cores=True)


@triton.jit
def _held(x, y, N, SIZE: tl.constexpr):
    """Keep a row in registers while a loop needs all of it."""
    offsets = tl.arange(0, SIZE)
    row = tl.load(x + offsets)
    for _ in range(N):
        row = row * tl.sum(row)
    tl.store(y + offsets, row)


def held(target: Target) -> Call:
    size, few_registers = (2048, {"maxnreg": 32}) if target.backend == "cuda" else (4096, {"waves_per_eu": 8})
    x = MAKE.floats(size, dtype=torch.float32)
    return Call("held", lambda: launch(_held, (1,), x, x, 9, SIZE=size, num_warps=1, **few_registers), 0, 0)


@triton.jit
def _sum_rows(x, y, N, stride, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    sums = tl.zeros((SIZE,), tl.float32)
    for row in range(N):
        sums += tl.load(x + row * stride + columns).to(tl.float32)
    tl.store(y + columns, sums)


def sum_rows(x: torch.Tensor) -> Call:
    y = MAKE.floats(2048, dtype=torch.float32)
    return Call("sum", lambda: launch(_sum_rows, (1,), x, y, 100, x.stride(0), SIZE=2048), 0, 0)


def compiled(call: Call, target: Target) -> Outcome:
    return compile_calls([call], target, file="planted", shapes="flash")


@every_target
def test_a_good_product_has_no_faults(target: Target) -> None:
    outcome = compiled(product(64, 64), target)
    assert not outcome.faults and not outcome.refused
    (program,) = outcome.programs
    assert program.kernel == "_product" and program.target == target.name and program.call == "product"
    assert program.tensor_cores and program.wide_share == 1.0 and program.spill_bytes == 0
    assert 32 < program.registers <= 255 and 0 < program.shared_bytes <= target.shared_bytes


def test_each_target_has_its_own_tensor_core_instruction() -> None:
    found = {name: compiled(product(64, 64), target).programs[0].tensor_cores for name, target in TARGETS.items()}
    assert found == {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@every_target
def test_a_spill_is_found(target: Target) -> None:
    outcome = compiled(held(target), target)
    (program,), (found,) = outcome.programs, outcome.faults
    assert program.spill_bytes > 0
    assert found.endswith(f"_held: spills {program.spill_bytes} bytes of registers per thread")


def test_a_spill_is_accepted_up_to_the_listed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    spilled = compiled(held(SM_90), SM_90).programs[0].spill_bytes
    for target, accepted, wrong in (("sm_90", spilled, 0), ("sm_90", spilled - 1, 1), ("sm_80", spilled, 1)):
        monkeypatch.setattr(accepted_module, "SPILLS", {("_held", target): Spill(accepted, "planted")})
        assert len(compiled(held(SM_90), SM_90).faults) == wrong


@pytest.mark.parametrize("target", [SM_80, SM_90, GFX942], ids=lambda target: target.name)
def test_too_much_shared_memory_is_found(target: Target) -> None:
    outcome = compiled(product(128, 128, num_stages=6 if target.backend == "cuda" else 3), target)
    (found,) = outcome.faults
    assert "shared memory" in found and str(target.shared_bytes) in found


@every_target
def test_a_product_without_tensor_cores_is_found(target: Target) -> None:
    outcome = compiled(product(16, 16, dot=False), target)
    assert any(one.endswith("uses no tensor cores") for one in outcome.faults)
    assert outcome.programs[0].tensor_cores == ""


@every_target
def test_wide_loads_of_a_loop_pass(target: Target) -> None:
    outcome = compiled(sum_rows(MAKE.floats(100, 2048)), target)
    assert not outcome.faults and outcome.programs[0].wide_share == 1.0


@every_target
@pytest.mark.parametrize("x", [MAKE.floats(100, 2049), MAKE.floats(100, 2048 + 8)[:, 1:2049]], ids=["stride", "offset"])
def test_scalar_loads_in_a_loop_are_found_with_their_line(target: Target, x: torch.Tensor) -> None:
    found = compiled(sum_rows(x), target).faults
    line = _sum_rows.fn.__code__.co_firstlineno + 5
    assert found and all(f"in scalars of 2 bytes, at test_aot.py:{line};" in one for one in found)


def test_a_scalar_is_no_fault_if_all_threads_share_it_or_its_line_loads_no_other() -> None:
    wide, shared, own = Load(16, True, "k.py:1"), Load(4, False, "k.py:2"), Load(4, True, "k.py:2")
    assert not faults(Resources(64, 0, 0, "", [], [[wide, shared, shared]]))
    assert not faults(Resources(64, 0, 0, "", [], [[own]]))
    assert faults(Resources(64, 0, 0, "", [], [[wide, own, own]]))
    assert not faults(Resources(64, 0, 0, "", [], [[wide, own, own]]), wide=False)


@triton.jit
def _scaled(x, scales, y, N, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    sums = tl.zeros((SIZE,), tl.float32)
    for row in range(N):
        sums += tl.load(x + row * SIZE + columns) * tl.load(scales + row)
    tl.store(y + columns, sums)


@every_target
def test_a_scalar_of_a_whole_tile_is_read_as_shared(target: Target) -> None:
    x, scales, y = (MAKE.floats(*shape, dtype=torch.float32) for shape in ((100, 2048), (100,), (2048,)))
    with compiling_for(target) as launched:
        launch(_scaled, (1,), x, scales, y, 100, SIZE=2048)
    loads = [load for loop in resources(launched[0]).loops for load in loop]
    assert {load.bytes for load in loads if load.by_thread} == {16}
    assert {load.bytes for load in loads if not load.by_thread} <= {4}


@triton.jit
def _widen(x, y):
    offsets = tl.arange(0, 128)
    tl.store(y + offsets, tl.load(x + offsets).to(tl.float32))


def test_a_format_that_a_target_lacks_is_refused_by_name() -> None:
    x, y = MAKE.floats(128, dtype=torch.float8_e4m3fn), MAKE.floats(128, dtype=torch.float32)
    call = Call("e4m3", lambda: launch(_widen, (1,), x, y), 0, 0)
    lacking = compiled(call, SM_80)
    assert lacking.refused == ["sm_80 planted.py (flash, e4m3): fp8e4nv"]
    assert not lacking.programs and not lacking.faults
    assert compiled(call, SM_90).programs and not compiled(call, SM_90).refused


@triton.jit
def _broken(x):
    tl.store(x, tl.arange(0, 3))


def test_a_kernel_that_does_not_compile_is_a_fault() -> None:
    x = MAKE.floats(4)
    (found,) = compiled(Call("broken", lambda: launch(_broken, (1,), x), 0, 0), SM_90).faults
    assert found.startswith("sm_90 planted.py (flash, broken): does not compile: ")


def test_every_file_lists_calls_of_both_phases_at_both_models_shapes() -> None:
    files = catalog.kernel_files()
    assert {"attention", "experts", "linear"} <= set(files) and not {"launch", "formats"} & set(files)
    for file in files:
        for shapes in catalog.COMPILED.values():
            with compiling_for(SM_90):
                names = [call.name for call in catalog.calls(file, shapes, catalog.ROWS, MAKE)]
            assert len(set(names)) == len(names), (file, names)
            assert {name.split(", ")[0] for name in names} == set(catalog.ROWS), (file, names)
            assert not any("decode" in name and "prefill" in name for name in names), (file, names)


def test_targets_do_not_share_programs() -> None:
    programs = []
    for target in (SM_90, SM_100, SM_90):
        with compiling_for(target) as launched:
            sum_rows(MAKE.floats(100, 2048)).run()
        programs += launched
    assert [program.target for program in programs] == [SM_90, SM_100, SM_90]
    assert programs[0].key == programs[2].key != programs[1].key


def test_the_shapes_of_the_tiny_model_are_those_of_its_config() -> None:
    config = json.loads((Path(agentkit_engine.__file__).parent / "tiny" / "config.json").read_text())
    sizes = {field.name: getattr(TINY, field.name) for field in fields(TINY)}
    del sizes["name"], sizes["activations"]
    assert sizes == {name: config[name] for name in sizes}


COUNTED = Counted("planted", "decode, sum", 1000, 1100, 1500, 10, 20, 4_000_000)


@pytest.mark.parametrize(("touched", "wrong"), [(899, True), (900, False), (1100, False), (1101, True)])
def test_touching_a_tenth_more_or_less_than_the_floor_is_a_fault(touched: int, wrong: bool) -> None:
    found = fault(replace(COUNTED, touched_bytes=touched))
    assert (found is not None) == wrong
    assert found is None or found.startswith(f"planted.py (decode, sum): touches {touched} distinct bytes")


def test_a_call_may_touch_as_much_as_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepted_module, "EXCESSES", {("planted", "decode, su"): Excess(1.5, "planted")})
    assert fault(replace(COUNTED, touched_bytes=1500)) is None
    assert fault(replace(COUNTED, touched_bytes=1501)) is not None
    assert fault(replace(COUNTED, touched_bytes=1500, call="prefill, sum")) is not None


def made() -> Report:
    programs = [
        Compiled("norm", "_norm", "decode, sum", "flash", target, 40 + i, 0, 2048, 4, "", 0.5)
        for i, target in enumerate(TARGETS)
    ]
    return Report(programs, [], [replace(COUNTED, file="norm")], {"norm": 0.004}, [])


def test_the_table_has_a_row_per_kernel_and_call() -> None:
    row = "| `norm.norm` | decode, sum | 40 · 2 K · - · 50% | 41 · 2 K · - · 50% | 42 · 2 K · - · 50% |"
    assert made().table().splitlines()[2] == f"{row} 43 · 2 K · - · 50% | 4 MB | 1.10 · 4.4 MB | 4e-03 |"


def test_a_format_that_was_refused_leaves_its_cell_empty() -> None:
    whole = made()
    report = replace(whole, programs=[one for one in whole.programs if one.target != "sm_80"])
    assert report.table().splitlines()[2].startswith("| `norm.norm` | decode, sum |  | 41 ·")


def test_refusals_and_faults_stand_below_the_table() -> None:
    report = replace(made(), refused=["sm_80 norm.py (flash, sum): fp8e4nv"], faults=["norm.py: spills", "and more"])
    below = report.table().removeprefix(made().table())
    assert below == "\nRefused:\n\n- sm_80 norm.py (flash, sum): fp8e4nv\n\nFaults:\n\n- norm.py: spills\n- and more\n"


def checked(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit status of `--check` for a report of one counted call."""
    readme, path = tmp_path / "README.md", tmp_path / "aot.json"
    readme.write_text(f"{BEGIN}{END}")
    write_table(report, readme)
    report.write(path)
    monkeypatch.setattr(command, "table_is_current", lambda report: table_is_current(report, readme))
    monkeypatch.setattr(Report, "read", classmethod(lambda cls: read(path)))
    monkeypatch.setattr(catalog, "kernel_files", lambda: ["norm"])
    monkeypatch.setattr(catalog, "calls", lambda *args: [Call("decode, sum", lambda: None, 1000, 0)])
    for name in ("SPILLS", "EXCESSES", "FLOAT_PRODUCTS"):
        monkeypatch.setattr(accepted_module, name, {})
    return command.main(["--check"])


def test_a_current_report_passes_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(made(), tmp_path, monkeypatch) == 0
    assert capsys.readouterr().out == ""


def test_a_fault_or_a_call_that_is_not_counted_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(replace(made(), faults=["norm.py: touches"], counted=[]), tmp_path, monkeypatch) == 1
    assert capsys.readouterr().out.splitlines()[:2] == ["FAULT: norm.py: touches", "not counted: norm.py (decode, sum)"]


def test_an_accepted_fault_that_does_not_occur_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    spill, excess, product = ("_norm", "sm_90"), ("norm", "decode"), ("norm", "sum")
    monkeypatch.setattr(accepted_module, "SPILLS", {spill: Spill(8, "planted")})
    monkeypatch.setattr(accepted_module, "EXCESSES", {excess: Excess(2.0, "planted")})
    monkeypatch.setattr(accepted_module, "FLOAT_PRODUCTS", {product: "planted"})
    report = made()
    needed = [replace(one, spill_bytes=4) for one in report.programs]
    assert not stale(replace(report, programs=needed, counted=[replace(report.counted[0], touched_bytes=1500)]))
    assert stale(replace(report, programs=[replace(one, tensor_cores="mma") for one in report.programs])) == [
        "_norm on sm_90 spills nothing",
        "norm.py (decode) touches no more than 1.1 times its floor",
        "norm.py (sum) has no product without tensor cores",
    ]


def test_a_stale_entry_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "stale", lambda report: ["_norm on sm_90 spills nothing"])
    assert checked(made(), tmp_path, monkeypatch) == 1
    assert capsys.readouterr().out == "accepted.py has an entry that is not needed: _norm on sm_90 spills nothing\n"


def test_a_product_of_float32_operands_needs_no_tensor_cores_if_it_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = replace(product(16, 16, dot=False), name="product, float32")
    assert any("uses no tensor cores" in one for one in compiled(call, SM_90).faults)
    monkeypatch.setattr(accepted_module, "FLOAT_PRODUCTS", {("planted", "float32"): "planted"})
    assert not any("uses no tensor cores" in one for one in compiled(call, SM_90).faults)


def test_a_missing_report_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no aot\.json\. Make it with `make kernels-table`"):
        Report.read(tmp_path / "aot.json")


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    made().write(tmp_path / "aot.json")
    assert Report.read(tmp_path / "aot.json") == made()


def test_a_report_from_other_sources_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "aot.json"
    made().write(path)
    changed = {**sources(), "triton/launch.py": "0" * 16, "triton/new.py": "0" * 16}
    monkeypatch.setattr(report_module, "sources", lambda: changed)
    with pytest.raises(ValueError, match=r"before these files changed: triton/launch\.py, triton/new"):
        Report.read(path)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ('"""Another docstring."""\n\nx = 1  # and a comment\n', True),
        ("# a comment\nx = 1\n", True),
        ("x = 2\n", False),
        ('x = "# 1"\n', False),
    ],
)
def test_hashes_follow_the_code_and_not_its_prose(other: str, same: bool) -> None:
    assert (code_hash(other) == code_hash('"""A docstring."""\nx = 1\n')) == same


def test_the_table_is_written_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}an old table\n{END}after\n")
    assert not table_is_current(made(), readme)
    write_table(made(), readme)
    assert table_is_current(made(), readme)
    assert readme.read_text() == f"before\n{BEGIN}{made().table()}{END}after\n"
