"""Texts that the tiny model was trained on. Changing one requires training the model again.

They are the default system prompt, the descriptions of the built-in tools, and the result and error texts that occur in
the training rows (`python -m agentkit_evals.synth`). Two more things are frozen but defined elsewhere: the names and
parameters of the built-in tools (in the functions), and the format of tool definitions and results in
`agentkit_engine.chat` (set by the checkpoint). All other result and error texts (unknown tools, invalid arguments,
malformed calls, deadlines, limits) occur in no training row and can change at any time.

`tests/tools/test_model_texts.py` fails when one of these texts changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

DEFAULT_SYSTEM: Final = "You are agentkit, an agent that solves tasks by calling tools."

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "bash": "Run a shell command in the work directory. Only files persist between calls.",
    "read_file": "Return the contents of a text file. Relative paths start at the work directory.",
    "write_file": "Write a text file, replacing it if it exists. Missing parent directories are created.",
    "edit_file": "Replace text in a file. The old text must occur exactly once; include enough context.",
    "list_dir": "List the entries of a directory, one per line. Directories end in a slash.",
    "search": "Search files for a regular expression, line by line. Returns path:line:text.",
    "python": "Run a Python script in the work directory and return its output.",
    "submit": "Submit the final answer and end the task.",
}

ERROR: Final = "Error: {message}"
NO_OUTPUT: Final = "(no output)"
EXIT_CODE: Final = "[exit code {code}]"
NO_SUCH_FILE: Final = "{path} does not exist; list the directory to see what does"
WROTE: Final = "Wrote {count} bytes to {path}"
EDITED: Final = "Replaced 1 occurrence in {path}"
FOUND: Final = "{path}:{line}:{text}"
