"""`read_file`, `write_file`, `list_dir`: plain files in the environment; relative paths start at its work directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agentkit_environments import FileTooLargeError, UnsafePathError
from agentkit_tools.errors import ToolError
from agentkit_tools.function import tool
from agentkit_tools.tool import ToolContext, refuse_nul

NO_DIRECTORY, NOT_A_DIRECTORY = 44, 45  # exit codes of LIST_DIR, above those of ls
LIST_DIR = f"""
[ -e "$1" ] || exit {NO_DIRECTORY}
[ -d "$1" ] || exit {NOT_A_DIRECTORY}
exec ls -1Ap -- "$1"
"""


@contextmanager
def file_errors(path: str) -> Iterator[None]:
    """Say the file system's usual refusals in few words, with the path as the model wrote it."""
    try:
        yield
    except FileNotFoundError:
        raise ToolError(f"No such file: {path}") from None
    except IsADirectoryError:
        raise ToolError(f"Is a directory: {path}") from None
    except NotADirectoryError:
        raise ToolError(f"Not a directory: {path}") from None
    except PermissionError:
        raise ToolError(f"Permission denied: {path}") from None
    except OSError as error:
        raise ToolError(f"{error.strerror or error}: {path}") from None
    except FileTooLargeError:
        raise ToolError(f"File too large: {path}; use bash to look at a part of it") from None
    except UnsafePathError as error:
        raise ToolError(f"Bad path: {error}") from None


@tool(description="Read a text file.", read_only=True)
async def read_file(path: str, context: ToolContext) -> str:
    """Return the text of the file as it is; bytes that are not UTF-8 come out as U+FFFD."""
    with file_errors(path):
        return (await context.environment.read_file(path)).decode("utf-8", "replace")


@tool(description="Create or overwrite a file.")
async def write_file(path: str, content: str, context: ToolContext) -> str:
    """Write `content` as UTF-8, making parent directories as needed."""
    data = content.encode()
    with file_errors(path):
        await context.environment.write_file(path, data)
    return f"Wrote {len(data)} bytes to {path}"


@tool(description="List a directory.", read_only=True)
async def list_dir(context: ToolContext, path: str = ".") -> str:
    """One name per line, sorted, hidden ones too; directories end in `/`."""
    refuse_nul(path=path)
    command = ["/bin/sh", "-c", LIST_DIR, "sh", path]
    result = await context.environment.exec(command, timeout_s=context.timeout_s)
    if result.timed_out:
        raise ToolError(f"list_dir timed out after {context.timeout_s:g} s")
    if result.exit_code == NO_DIRECTORY:
        raise ToolError(f"No such directory: {path}")
    if result.exit_code == NOT_A_DIRECTORY:
        raise ToolError(f"Not a directory: {path}")
    if result.exit_code != 0:
        raise ToolError(f"Cannot list {path}: {result.stderr.strip()}")
    return "\n".join(sorted(result.stdout.removesuffix("\n").split("\n"))) or "(empty)"
