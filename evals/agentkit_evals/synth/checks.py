"""Verifiers that several operations share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from agentkit_evals.synth import same_files as script

EXPECTED = "expected/"


def same_files(expected: Mapping[str, str]) -> dict[str, Any]:
    """Return the `verifier` and `verifier_files` of a draft after which these files must have these contents."""
    return {
        "verifier": 'python3 "$AGENTKIT_VERIFIER_DIR/same_files.py"',
        "verifier_files": {
            "same_files.py": inspect.getsource(script),
            **{f"{EXPECTED}{path}": text for path, text in expected.items()},
        },
    }


def nothing_to_do(verifier_files: Mapping[str, str], files: Mapping[str, str]) -> bool:
    """Return whether the files already are as `same_files` expects them; False for other verifiers."""
    expected = {path.removeprefix(EXPECTED): text for path, text in verifier_files.items() if path.startswith(EXPECTED)}
    return bool(expected) and all(
        path in files and script.parsed(path, files[path]) == script.parsed(path, text)
        for path, text in expected.items()
    )
