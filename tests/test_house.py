"""The structure of the repository: rooms, packaging and the import contract."""

from __future__ import annotations

import subprocess
import sys
import tomllib
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
