"""Every example in a README, a document or a docstring runs and prints its claimed output.

The fenced blocks of a document run in order, in one folder with its YAML blocks as files; Python blocks share their
names. Claimed output is the comment at the end of a Python block, the lines without `$` in a console block, or a
paragraph after the block that begins with "It prints `...`". A comment `exit N` claims an exit status; the default is
0. A block that cannot run has a comment with the reason before it:

    <!-- example: not run: REASON -->
    <!-- example: not working yet: REASON -->

A block marked "not working yet" runs too and must fail; remove the comment once it works.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from agentkit.task import load_task
from agentkit_engine.engine import PACKAGED_MODELS
from agentkit_environments import available_backends
from agentkit_evals.suite import load_suite

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("*/agentkit*/__init__.py"))
DOCUMENTS = [
    path
    for path in sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/agentkit*/**/*.md")})
    if "```" in path.read_text()
]
MARKS = {"not run": 11, "not working yet": 0}
"""Number of marked blocks, so that a new mark is a deliberate change."""
FENCE = re.compile(
    r"(?:<!-- example: (?P<mark>[^:]+): (?P<why>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```\n", re.M | re.S
)
PRINTS = re.compile(r"\s*It prints `([^`]+)`")
LANGUAGES = {"bash", "console", "python", "text", "toml", "yaml", "json"}

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(
        not (PACKAGED_MODELS["tiny"] / "config.json").is_file(), reason="the tiny model is not packaged"
    ),
    pytest.mark.skipif(
        all(reason for backend, reason in available_backends().items() if backend != "unsafe-local"),
        reason="no sandbox can be opened here",
    ),
]

DRIVER = """
import ast, asyncio, json, sys
names = {"__name__": "example"}
for code, where in json.load(open(sys.argv[1])):
    print("\\0", end="", flush=True)
    compiled = compile(code, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(compiled, names)
    if compiled.co_flags & 0x80:  # CO_COROUTINE: the block awaits
        asyncio.run(result)
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block with its location, its mark, and the text after it."""

    language: str
    code: str
    where: str
    mark: str | None
    why: str
    after: str

    @property
    def output(self) -> str | None:
        """The claimed output of a Python block."""
        if match := PRINTS.match(self.after):
            return match[1] + "\n"
        lines = self.code.rstrip().split("\n")
        tail = lines[len(lines) - next((i for i, line in enumerate(reversed(lines)) if not line.startswith("# ")), 0) :]
        return "".join(f"{line[2:]}\n" for line in tail) or None


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    return [
        Block(
            m["language"],
            m["code"],
            f"{name}:{text[: m.start('code')].count(chr(10))}",
            m["mark"],
            m["why"] or "",
            text[m.end() :],
        )
        for m in FENCE.finditer(text)
    ]


def world(folder: Path, found: list[Block]) -> dict[str, str]:
    """Write the files used by a document's examples into a folder, and return the environment to run them in."""
    (folder / "app.log").write_text("INFO a\nERROR b\nERROR c\nERROR d\n")
    (folder / "app.json").write_text('{"host": "a", "port": 80}\n')
    for block in found:
        if block.language == "yaml" and (match := re.match(r"id: (\S+)", block.code)):
            for place in (".", "tasks", "suite"):
                (folder / place).mkdir(exist_ok=True)
                (folder / place / f"{match[1]}.yaml").write_text(block.code)
                shutil.copy(folder / "app.log", folder / place / "app.log") if place != "." else None
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "HOME": str(folder),
        "AGENTKIT_HOME": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_python(codes: list[tuple[str, str]], folder: Path, env: dict[str, str]) -> list[str]:
    """Run blocks in order with shared names; return the output of each."""
    (folder / "blocks.json").write_text(json.dumps(codes))
    argv = [sys.executable, "-c", DRIVER, "blocks.json"]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[1:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_has_a_known_language_and_mark(path: Path) -> None:
    found = blocks(path)
    assert len(found) * 2 == len(re.findall(r"^ *```", path.read_text(), re.M)), "a fence that this test does not see"
    for block in found:
        assert block.language in LANGUAGES, f"{block.where}: name the language of the block (text for a drawing)"
        assert block.mark in (None, *MARKS), f"{block.where}: unknown mark {block.mark!r}"


def test_marks_are_counted() -> None:
    marks = Counter(block.mark for path in DOCUMENTS for block in blocks(path) if block.mark)
    assert {**dict.fromkeys(MARKS, 0), **marks} == MARKS


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if any(b.language == "python" for b in blocks(path))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_python_examples(path: Path, tmp_path: Path) -> None:
    found = blocks(path)
    wanted = [block for block in found if block.language == "python" and block.mark is None]
    printed = run_python([(block.code, block.where) for block in wanted], tmp_path, world(tmp_path, found))
    for block, output in zip(wanted, printed, strict=True):
        if block.output is not None:
            assert output.rstrip() == block.output.rstrip(), block.where


COMMANDS = [
    (path, block)
    for path in DOCUMENTS
    for block in blocks(path)
    if block.language in ("bash", "console") and block.mark != "not run"
]


@pytest.mark.parametrize(("path", "block"), COMMANDS, ids=[block.where for _, block in COMMANDS])
def test_commands(path: Path, block: Block, tmp_path: Path) -> None:
    env = world(tmp_path, blocks(path))
    statuses: list[bool] = []
    for line, claimed in commands(block):
        command, _, comment = line.partition("  # ")
        expected = int(match[1]) if (match := re.match(r"\s*exit (\d+)$", comment)) else 0
        runs = sorted(tmp_path.glob("runs/*"))
        command = command.replace("FOLDER", "cache").replace("runs/RUN", str(runs[-1]) if runs else "runs/RUN")
        if "cache" in command:
            (tmp_path / "cache").mkdir(exist_ok=True)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250, check=False
        )
        statuses.append(done.returncode == expected)
        assert statuses[-1] or block.mark, (
            f"{block.where}: {command} exited with {done.returncode}\n{done.stdout}{done.stderr}"
        )
        assert "Traceback" not in done.stderr
        assert claimed in done.stdout, f"{block.where}: {command}"
    assert block.mark is None or not any(statuses), f"{block.where} works now: remove its mark"


def commands(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a block with their claimed output."""
    lines = block.code.replace("\\\n", "").splitlines()
    if block.language == "bash":
        return [(line, "") for line in lines if line.strip() and not line.startswith("#")]
    found: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif line.strip():
            found[-1] = found[-1][0], f"{found[-1][1]}{line}\n"
    return found


YAML = [
    (path, block) for path in DOCUMENTS for block in blocks(path) if block.language == "yaml" and block.mark is None
]


@pytest.mark.parametrize(("path", "block"), YAML, ids=[block.where for _, block in YAML])
def test_yaml_examples(path: Path, block: Block, tmp_path: Path) -> None:
    check_yaml(block.code, tmp_path)


def check_yaml(code: str, folder: Path) -> None:
    """Load a YAML example as a task, a table, a suite, or keys of a task."""
    world(folder, [])
    (folder / "example.yaml").write_text(code)
    keys = re.findall(r"^(\w+):", code, re.M)
    if "rows" in keys:
        assert load_suite(str(folder / "example.yaml")).cases
        return
    if "instruction" not in keys and {"tasks", "synth"} & {*keys}:
        data = yaml.safe_load(code)
        for place in data["tasks"]:
            (folder / place).mkdir() if place.endswith("/") else None
            task = folder / place / "more.yaml" if place.endswith("/") else folder / place
            task.write_text(f"id: {task.stem}\ninstruction: Do it.\nverifier: {{command: 'true'}}\n")
        assert len(load_suite(str(folder / "example.yaml")).cases) > len(data["tasks"])
        return
    if "instruction" not in keys:
        (folder / "example.yaml").write_text(f"id: example\ninstruction: Do it.\n{code}")
    assert load_task(folder / "example.yaml").build_tools()


def docstring_examples() -> list[tuple[str, str, str, str]]:
    """Return indented code blocks of docstrings as (module, location, language, code)."""
    found: list[tuple[str, str, str, str]] = []
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            tree = ast.parse(path.read_text())
            module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
            for node in ast.walk(tree):
                if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                for match in re.finditer(r"\n\n((?:    [^\n]*\n|\n)+)", f"{ast.get_docstring(node) or ''}\n"):
                    code = textwrap.dedent(match[1]).strip("\n") + "\n"
                    where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                    if language := language_of(code):
                        found.append((module, where, language, code))
    return found


def language_of(code: str) -> str | None:
    """Return the language of an example; None for a drawing, a table or a formula."""
    if re.match(r"(id|name|kind): \S+\n", code):
        return "yaml"
    try:
        tree = compile(code, "example", "exec", flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except SyntaxError:
        return None
    assert isinstance(tree, ast.Module)
    statements = ast.Import | ast.ImportFrom | ast.Assign | ast.With | ast.AsyncWith | ast.For
    return "python" if any(isinstance(node, statements) for node in tree.body) else None


IN_DOCSTRINGS = docstring_examples()


def test_examples_in_docstrings_are_found() -> None:
    assert {module for module, *_ in IN_DOCSTRINGS} >= {
        *("agentkit", "agentkit.task", "agentkit_engine", "agentkit_evals", "agentkit_evals.suite")
    }


@pytest.mark.parametrize(
    ("module", "where", "language", "code"), IN_DOCSTRINGS, ids=[each[1] for each in IN_DOCSTRINGS]
)
def test_examples_in_docstrings(module: str, where: str, language: str, code: str, tmp_path: Path) -> None:
    if language == "yaml":
        check_yaml(code, tmp_path)
        return
    env = world(tmp_path, [])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "a.yaml").write_text(
        "id: a\ninstruction: Say hello.\nagent: {max_tokens: 20}\nverifier: {command: 'true'}\n"
    )
    imports = f"from pathlib import Path\nfrom agentkit import *\nfrom {module} import *\n"
    importlib.import_module(module)
    run_python([(imports, where), (code, where)], tmp_path, env)
