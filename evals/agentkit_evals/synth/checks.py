"""Verifiers that several operations share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAME_FILES = '''\
"""Compare files with those expected: JSON and TOML by value, all others by line, without blank lines and quotes."""
import json, os, sys, tomllib

def read(path):
    text = open(path, encoding="utf-8").read()
    if path.endswith(".json"):
        return json.loads(text)
    if path.endswith(".toml"):
        return tomllib.loads(text)
    return [line.replace('"', "").replace("'", "").rstrip() for line in text.splitlines() if line.strip()]

root = os.path.join(os.environ["AGENTKIT_VERIFIER_DIR"], "expected")
for folder, _, names in os.walk(root):
    for name in names:
        expected = os.path.join(folder, name)
        given = os.path.relpath(expected, root)
        if not os.path.isfile(given):
            sys.exit(given + " is missing")
        if read(given) != read(expected):
            sys.exit(given + " is not as asked")
'''


def same_files(expected: Mapping[str, str]) -> dict[str, Any]:
    """Return the `verifier` and `verifier_files` of a draft after which these files must have these contents."""
    return {
        "verifier": 'python3 "$AGENTKIT_VERIFIER_DIR/same_files.py"',
        "verifier_files": {
            "same_files.py": SAME_FILES,
            **{f"expected/{path}": text for path, text in expected.items()},
        },
    }
