"""`read_file`, `write_file`, `list_dir`: files in the environment; paths are relative to its work directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from agentkit_environments import FileTooLargeError, UnsafePathError
from agentkit_tools.errors import ToolError
from agentkit_tools.function import tool
from agentkit_tools.model_texts import DESCRIPTIONS, NO_SUCH_FILE, WROTE
from agentkit_tools.tool import ToolContext, ToolOutput, refuse_nul

NO_DIRECTORY, NOT_A_DIRECTORY, NOT_READABLE = 44, 45, 46  # exit codes of LIST_DIR
# Shell builtins only: no program in the image is run, and names with a newline or a leading `-` are safe.
LIST_DIR = f"""
case "$1" in /* | "") ;; *) set -- "./$1" ;; esac
[ -e "$1" ] || exit {NO_DIRECTORY}
[ -d "$1" ] || exit {NOT_A_DIRECTORY}
cd -P "$1" 2>/dev/null && [ -r . ] || exit {NOT_READABLE}
for name in * .[!.]* ..?*; do
    if [ -d "$name" ] && [ ! -L "$name" ]; then
        printf '%s/\\0' "$name"
    elif [ -e "$name" ] || [ -L "$name" ]; then
        printf '%s\\0' "$name"
    fi
done
"""
MAX_LISTED_BYTES = 32 << 20


@contextmanager
def file_errors(path: str) -> Iterator[None]:
    """Turn file system errors into short `ToolError`s that quote the path as the model wrote it."""
    try:
        yield
    except FileNotFoundError:
        raise ToolError(NO_SUCH_FILE.format(path=path)) from None
    except IsADirectoryError:
        raise ToolError(f"Is a directory: {path}") from None
    except NotADirectoryError:
        raise ToolError(f"Not a directory: {path}") from None
    except PermissionError:
        raise ToolError(f"Permission denied: {path}") from None
    except OSError as error:
        raise ToolError(f"{error.strerror or error}: {path}") from None
    except FileTooLargeError:
        raise ToolError(f"File too large: {path}; use bash to read part of it") from None
    except UnsafePathError as error:
        raise ToolError(f"Bad path: {error}") from None


@tool(description=DESCRIPTIONS["read_file"], read_only=True)
async def read_file(path: str, context: ToolContext) -> ToolOutput:
    """Return the text of the file as it is; bytes that are not UTF-8 come out as U+FFFD."""
    with file_errors(path):
        data = await context.environment.read_file(path)
    return ToolOutput(data.decode("utf-8", "replace"), path=path)


@tool(description=DESCRIPTIONS["write_file"])
async def write_file(path: str, content: str, context: ToolContext) -> str:
    """Write `content` as UTF-8, making parent directories as needed."""
    data = content.encode()
    with file_errors(path):
        await context.environment.write_file(path, data)
    return WROTE.format(count=len(data), path=path)


@tool(description=DESCRIPTIONS["list_dir"], read_only=True)
async def list_dir(context: ToolContext, path: str = ".") -> str:
    """One name per line, sorted, hidden ones too; directories end in `/`. Names with control characters are quoted."""
    refuse_nul(path=path)
    command = ["/bin/sh", "-c", LIST_DIR, "sh", path]
    result = await context.environment.exec(command, timeout_s=context.timeout_s, max_output_bytes=MAX_LISTED_BYTES)
    if result.timed_out:
        raise ToolError(f"list_dir timed out after {context.timeout_s:g} s")
    if result.exit_code == NO_DIRECTORY:
        raise ToolError(f"No such directory: {path}")
    if result.exit_code == NOT_A_DIRECTORY:
        raise ToolError(f"Not a directory: {path}")
    if result.exit_code == NOT_READABLE:
        raise ToolError(f"Permission denied: {path}")
    if result.exit_code != 0:
        raise ToolError(f"Cannot list {path}: {result.stderr.strip()}")
    return "\n".join(map(printable, sorted(filter(None, result.stdout.split("\0"))))) or "(empty)"


def printable(name: str) -> str:
    """Return a file name on one line; names with control characters are quoted as in JSON."""
    return name if name.isprintable() else json.dumps(name)
