"""The base of operations over lists, and shell and text that several of them share."""

from __future__ import annotations

from agentkit_evals.synth.artifacts.items import Item, ItemList, draw_items
from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.shell import quote
from agentkit_evals.synth.task import OperationOver

MARKS = {"plain": ".", "dash": "^- ", "star": r"^\* ", "numbered": "^[0-9]", "todo": r"^- \["}
STRIP = {"dash": "s/^- //p", "star": r"s/^\* //p", "numbered": r"s/^[0-9]*\. //p", "todo": r"s/^- \[.\] //p"}
BOXES = {"open": "[ ]", "done": "[x]"}


class ListOperation(OperationOver[ItemList]):
    """An operation over a list."""

    artifact = ItemList

    def new(self, draw: Draw, kind: str) -> ItemList:
        return draw_items(draw)


def show(made: ItemList) -> str:
    """Return a command that prints the items without marks."""
    return f"cat {quote(made.path)}" if made.format == "plain" else f"sed -n '{STRIP[made.format]}' {quote(made.path)}"


def noun(draw: Draw, made: ItemList) -> str:
    return made.noun if draw.chance(0.7) else draw.choice(("items", "entries", "things"))


def has_state(made: ItemList, kind: str) -> bool:
    """Return whether a list has boxes, and at least one of them open or done."""
    return made.format == "todo" and any(item.done == (kind == "done") for item in made.items)


def chosen(made: ItemList, kind: str) -> list[Item]:
    return [item for item in made.items if kind == "all" or item.done == (kind == "done")]
