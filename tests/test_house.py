"""The structure of the repository: rooms, packaging and the import contract."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from agentkit_engine.benchmarks.record import markdown, read_records

ROOT = Path(__file__).parent.parent
ROOMS = ("agentkit", "engine", "kernels", "environments", "tools", "evals")
PACKAGES = ("agentkit", *(f"agentkit_{room}" for room in ROOMS[1:]))
OF_TRITON = (
    "agentkit_kernels.triton.",
    "agentkit_kernels.aot.",
    "agentkit_kernels.gpu.",
    "agentkit_engine.benchmarks.gpu.",
)
"""Packages that run, compile or measure Triton kernels."""
UNWANTED = {"transformers", "triton", "pytest", "hypothesis", "ray", "xgrammar"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_not_itself_a_package(room: str) -> None:
    assert not (ROOT / room / "__init__.py").exists(), "a package named like its room would shadow others' packages"
    assert (ROOT / room / "README.md").is_file()


def test_every_package_ships_and_is_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [package.split("/")[0] for package in packages] == list(ROOMS)
    for package in packages:
        assert (ROOT / package / "py.typed").is_file(), f"{package}/py.typed is missing: mypy would skip the package"


def test_the_wheel_has_every_file_of_the_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    with zipfile.ZipFile(path) as wheel:
        shipped = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    source = {
        file.relative_to(ROOT / room).as_posix(): file.read_bytes()
        for room, package in zip(ROOMS, PACKAGES, strict=True)
        for file in (ROOT / room / package).rglob("*")
        if file.is_file() and file.parent.name != "__pycache__"
    }
    assert shipped.keys() == source.keys()
    assert [name for name in source if shipped[name] != source[name]] == []
    # The Docker backend sets the mode of its executor when it copies it into a container.
    executor = Path("agentkit_environments/docker/executor")
    needed = [executor / name for name in ("executor-amd64", "executor-arm64", "executor.c", "programs.json")]
    needed += [Path(package) / "py.typed" for package in PACKAGES]
    assert {str(path) for path in needed} <= shipped.keys()


@pytest.mark.parametrize("room", ["agentkit", "engine"])
def test_the_published_table_matches_the_results(room: str) -> None:
    records = read_records(ROOT / room / "results/cpu.json")
    assert records and markdown(records) in (ROOT / room / "results/README.md").read_text()


def test_import_agentkit_is_light() -> None:
    heavy = {"torch", "transformers", "triton", "docker"}
    code = f"import sys\nfrom agentkit import Agent\nsys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_imports_test_or_cluster_packages() -> None:
    """Imports every module of every package except `__main__` modules, which run a program, and those of Triton."""
    code = f"""
import importlib, pkgutil, sys
for package in {PACKAGES}:
    importlib.import_module(package)
    for module in pkgutil.walk_packages(sys.modules[package].__path__, package + "."):
        if not module.name.endswith(".__main__") and not module.name.startswith({OF_TRITON}):
            importlib.import_module(module.name)
    print(package, sorted({UNWANTED} & set(sys.modules)))
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.splitlines() == [f"{package} []" for package in PACKAGES], finished.stderr


def test_the_default_install_is_lean() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not [name for name in dependencies if name.startswith(("transformers", "triton"))]
