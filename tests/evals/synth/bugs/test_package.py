"""Packages: specifications, source distributions, licences, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentkit_evals.errors import NoTestsError, NotPureError, PackageError, UnknownPackageError
from agentkit_evals.synth.bugs.package import PackageSpec, fetch, local_package, read_package
from agentkit_evals.synth.bugs.sandbox import archive, command_for, runner_of, tools_archive

MakeSdist = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("calc==1.0", PackageSpec("calc", "1.0")),
        ("more-itertools==10.1..11.2.1", PackageSpec("more-itertools", "11.2.1", "10.1")),
        ("debian:six", PackageSpec("six", None, debian=True)),
        ("debian:six==1.17.0-1", PackageSpec("six", "1.17.0-1", debian=True)),
    ],
)
def test_specifications(text: str, spec: PackageSpec) -> None:
    assert PackageSpec.parse(text) == spec


@pytest.mark.parametrize("text", ["", "calc", "calc>=1", "calc==", "-r x", "../x==1", "debian:a==1..2", "a==1 2"])
def test_wrong_specifications(text: str) -> None:
    with pytest.raises(UnknownPackageError, match="is not a package; expected NAME==VERSION"):
        PackageSpec.parse(text)


def test_a_source_distribution_is_read(make_sdist: MakeSdist) -> None:
    package = read_package(make_sdist({"setup.py": "boom()", "docs/conf.py": "", "calc_cli.py": "x = 1\n"}))
    assert (package.name, package.version, package.licence, package.source) == ("calc", "1.0", "MIT", "")
    assert (package.modules, package.tests) == (("calc.py", "calc_cli.py"), ("tests/test_calc.py",))
    assert runner_of(package) == "unittest" and len(package.sha256) == 64


def test_a_src_layout_and_a_folder_on_disk(make_sdist: MakeSdist, tmp_path: Path) -> None:
    changes = {
        "calc.py": None,
        "src/calc/__init__.py": "",
        "src/calc/sums.py": "",
        "src/calc/tests/test_s.py": "import pytest",
    }
    package = read_package(make_sdist(changes))
    assert (package.source, package.modules) == ("src", ("src/calc/__init__.py", "src/calc/sums.py"))
    assert package.tests == ("src/calc/tests/test_s.py", "tests/test_calc.py") and runner_of(package) == "pytest"
    for name, content in package.files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    (tmp_path / "tree" / "__pycache__").mkdir()
    (tmp_path / "tree" / "__pycache__" / "x.pyc").write_bytes(b"x")
    (tmp_path / "tree" / "link.py").symlink_to("/etc/passwd")
    local = local_package(tmp_path / "tree")
    assert (local.files, local.modules, local.tests) == (package.files, package.modules, package.tests)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"calc/_speed.pyx": "x"}, NotPureError, "is not pure Python: it has calc/_speed.pyx"),
        ({"tests/test_calc.py": None}, NoTestsError, "has no tests in its source distribution"),
        ({"calc.py": None}, PackageError, "has no Python modules"),
        ({"../../evil.py": "x"}, PackageError, "has an unsafe name"),
        ({"/evil.py": "x"}, PackageError, "has an unsafe name"),
    ],
)
def test_what_cannot_be_used_is_refused(
    make_sdist: MakeSdist, changes: dict[str, str | None], error: type[PackageError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_package(make_sdist(changes))


def test_compiled_code_of_tests_does_not_count(make_sdist: MakeSdist) -> None:
    assert read_package(make_sdist({"tests/data/x.c": "int x;"})).name == "calc"


def test_a_damaged_archive_and_a_missing_folder(index: Path) -> None:
    (index / "calc-1.0.tar.gz").write_bytes(b"no archive")
    with pytest.raises(PackageError, match=r"calc-1\.0\.tar\.gz is not a readable archive"):
        read_package(index / "calc-1.0.tar.gz")
    with pytest.raises(UnknownPackageError, match="is not a folder"):
        local_package(index / "missing")


def test_a_package_is_fetched_from_a_folder_and_from_the_cache(
    make_sdist: MakeSdist, index: Path, tmp_path: Path
) -> None:
    path = make_sdist()
    spec = PackageSpec.parse("Calc==1.0.0")
    assert fetch(spec, tmp_path / "cache", index) == path
    assert fetch(spec, index) == path  # a cache that has it asks nobody
    (index / "six_1.17.0.orig.tar.gz").write_bytes(b"")
    assert fetch(PackageSpec.parse("debian:six==1.17.0-1"), index).name == "six_1.17.0.orig.tar.gz"
    with pytest.raises(UnknownPackageError, match=r"has no source distribution of calc==2\.0"):
        fetch(PackageSpec.parse("calc==2.0"), tmp_path / "cache", index)
    with pytest.raises(UnknownPackageError, match="is not a folder"):
        fetch(PackageSpec.parse("calc==2.0"), tmp_path / "cache", tmp_path / "nowhere")


def test_a_package_that_pip_does_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UnknownPackageError, match=r"calc==1\.0 is not in the package index"):
        fetch(PackageSpec.parse("calc==1.0"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_fetches_into_a_cache_with_a_relative_path(
    make_sdist: MakeSdist, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = """
