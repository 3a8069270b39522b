"""`edit_file`: replace text that occurs exactly once; an ambiguous edit is refused."""

from __future__ import annotations

from agentkit_tools.errors import ToolError
from agentkit_tools.files import file_errors
from agentkit_tools.function import tool
from agentkit_tools.model_texts import DESCRIPTIONS, EDITED
from agentkit_tools.tool import ToolContext

MAX_COUNTED = 1000  # occurrences; a higher count is reported as "more than 1000"


@tool(description=DESCRIPTIONS["edit_file"])
async def edit_file(path: str, old: str, new: str, context: ToolContext) -> str:
    r"""Replace `old` by `new`, compared byte for byte, so that the rest of the file (any encoding) stays as it is.

    Where every line of the file ends in `\r\n` and `old` has no `\r\n`, a `\n` in `old` and `new` means `\r\n`.
    """
    if not old:
        raise ToolError('"old" is empty; give the text to replace')
    if old == new:
        raise ToolError('"old" and "new" are the same; nothing would change')
    async with context.lock:
        with file_errors(path):
            data = await context.environment.read_file(path)
        before, after = old.encode(), new.encode()
        if _has_only_crlf(data) and b"\r\n" not in before:
            before, after = before.replace(b"\n", b"\r\n"), after.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        count = _count(data, before)
        if count == 0:
            raise ToolError(f'"old" not found in {path}{_hint(data, before)}')
        if count > 1:
            many = f"more than {MAX_COUNTED}" if count > MAX_COUNTED else str(count)
            raise ToolError(f'"old" found {many} times in {path}; give more context')
        with file_errors(path):
            await context.environment.write_file(path, data.replace(before, after))
    return EDITED.format(path=path)


def _has_only_crlf(data: bytes) -> bool:
    r"""Return whether the file has line ends and all of them are `\r\n`."""
    return 0 < data.count(b"\n") == data.count(b"\r\n")


def _count(data: bytes, wanted: bytes) -> int:
    """Count the occurrences of `wanted`, including overlapping ones; stop at `MAX_COUNTED` + 1."""
    count, place = 0, data.find(wanted)
    while place >= 0 and count <= MAX_COUNTED:
        count += 1
        place = data.find(wanted, place + 1)
    return count


def _hint(data: bytes, wanted: bytes) -> str:
    """Return a hint for `wanted` not being found: different line ends, a missing final newline, or a non-UTF-8 file."""
    if _bare(wanted) in _bare(data):
        return r"; the line ends differ: the file uses \r\n, \n or both"
    if wanted.endswith(b"\n") and data.endswith(wanted.rstrip(b"\r\n")):
        return '; the file does not end in a newline, but "old" does'
    if not wanted.isascii() and not _is_utf8(data):
        return '; the file is not UTF-8, but "old" is'
    return ""


def _bare(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
