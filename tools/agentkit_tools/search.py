"""`search`: find lines that match a regular expression, inside the environment.

The search uses ripgrep if the environment has it, else Python, else `grep -E`. Result format and scope are the same:
every regular text file below the path, including hidden and ignored ones, but nothing below `.git`, no binary files,
and no symbolic links except the path itself. Matching is per line and case-sensitive. Syntax common to all three
(classes, groups, alternation, repetition, anchors, `\\w`, `\\s`, `\\b`) always works. `\\d`, which `grep -E` reads as
the letter d, is refused if there is only grep.
"""

from __future__ import annotations

import re

from agentkit_tools.errors import ToolError
from agentkit_tools.files import printable
from agentkit_tools.function import tool
from agentkit_tools.model_texts import DESCRIPTIONS, FOUND
from agentkit_tools.tool import ToolContext, refuse_nul

MAX_LINE_CHARS = 500
MAX_FOUND_BYTES = 4 << 20
NO_PATH = 44  # exit code of SEARCH
BAD_PATTERN = 2  # of all three programs: a bad pattern if stderr has text, else some files were unreadable
MATCH = re.compile(r"(?P<path>[^\0]+)\0(?P<line>\d+):(?P<text>[^\n]*)\n?")  # a path can contain newlines and colons
NOTE = re.compile(r"(?m)^([^\0\n]*: )?(WARNING: stopped searching binary|binary file matches)[^\0\n]*\n")  # ripgrep's
CUT = re.compile(r"\n\[\.\.\. \d+ bytes cut \.\.\.\]\n[^\n]*\n")  # with the rest of the cut line

PYTHON = r"""
import os, re, sys
pattern, root = sys.argv[1:]
try:
    wanted = re.compile(pattern)
except re.error as error:
    sys.exit(print(error, file=sys.stderr) or 2)
def paths():
    if not os.path.isdir(root):
        yield root
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name != ".git")
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield path
found = False
for path in paths():
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        continue
    if b"\0" in data:
        continue
    lines = data.decode("utf-8", "replace").split("\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        if wanted.search(line):
            found = True
            sys.stdout.buffer.write(os.fsencode(path) + f"\0{number}:{line}\n".encode("utf-8", "replace"))
sys.exit(0 if found else 1)
"""

# Files in the work directory must not affect the search. Without -I, Python would import a `re.py` from there.
SEARCH = rf"""
[ -e "$2" ] || exit {NO_PATH}
[ "$2" != - ] || set -- "$1" ./- "$3"
if command -v rg >/dev/null 2>&1; then
    exec rg --no-config --no-messages --color never --no-heading --with-filename --null --line-number --sort path \
        --no-ignore --hidden --glob '!.git' --regexp "$1" -- "$2"
elif command -v python3 >/dev/null 2>&1; then
    exec python3 -IS -W ignore -c "$3" "$1" "$2"
else
    case "$1" in
        *'\d'* | *'\D'*)
            printf '%s\n' 'write [0-9] instead of \d: only grep is available' >&2
            exit {BAD_PATTERN} ;;
    esac
    exec grep -rnHIZsE --exclude-dir=.git -e "$1" -- "$2"
fi
"""


@tool(description=DESCRIPTIONS["search"], read_only=True)
async def search(pattern: str, context: ToolContext, path: str = ".") -> str:
    """Lines `path:line:text`, sorted by path and line; a text of more than 500 characters is cut at its end."""
    refuse_nul(pattern=pattern, path=path)
    command = ["/bin/sh", "-c", SEARCH, "sh", pattern, path, PYTHON]
    result = await context.environment.exec(command, timeout_s=context.timeout_s, max_output_bytes=MAX_FOUND_BYTES)
    if result.timed_out:
        raise ToolError(f"search timed out after {context.timeout_s:g} s")
    if result.exit_code == NO_PATH:
        raise ToolError(f"No such file or directory: {path}")
    if result.exit_code > BAD_PATTERN or (result.exit_code != 0 and result.stderr):
        reason = result.stderr.strip().rpartition("\n")[2].strip() or f"exit code {result.exit_code}"
        what = "bad pattern" if result.exit_code == BAD_PATTERN else "search failed"
        raise ToolError(f"{what}: {reason.removeprefix('error: ')}")
    parts = CUT.split(result.stdout) if result.truncated else [result.stdout]
    matches = [match for part in parts for match in MATCH.finditer(NOTE.sub("", part))]
    found = sorted((match["path"].removeprefix("./"), int(match["line"]), match["text"]) for match in matches)
    lines = [FOUND.format(path=printable(path), line=line, text=_short(text)) for path, line, text in found]
    if result.truncated:
        lines.append(f"[stopped at {MAX_FOUND_BYTES >> 20} MiB; narrow the pattern or the path]")
    return "\n".join(lines) or "No matches"


def _short(text: str) -> str:
    text = text.removesuffix("\r")
    return text if len(text) <= MAX_LINE_CHARS else f"{text[:MAX_LINE_CHARS]} [...]"
