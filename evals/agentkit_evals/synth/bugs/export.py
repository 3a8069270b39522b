"""Export of bugs: as tasks of agentkit, as rows in the format of SWE-bench, and as Harbor task directories.

    tasks/NAME-VERSION/      ID.yaml and its patches; the package and the test runner in base64, which its tasks share
    swebench/rows.jsonl      rows; images/ID/ is the folder to build a row's image from
    harbor/ID/               task.toml, instruction.md, environment/, solution/, tests/

A task needs no image: its setup unpacks the repository, applies the fault and commits. `Bug.base_commit` is that
commit's id, in a sandbox and in an image.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from agentkit_evals.errors import not_written
from agentkit_evals.provenance import Provenance
from agentkit_evals.swebench import INSTRUCTION
from agentkit_evals.synth.bugs.find import Bug
from agentkit_evals.synth.bugs.package import Package
from agentkit_evals.synth.bugs.sandbox import (
    COMMIT,
    IDENTITY,
    TOOLS,
    UNITTEST,
    Runner,
    archive,
    command_for,
    tools_archive,
    variables,
)

ExportFormat = Literal["tasks", "swebench", "harbor"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
IMAGE_TOOLS = "/opt/agentkit-tools"
TESTBED = "/testbed"
PYTHON_IMAGE = "python:3.11-slim"
TEST_TIMEOUT_S = 600.0

_COMMIT = f"{' '.join(f'{name}={shlex.quote(value)}' for name, value in IDENTITY.items())}; {COMMIT}"
_SETUP = (
    f"mkdir -p {TOOLS} && base64 -d .agentkit/tools.b64 | tar -xz -C {TOOLS}",
    "base64 -d .agentkit/source.b64 | tar -xz",
    "git apply --whitespace=nowarn .agentkit/bug.patch && rm -r .agentkit",
    f"export {_COMMIT}",
)
DOCKERFILE = f"""\
FROM {PYTHON_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR {TESTBED}
ADD tools.tar.gz {IMAGE_TOOLS}/
ADD source.tar.gz {TESTBED}/
COPY bug.patch /tmp/bug.patch
RUN git apply --whitespace=nowarn /tmp/bug.patch && rm /tmp/bug.patch && export {_COMMIT}
ENV {{variables}}
"""


class _FileText(str):
    """Name of a file that YAML includes with `!file`."""


class _Dumper(yaml.SafeDumper):
    pass


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(_FileText, lambda dumper, name: dumper.represent_scalar("!file", str(name)))
_Dumper.add_representer(str, _represent)


def export(
    package: Package,
    runner: Runner,
    bugs: Sequence[Bug],
    provenance: Provenance,
    out: Path,
    formats: Sequence[ExportFormat],
) -> None:
    """Write the bugs of one package below `out`. Existing files of the same names are replaced.

    Raises:
        OutputError: a file cannot be written.
        PackageError: the test runner or a required package is missing.
    """
    source = archive(package.files, package.executable)
    tools = tools_archive(package, runner, out / "cache")
    try:
        for each in formats:
            _EXPORTS[each](_Material(package, runner, source, tools, provenance, out), bugs)
    except OSError as exc:
        raise not_written(exc, out) from exc


class _Material:
    """The inputs that all bugs of a package share."""

    def __init__(
        self, package: Package, runner: Runner, source: bytes, tools: bytes, provenance: Provenance, out: Path
    ) -> None:
        self.package, self.runner, self.source, self.tools, self.out = package, runner, source, tools, out
        self.provenance = provenance.model_dump(exclude_none=True)
        self.name = f"{package.name}-{package.version}"

    def command(self, bug: Bug) -> str:
        return command_for(self.package, self.runner, bug.test_files)

    def metadata(self, bug: Bug) -> dict[str, Any]:
        return {"family": f"bugs/{self.package.name}", "kind": bug.kind, "provenance": self.provenance}

    def instruction(self, bug: Bug) -> str:
        return (
            INSTRUCTION.format(repo=f"{self.package.name} {self.package.version}", problem=bug.issue)
            + f"\nThe tests of the repository run with:\n\n    {self.command(bug)}\n"
        )


def _tasks(material: _Material, bugs: Sequence[Bug]) -> None:
    folder = material.out / "tasks" / material.name
    _write(folder / "source.b64", base64.encodebytes(material.source))
    _write(folder / "tools.b64", base64.encodebytes(material.tools))
    for bug in bugs:
        task = {
            "id": bug.id,
            "instruction": material.instruction(bug),
            "environment": {
                "files": {
                    ".agentkit/source.b64": _FileText("source.b64"),
                    ".agentkit/tools.b64": _FileText("tools.b64"),
                    ".agentkit/bug.patch": _FileText(f"{bug.id}.bug.patch"),
                },
                "setup": list(_SETUP),
                "env": variables(material.package),
                "limits": {"memory_mib": 2048},
            },
            "agent": {"max_turns": 60, "timeout_s": 1800.0},
            "verifier": {
                "command": material.command(bug),
                "fail_to_pass": bug.fail_to_pass,
                "pass_to_pass": bug.pass_to_pass,
                "patch": _FileText(f"{bug.id}.test.patch"),
                "timeout_s": TEST_TIMEOUT_S,
            },
            "solution": {"command": _applying(bug.fix)},
            "metadata": material.metadata(bug),
        }
        _write(folder / f"{bug.id}.bug.patch", bug.bug_patch.encode())
        _write(folder / f"{bug.id}.test.patch", bug.test_patch.encode())
        text = yaml.dump(task, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        _write(folder / f"{bug.id}.yaml", text.encode())


def _swebench(material: _Material, bugs: Sequence[Bug]) -> None:
    rows = []
    for bug in bugs:
        _image_folder(material, bug, material.out / "swebench" / "images" / bug.id)
        rows.append(
            {
                "repo": f"bugs/{material.package.name}",
                "instance_id": bug.id,
                "base_commit": bug.base_commit,
                "patch": bug.fix,
                "test_patch": bug.test_patch,
                "problem_statement": bug.issue,
                "hints_text": "",
                "version": material.package.version,
                "FAIL_TO_PASS": bug.fail_to_pass,
                "PASS_TO_PASS": bug.pass_to_pass,
                "image": f"agentkit-bugs/{bug.id.lower()}:latest",
                "workdir": TESTBED,
                "eval_script": _eval_script(material, bug),
                "eval_type": "pass_and_fail",
                "metadata": material.metadata(bug),
            }
        )
    file = material.out / "swebench" / "rows.jsonl"
    ours = {bug.id for bug in bugs}
    others = (
        [line for line in file.read_text().splitlines() if json.loads(line)["instance_id"] not in ours]
        if file.exists()
        else []
    )
    lines = sorted([*others, *(json.dumps(row) for row in rows)], key=lambda line: str(json.loads(line)["instance_id"]))
    _write(file, "".join(line + "\n" for line in lines).encode())


def _harbor(material: _Material, bugs: Sequence[Bug]) -> None:
    for bug in bugs:
        folder = material.out / "harbor" / bug.id
        _image_folder(material, bug, folder / "environment")
        _write(folder / "task.toml", _toml(material, bug).encode())
        _write(folder / "instruction.md", material.instruction(bug).encode())
        _write(
            folder / "solution" / "solve.sh", f"#!/bin/bash\nset -e\ncd {TESTBED}\n{_applying(bug.fix)}".encode(), 0o755
        )
        _write(folder / "tests" / "test.patch", bug.test_patch.encode())
        _write(folder / "tests" / "tests.txt", "".join(f"{each}\n" for each in _addresses(material, bug)).encode())
        _write(folder / "tests" / "test.sh", _harbor_script(material, bug).encode(), 0o755)


def _toml(material: _Material, bug: Bug) -> str:
    origin = "\n".join(f"{key} = {json.dumps(value)}" for key, value in material.provenance.items())
    return f"""\
schema_version = "1.4"

[task]
name = "agentkit-bugs/{bug.id}"
description = "A bug in {material.package.name} {material.package.version}"
keywords = ["python", "bug"]

[metadata]
kind = "{bug.kind}"

[metadata.provenance]
{origin}

[agent]
timeout_sec = 1800.0

[verifier]
timeout_sec = {TEST_TIMEOUT_S}

[environment]
build_timeout_sec = 600.0
cpus = 1
memory_mb = 2048
storage_mb = 2048
workdir = "{TESTBED}"
network_mode = "no-network"
"""


def _eval_script(material: _Material, bug: Bug) -> str:
    return f"""\
#!/bin/bash
{_start(material)}
{_restored_tests(bug)}
{_applying(bug.test_patch)}echo '>>>>> Start Test Output'
{material.command(bug)}
echo '>>>>> End Test Output'
"""


def _harbor_script(material: _Material, bug: Bug) -> str:
    if material.runner == "unittest":
        command = shlex.join(["python3", "-S", "-c", UNITTEST.format(False)]) + " $(cat /tests/tests.txt)"
    else:
        command = "python3 -S -m pytest -q -p no:cacheprovider -o addopts= @/tests/tests.txt"
    return f"""\
#!/bin/bash
{_start(material)}
{_restored_tests(bug)}
mkdir -p /logs/verifier
if git apply --whitespace=nowarn /tests/test.patch && {command}
then echo 1; else echo 0; fi > /tmp/reward
tail -n 1 /tmp/reward > /logs/verifier/reward.txt
"""


def _start(material: _Material) -> str:
    pairs = variables(material.package, IMAGE_TOOLS, TESTBED).items()
    return f"cd {TESTBED}\nexport {' '.join(f'{name}={value}' for name, value in pairs)}"


def _restored_tests(bug: Bug) -> str:
    """Return commands that undo the agent's changes to the files of the test patch."""
    new = re.findall(r"^diff --git a/(.*) b/\1\nnew file mode", bug.test_patch, re.MULTILINE)
    every = re.findall(r"^diff --git a/(.*) b/\1$", bug.test_patch, re.MULTILINE)
    changed = [path for path in every if path not in new]
    commands = [shlex.join(["rm", "-rf", "--", *new])] if new else []
    if changed:
        commands.append(shlex.join(["git", "checkout", "-q", bug.base_commit, "--", *changed]))
    return "\n".join(commands)


def _addresses(material: _Material, bug: Bug) -> list[str]:
    """Return the tests that score, as arguments of the test runner."""
    tests = [*bug.fail_to_pass, *bug.pass_to_pass]
    return [re.sub(r"^\w+ \((.*)\)$", r"\1", test) for test in tests] if material.runner == "unittest" else tests


def _applying(patch: str) -> str:
    end = f"END_{hashlib.sha256(patch.encode()).hexdigest()[:16]}"
    return f"git apply --whitespace=nowarn - <<'{end}'\n{patch}{end}\n"


def _image_folder(material: _Material, bug: Bug, folder: Path) -> None:
    pairs = variables(material.package, IMAGE_TOOLS, TESTBED).items()
    values = " ".join(f"{name}={value}" for name, value in pairs)
    _write(folder / "Dockerfile", DOCKERFILE.format(variables=values).encode())
    _write(folder / "bug.patch", bug.bug_patch.encode())
    for name, data in (("source.tar.gz", material.source), ("tools.tar.gz", material.tools)):
        shared = material.out / "cache" / f"{material.name}.{name}"
        if not shared.exists():
            _write(shared, data)
        _link(shared, folder / name)


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file as a whole: a full disk leaves the earlier one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


_EXPORTS: Mapping[ExportFormat, Callable[[_Material, Sequence[Bug]], None]] = {
    "tasks": _tasks,
    "swebench": _swebench,
    "harbor": _harbor,
}