from pathlib import Path


def prepare_metadata_for_build_wheel(folder, settings=None):
    made = Path(folder, "calc-1.0.dist-info")
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: calc\\nVersion: 1.0\\n")
    return made.name
"""
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    made = make_sdist({"pyproject.toml": build, "backend.py": backend})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.chdir(tmp_path)
    path = fetch(PackageSpec.parse("calc==1.0"), Path("out", "cache"))
    assert (path, path.read_bytes()) == (Path("out", "cache", made.name), made.read_bytes())


def test_a_debian_package_is_its_upstream_source(
    make_sdist: MakeSdist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = make_sdist({"PKG-INFO": None}, version="1.17.0")
    client = tmp_path / "bin" / "apt-get"
    client.parent.mkdir()
    client.write_text(
        f"""#!/bin/sh
test "$*" = "source --download-only -qq calc" || {{ echo "E: Unable to find a source package for $4" >&2; exit 100; }}
cp {upstream} calc_1.17.0.orig.tar.gz
"""
    )
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent), prepend=":")
    spec = PackageSpec.parse("debian:calc")
    path = fetch(spec, tmp_path / "cache")
    assert path == tmp_path / "cache" / "calc_1.17.0.orig.tar.gz"
    package = read_package(path, spec)
    assert (package.name, package.version, package.licence) == ("calc", "1.17.0", None)
    with pytest.raises(UnknownPackageError, match="nothing is not in the package index, or has no source distribution"):
        fetch(PackageSpec.parse("debian:nothing"), tmp_path / "cache")


def test_archives_have_the_same_bytes_each_time() -> None:
    assert archive({"b": b"1", "a": b"2"}, ["a"]) == archive({"a": b"2", "b": b"1"}, ["a"])


def test_pytest_runs_from_its_bundle_alone(make_sdist: MakeSdist, tmp_path: Path) -> None:
    package = read_package(make_sdist({"tests/test_calc.py": "import pytest\ndef test_x(): assert 1\n"}))
    (tmp_path / "tools.tar.gz").write_bytes(tools_archive(package, "pytest", tmp_path))
    (tmp_path / "tools").mkdir()
    subprocess.run(["tar", "-xzf", "tools.tar.gz", "-C", "tools"], cwd=tmp_path, check=True)
    (tmp_path / "test_x.py").write_text("def test_x(): assert 1\n")
    command = command_for(package, "pytest", ["test_x.py"]).replace("python3", sys.executable, 1)
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env={"PYTHONPATH": "tools", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "PASSED test_x.py::test_x" in done.stdout, done.stdout + done.stderr
