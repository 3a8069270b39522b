"""The texts that the tiny model was trained on are frozen. If a test fails, restore the text. To change it, edit
this file too and train the model again (see CONTRIBUTING.md)."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agentkit import DEFAULT_SYSTEM
from agentkit_tools import BUILTINS, ToolResult, model_texts

pytestmark = pytest.mark.anyio
Call = Callable[..., Awaitable[ToolResult]]

DEFINITIONS = """\
{"name": "bash", "description": "Run a shell command in the work directory. Only files persist between calls.", "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}
{"name": "read_file", "description": "Return the contents of a text file. Relative paths start at the work directory.", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}}
{"name": "write_file", "description": "Write a text file, replacing it if it exists. Missing parent directories are created.", "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}, "required": ["path", "content"]}}
{"name": "edit_file", "description": "Replace text in a file. The old text must occur exactly once; include enough context.", "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "old": {"type": "string"}, "new": {"type": "string"}}, "required": ["path", "old", "new"]}}
{"name": "list_dir", "description": "List the entries of a directory, one per line. Directories end in a slash.", "parameters": {"type": "object", "properties": {"path": {"default": ".", "type": "string"}}}}
{"name": "search", "description": "Search files for a regular expression, line by line. Returns path:line:text.", "parameters": {"type": "object", "properties": {"pattern": {"type": "string"}, "path": {"default": ".", "type": "string"}}, "required": ["pattern"]}}
{"name": "python", "description": "Run a Python script in the work directory and return its output.", "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}}
{"name": "submit", "description": "Submit the final answer and end the task.", "parameters": {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}}
"""  # noqa: E501


def test_the_definitions_of_the_built_in_tools() -> None:
    assert "".join(json.dumps(tool.spec["function"]) + "\n" for tool in BUILTINS.values()) == DEFINITIONS


def test_texts() -> None:
    texts = {name: value for name, value in vars(model_texts).items() if name.isupper() and isinstance(value, str)}
    assert texts == {
        "DEFAULT_SYSTEM": "You are agentkit, an agent that solves tasks by calling tools.",
        "ERROR": "Error: {message}",
        "NO_OUTPUT": "(no output)",
        "EXIT_CODE": "[exit code {code}]",
        "NO_SUCH_FILE": "{path} does not exist; list the directory to see what does",
        "WROTE": "Wrote {count} bytes to {path}",
        "EDITED": "Replaced 1 occurrence in {path}",
        "FOUND": "{path}:{line}:{text}",
    }
    assert texts["DEFAULT_SYSTEM"] == DEFAULT_SYSTEM


@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("read_file", {"path": "none.txt"}, "Error: none.txt does not exist; list the directory to see what does"),
        ("read_file", {"path": "{x}"}, "Error: {x} does not exist; list the directory to see what does"),
        ("write_file", {"path": "b.txt", "content": "é\n"}, "Wrote 3 bytes to b.txt"),
        ("edit_file", {"path": "a.txt", "old": "one", "new": "two"}, "Replaced 1 occurrence in a.txt"),
        ("search", {"pattern": "on."}, "a.txt:1:one"),
        ("bash", {"command": "true"}, "(no output)"),
        ("bash", {"command": "echo FAIL; exit 1"}, "FAIL\n[exit code 1]"),
        ("python", {"code": "raise SystemExit(2)"}, "[exit code 2]"),
    ],
)
async def test_results_as_in_the_training_rows(call: Call, name: str, arguments: dict[str, Any], content: str) -> None:
    await call("write_file", path="a.txt", content="one\n")
    assert (await call(name, **arguments)).content == content
