"""`--approve`: the approval policies of the command line, and the prompt that asks the user about a call."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer

from agentkit.cli.terminal import console, visible

if TYPE_CHECKING:
    from agentkit.approval import Approve, Modify, PendingCall, Refuse

MAX_LINE_BYTES = 65_536


class ApproveChoice(StrEnum):
    """Calls that may run."""

    ALL = "all"
    ASK = "ask"
    READ_ONLY = "read-only"


ApproveFlag = Annotated[
    ApproveChoice,
    typer.Option(
        "--approve",
        help="Calls that may run: `all`; only calls of `read-only` tools; or `ask` on the terminal before every call "
        "of another tool.",
    ),
]


def approval_options(choice: ApproveChoice) -> dict[str, Any]:
    """Return the keyword arguments of `Agent` for a choice."""
    from agentkit.approval import ask_before_changes, refuse_changes

    match choice:
        case ApproveChoice.ALL:
            return {}
        case ApproveChoice.READ_ONLY:
            return {"approval": refuse_changes}
        case ApproveChoice.ASK:
            return {"approval": ask_before_changes, "on_ask": TerminalPrompt()}


class TerminalPrompt:
    """Asks the user on the terminal. Without a terminal on standard input, every call is refused."""

    def __init__(self) -> None:
        self._always: set[str] = set()

    async def __call__(self, call: PendingCall, reason: str) -> Approve | Modify | Refuse:
        """Return the user's decision on a call."""
        from agentkit.approval import Approve, Modify, Refuse
        from agentkit_tools import ToolCall

        name = call.tool.name
        if name in self._always:
            return Approve()
        if sys.stdin is None or not sys.stdin.isatty():
            return Refuse("a human has to approve this call, and standard input is not a terminal")
        terminal = console(stderr=True)
        shown = visible(f"{name} {json.dumps(dict(call.arguments), ensure_ascii=False)}")
        terminal.print(f"\n{shown}", style="bold", markup=False)
        if reason:
            terminal.print(visible(reason), markup=False)
        while True:
            _forget_typed()
            terminal.print(f"Run it? (y)es, (n)o, (a)lways {name}, a JSON object of other arguments, or ", end="")
            terminal.print("a reason to refuse: ", end="")
            line = await _read_line()
            decision = read_answer(line)
            if isinstance(decision, Modify):
                invalid = await call.tool.refusal(ToolCall(call.id, name, json.dumps(decision.arguments)))
                decision = decision if invalid is None else invalid.content
            if isinstance(decision, str):
                terminal.print(visible(decision), markup=False)
                continue
            if decision is None:
                self._always.add(name)
                return Approve()
            return decision


def read_answer(line: str) -> Approve | Modify | Refuse | str | None:
    """Return the decision in a line: None to always approve the tool, or a text about a JSON object that is not valid.

    An empty line refuses.
    """
    from agentkit.approval import Approve, Modify, Refuse
    from agentkit_tools import ToolError
    from agentkit_tools.schema import parse_object

    said = line.strip()
    match said.lower():
        case "y" | "yes":
            return Approve()
        case "a" | "always":
            return None
        case "" | "n" | "no":
            return Refuse("the user does not want this call")
    if said.startswith("{"):
        try:
            return Modify(parse_object(said, name="this call"))
        except ToolError as error:
            return str(error)
    return Refuse(f"the user does not want this call: {said}")


def _forget_typed() -> None:
    """Discard input that was typed before the question is shown, because it cannot be the answer."""
    import termios

    termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


async def _read_line() -> str:
    """Read a line from the terminal. Cancellation interrupts it."""
    fd = sys.stdin.fileno()
    await anyio.wait_readable(fd)  # a terminal is readable when a line is complete
    return os.read(fd, MAX_LINE_BYTES).decode(sys.stdin.encoding, "replace")
