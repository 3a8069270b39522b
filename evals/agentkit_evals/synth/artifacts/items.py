"""Lists: plain names, one a line, with dashes or numbers, and to-do lists with check boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from agentkit_evals.synth.draw import Draw
from agentkit_evals.synth.world import Artifact

ListFormat = Literal["plain", "dash", "star", "numbered", "todo"]


@dataclass(frozen=True, slots=True)
class Item:
    text: str
    done: bool = False


@dataclass(frozen=True, slots=True)
class ItemList(Artifact):
    """A list. `title` is its first line, or "" without one; `noun` is what its items are, in the plural."""

    format: ListFormat
    title: str
    items: tuple[Item, ...]
    noun: str
    make: Callable[[Draw], str] = field(compare=False)  # draws the text of another item

    @property
    def shape(self) -> str:
        """The format: what makes a task over this list differ from others."""
        return f"{self.format} {bool(self.title)} {self.noun}"

    def line(self, item: Item, number: int = 0) -> str:
        """Return an item as this list writes it; `number` counts from 1."""
        box = "[x]" if item.done else "[ ]"
        marks = {"plain": "", "dash": "- ", "star": "* ", "numbered": f"{number}. ", "todo": f"- {box} "}
        return marks[self.format] + item.text

    def written(self, items: Sequence[Item]) -> str:
        """Return the whole file with these items."""
        lines = [self.title, ""] if self.title else []
        lines += [self.line(item, number) for number, item in enumerate(items, 1)]
        return "".join(f"{line}\n" for line in lines)

    def another(self, draw: Draw) -> str:
        """Draw an item that the list does not have and that contains no item of it."""
        known = [item.text.lower() for item in self.items]
        for _ in range(60):
            text = self.make(draw)
            if not any(text.lower() in other or other in text.lower() for other in known):
                break
        return draw.named(text)


def _task(draw: Draw) -> str:
    return draw.choice(_TASKS).format(
        noun=draw.noun(), other=draw.noun(), first_name=draw.thing("first_name"), city=draw.thing("city")
    )


_TASKS = (
    *("Call {first_name}", "Fix the {noun}", "Buy a {noun}", "Write to {first_name}", "Clean the {noun}"),
    *("Send the {noun} to {first_name}", "Book a trip to {city}", "Update the {noun}", "Order {noun}", "Test {noun}"),
    *("Pay for the {noun}", "Ask {first_name} about the {noun}", "Review {noun} and {other}", "Plan the {noun}"),
    *("Return the {noun}", "Find a {noun} for {first_name}", "Read about {noun}", "Repair {noun}", "Cancel the {noun}"),
)

KINDS: tuple[tuple[str, Callable[[Draw], str], tuple[str, ...]], ...] = (
    ("tasks", _task, ("todo", "tasks", "todo-list", "backlog", "chores", "TODO", "plan")),
    ("items", lambda draw: draw.noun(), ("list", "items", "packing", "inventory", "things")),
    (
        "items",
        lambda draw: draw.thing(draw.choice(("fruit", "vegetable", "spice"))).lower(),
        ("shopping", "groceries", "shopping_list", "market"),
    ),
    ("names", lambda draw: draw.person(), ("guests", "names", "members", "invited", "team", "attendees")),
    ("names", lambda draw: draw.thing("first_name"), ("names", "people", "players", "kids", "volunteers")),
    ("cities", lambda draw: draw.thing("city"), ("cities", "places", "trip", "destinations", "stops")),
    ("countries", lambda draw: draw.thing("country"), ("countries", "visited", "markets")),
    ("words", lambda draw: draw.word(), ("words", "vocabulary", "keywords", "tags", "stopwords")),
    ("dishes", lambda draw: draw.thing("dish"), ("menu", "dishes", "recipes", "dinners")),
    ("addresses", Draw.email, ("emails", "mailing-list", "subscribers", "recipients")),
    ("hosts", lambda draw: draw.thing("hostname"), ("hosts", "domains", "servers", "allowlist", "blocked")),
    ("ids", Draw.code, ("ids", "codes", "tickets", "orders", "vouchers")),
    ("ideas", lambda draw: f"{draw.adjective()} {draw.noun()}", ("ideas", "wishes", "topics", "gifts", "names")),
    ("entries", lambda draw: draw.identifier(), ("entries", "features", "modules", "packages", "flags")),
)


def draw_items(draw: Draw, *, todo: bool = False) -> ItemList:
    """Draw a list of 3 to 30 different items, none of which contains another; with `todo`, one with check boxes."""
    noun, make, stems = KINDS[0] if todo or draw.chance(0.25) else draw.choice(KINDS)
    shares: dict[ListFormat, float] = {"plain": 4, "dash": 2, "star": 0.7, "numbered": 1.3}
    form: ListFormat = "todo" if todo or (noun == "tasks" and draw.chance(0.85)) else draw.weighted(shares)
    inner = Draw(str(draw.rng.random()))
    count = inner.weighted({inner.between(3, 8): 4, inner.between(9, 16): 4, inner.between(17, 30): 1})
    texts: list[str] = []
    for _ in range(4 * count):
        text = make(inner)
        if not any(text.lower() in other.lower() or other.lower() in text.lower() for other in texts):
            texts.append(text)
        if len(texts) == count:
            break
    items = tuple(Item(text, form == "todo" and inner.chance(0.4)) for text in texts)
    title = ""
    if form != "plain" and draw.chance(0.4):
        title = f"# {draw.noun().capitalize()}"
    ending = draw.choice(("txt", "txt", "md", "list") if form == "plain" else ("md", "md", "txt"))
    made = ItemList(draw.usual_path(ending, stems), "", form, title, items, noun, make)
    return ItemList(made.path, made.written(items), form, title, items, noun, make)
