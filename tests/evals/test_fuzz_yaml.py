"""Any task file, table, suite file or terminal-bench task is read, or refused with `TaskFileError` and its place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from tests.fuzz import amounts, fuzz, near, near_text

from agentkit.errors import TaskFileError
from agentkit.task import Task, load_task, load_yaml
from agentkit_evals.harbor.terminal_bench import read_terminal_bench
from agentkit_evals.suite import SuiteFile
from agentkit_evals.table import read_table

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["a"], "pattern": "a+"}, "at": {"$ref": "#/$defs/at"}},
    "$defs": {"at": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}},
    "required": ["city"],
    "additionalProperties": False,
}
TASK = {
    "id": "a",
    "instruction": "Look.",
    "system": "Be brief.",
    "environment": {
        "image": "a:b",
        "backend": "docker",
        "files": {"a/b": "text"},
        "setup": ["ls"],
        "workdir": "/app",
        "workdir_from_image": True,
        "network": {"setup": "public", "agent": ["pypi.org", "*.example.com:8443", "192.0.2.1"], "verifier": "none"},
        "env": {"A": "b"},
        "limits": {"memory_mib": 64, "cpus": 0.5},
        "snapshots": True,
    },
    "tools": ["bash", {"name": "w", "description": "d", "parameters": SCHEMA, "command": "cat"}],
    "output_schema": {"type": "array", "items": {"type": "integer"}},
    "agent": {"thinking": "auto", "effort": "high", "max_turns": 3, "timeout_s": 5, "compact_at_tokens": 100},
    "verifier": {"command": "true", "files": {"a": "b"}, "timeout_s": 5},
    "solution": {"command": "true", "timeout_s": 3},
    "metadata": {"family": "logs", "n": [1, 2.5, None]},
}
CALLS = {"id": "a", "instruction": "x", "tools": ["bash"], "verifier": {"calls": [{"bash": {"command": ["ls", ""]}}]}}
TESTS = {
    "id": "a",
    "instruction": "x",
    "environment": {"image": "a"},
    "verifier": {"fail_to_pass": ["a::b"], "pass_to_pass": [], "command": "pytest -rA", "patch": "--- a\n+++ b\n"},
}
TABLE = {
    "kind": "stock",
    "functions": {
        "stock": {
            "about": "Return how many of an article are in stock.",
            "takes": {
                "article": "string - a word",
                "(limit)": "integer = 10",
                "(unit)": ["piece"],
                "at": {"a": "number[]"},
            },
            "command": "echo 18",
        },
        "other": {"about": "x", "takes": {"a": {"type": "object"}, "b": [{"c": "boolean"}]}},
    },
    "agent": {"max_turns": 8},
    "rows": [
        {"id": "hinge", "ask": "How many?", "tools": ["stock"], "run": "echo 18", "answer": 18, "lists": ["a", 1]},
        {
            "id": "port",
            "ask": "Set the port.",
            "files": {"server.yaml": "port: 8080\n"},
            "run": "sed -i s/8080/8443/ server.yaml",
            "after": {"server.yaml": "port: 8443\n", "gone": None},
            "edits": ["log"],
            "prints": {"cat log": "x"},
        },
        {
            "id": "owner",
            "ask": "Who owns server.yaml?",
            "files": {"owners.csv": "file,owner\nclient.yaml,Tove\n"},
            "known": ["a", 1],
            "never": ["b"],
            "twin": {"ask": "Who owns client.yaml?", "run": "echo Tove", "answer": "Tove"},
        },
        {"id": "c", "ask": "x", "calls": [{"stock": {"article": "hinge", "limit": [1, 2]}}, {"other": {"b": [[]]}}]},
    ],
}
SUITE = {
    "name": "nightly",
    "tasks": ["smoke.yaml", "more/"],
    "synth": {"operations": ["count_rows"], "per_operation": 10, "seed": 1, "split": "heldout"},
}
BENCH = {
    "instruction": "Do it.",
    "difficulty": "easy",
    "tags": ["a"],
    "parser_name": "pytest",
    "max_agent_timeout_sec": 360.0,
    "run_tests_in_same_shell": False,
}
PIECES = [
    *(
        "- ",
        ": ",
        "? ",
        "\n  ",
        "\t",
        "#",
        "[",
        "]",
        "{",
        "}",
        ",",
        "|",
        ">-",
        "'",
        '"',
        "\\",
        "@",
        "`",
        "\n---\n",
        "...",
    ),
    *(
        "&a ",
        "*a",
        "<<: *a",
        "!!int ",
        "!!map ",
        "!!set ",
        "!file ",
        "!file app.log",
        "%YAML 9.9\n",
        "\ufeff",
        '"\\ud800"',
    ),
    *("0x10", ".inf", "1e9", "2024-02-30", "null", "~", "yes", "id", "verifier"),
]
DOCUMENTS = [TASK, CALLS, TESTS, TABLE, SUITE, BENCH]
texts = st.one_of(
    st.sampled_from(DOCUMENTS).flatmap(near).map(json.dumps),
    st.sampled_from([yaml.safe_dump(each, sort_keys=False) for each in DOCUMENTS]).flatmap(
        lambda text: near_text(text, PIECES)
    ),
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.binary(max_size=100).map(lambda data: data.decode("latin-1")),
)


@pytest.fixture
def read(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Readers of `task.yaml` in a folder that is also a task directory of Terminal-Bench 1."""
    (tmp_path / "app.log").write_text("ERROR\n")
    for name in ("Dockerfile", "run-tests.sh", "solution.sh"):
        (tmp_path / name).touch()
    path = tmp_path / "task.yaml"
    return {
        "task": lambda: load_task(path),
        "table": lambda: list(read_table(path)),
        "suite": lambda: load_yaml(path, SuiteFile),
        "bench": lambda: read_terminal_bench(tmp_path),
    }


@amounts(100, 4_000)
def test_any_yaml_is_read_or_refused(examples: int, read: dict[str, Callable[[], Any]], tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    done = Counter[str]()

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        for kind, reader in read.items():
            try:
                found = reader()
            except TaskFileError as error:
                lines = str(error).splitlines()
                assert all(line.startswith(str(path)) and line.isprintable() for line in lines), lines
                assert lines and len(str(error)) < 20_000
            else:
                done[kind] += 1
                for task in found if isinstance(found, list) else [found]:
                    if isinstance(task, Task):
                        task.build_tools()
                        assert Task.model_validate_json(task.model_dump_json()) == task

    for document in DOCUMENTS:
        check(json.dumps(document))
    assert done.keys() == read.keys()
    fuzz(check, texts, examples)


def test_a_name_with_control_characters_cannot_forge_a_line_of_an_error(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        json.dumps({"kind": "a", "rows": [{"id": "b", "ask": "x", "calls": [{"c\n\x1b[31m": {}}]}]})
    )
    with pytest.raises(TaskFileError) as caught:
        list(read_table(tmp_path / "task.yaml"))
    assert str(caught.value).isprintable() and r"no function c\n\x1b[31m" in str(caught.value)
