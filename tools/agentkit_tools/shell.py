"""`bash`: run one shell command in the environment's work directory; also the output format of all commands."""

from __future__ import annotations

from collections.abc import Sequence

from agentkit_environments import ExecResult
from agentkit_tools.errors import ToolError
from agentkit_tools.function import tool
from agentkit_tools.model_texts import DESCRIPTIONS, EXIT_CODE, NO_OUTPUT
from agentkit_tools.output import MAX_CAPTURED_BYTES
from agentkit_tools.tool import ToolContext, ToolOutput, refuse_nul

MAX_COMMAND_BYTES = 131_071  # Linux's MAX_ARG_STRLEN minus the terminating NUL
BASH_OR_SH = 'if command -v bash >/dev/null 2>&1; then exec bash -c "$1"; else exec /bin/sh -c "$1"; fi'


async def run_command(command: str | Sequence[str], context: ToolContext, *, name: str, stdin: str = "") -> ToolOutput:
    """Run a command in the environment's work directory, within the limits of `context`, and return its output. Pass it
    on while the command runs."""
    kept = context.max_output_bytes if context.spill_dir is None else MAX_CAPTURED_BYTES
    result = await context.environment.exec(
        command, stdin=stdin, timeout_s=context.timeout_s, max_output_bytes=kept, on_output=context.on_output
    )
    return command_output(result, name=name, timeout_s=context.timeout_s)


def command_output(result: ExecResult, *, name: str, timeout_s: float) -> ToolOutput:
    """Format a command's output: stdout, then stderr, then `[exit code N]` if not zero; `(no output)` if all are empty.

    Raises:
        ToolError: the command timed out; the message includes the output so far.
    """
    parts = [text for text in (result.stdout.removesuffix("\n"), result.stderr.removesuffix("\n")) if text]
    if result.timed_out:
        raise ToolError("\n".join([f"{name} timed out after {timeout_s:g} s", *parts]))
    if result.exit_code != 0:
        parts.append(EXIT_CODE.format(code=result.exit_code))
    return ToolOutput("\n".join(parts) or NO_OUTPUT, is_error=result.exit_code != 0)


def check_command(command: str) -> None:
    """Raise ToolError if a command is too long for an argument of a program, or has NUL characters."""
    if len(command.encode()) > MAX_COMMAND_BYTES:
        raise ToolError(
            f"command has {len(command.encode())} bytes, expected at most {MAX_COMMAND_BYTES}; "
            "write it to a file with write_file and run that"
        )
    refuse_nul(command=command)


@tool(description=DESCRIPTIONS["bash"])
async def bash(command: str, context: ToolContext) -> ToolOutput:
    """Run `command` in a fresh bash (sh where there is none); nothing but files survives to the next call."""
    check_command(command)
    shell = ["/bin/sh", "-c", BASH_OR_SH, "sh", command]
    return await run_command(shell, context, name="bash")
