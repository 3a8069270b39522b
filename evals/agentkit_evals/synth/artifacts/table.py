"""Tables as CSV, TSV, JSONL, a JSON list of objects or a Markdown table, with typed columns and everyday headers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from agentkit_evals.synth.draw import Draw, joined
from agentkit_evals.synth.world import Artifact

TableFormat = Literal["csv", "tsv", "jsonl", "json", "md"]
Kind = Literal["label", "category", "int", "decimal", "date", "text"]
Row = tuple[str, ...]
ENDINGS: dict[TableFormat, tuple[str, ...]] = {
    "csv": ("csv",),
    "tsv": ("tsv",),
    "jsonl": ("jsonl",),
    "json": ("json",),
    "md": ("md",),
}
_LABELS = 40  # values tried before a label is numbered to make it unique


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its header, the header in words (`unit price`), and the kind of its cells.

    A `label` is unique in its table; a `category` has a few values that repeat.
    """

    header: str
    spoken: str
    kind: Kind

    @property
    def number(self) -> bool:
        return self.kind in ("int", "decimal")


@dataclass(frozen=True, slots=True)
class Table(Artifact):
    """A table. `noun` is what its rows are, in the plural; `delimiter` is that of CSV and TSV."""

    format: TableFormat
    delimiter: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    noun: str

    def of(self, *kinds: Kind) -> list[Column]:
        """Return the columns of these kinds."""
        return [column for column in self.columns if column.kind in kinds]

    def cells(self, column: Column) -> list[str]:
        """Return a column's cells as text, from top to bottom."""
        at = self.columns.index(column)
        return [row[at] for row in self.rows]

    @property
    def label(self) -> Column:
        return next(column for column in self.columns if column.kind == "label")

    @property
    def shape(self) -> str:
        """The format, headers and kinds: what makes a task over this table differ from others."""
        return " ".join([self.format, self.delimiter, *(f"{column.header}:{column.kind}" for column in self.columns)])

    def records(self, rows: Sequence[Row] | None = None) -> list[dict[str, str]]:
        """Return rows (all of them by default) as mappings from header to cell."""
        headers = [column.header for column in self.columns]
        return [dict(zip(headers, row, strict=True)) for row in (self.rows if rows is None else rows)]


def write(form: TableFormat, delimiter: str, columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return a table as text."""
    headers = [column.header for column in columns]
    if form in ("csv", "tsv"):
        out = io.StringIO()
        csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows([headers, *rows])
        return out.getvalue()
    if form == "md":
        return "".join(f"| {' | '.join(row)} |\n" for row in (headers, ["---"] * len(headers), *rows))
    objects = [to_object(columns, row) for row in rows]
    if form == "jsonl":
        return "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in objects)
    return json.dumps(objects, indent=2, ensure_ascii=False) + "\n"


def to_object(columns: Sequence[Column], row: Row) -> dict[str, str | int | float]:
    """Return a row as a JSON object; its numbers are numbers."""
    return {
        column.header: int(cell) if column.kind == "int" else float(cell) if column.kind == "decimal" else cell
        for column, cell in zip(columns, row, strict=True)
    }


def draw_table(draw: Draw, *, priced: bool = False) -> Table:
    """Draw a table of 3 to 40 rows (in one of fifteen, 80 to 200) and 2 to 7 columns.

    With `priced`, it has a price and a quantity.
    """
    theme = draw.choice([theme for theme in THEMES if theme.nouns[0] in ("products", "orders")] if priced else THEMES)
    shares: dict[TableFormat, float] = {"csv": 5, "tsv": 1, "jsonl": 2, "json": 1.5, "md": 1}
    form = draw.weighted(shares)
    delimiter = {"tsv": "\t", "csv": ";" if draw.chance(0.08) else ","}.get(form, "")
    count = draw.weighted(
        {draw.between(3, 8): 4, draw.between(9, 20): 4, draw.between(21, 40): 1.5, draw.between(80, 200): 0.6}
    )
    # The cells are drawn apart: a request names few of them, so only those become names of the task.
    inner = Draw(str(draw.rng.random()))
    specs = [theme.label, *inner.some(theme.others, min(len(theme.others), inner.weighted(_WIDTHS)))]
    if priced:
        specs = [*specs[:2], *(spec for spec in (_PRICE, _QUANTITY) if spec not in specs[:2])]
    if inner.chance(0.25):
        inner.rng.shuffle(specs)
    style = _header_style(draw)
    columns: list[Column] = []
    cells: list[list[str]] = []
    for spec in specs:
        spoken = draw.choice(spec.spoken)
        if spoken == OWN:
            spoken = " ".join(draw.noun() for _ in range(draw.between(1, 2)))
        header = style(spoken)
        if header in [column.header for column in columns]:
            continue
        columns.append(Column(header, spoken, spec.kind))
        cells.append(_cells(inner, spec, count))
    if form == "json" and count > 60:
        form = "jsonl"
    if form == "md" and count > 40:
        form, delimiter = "csv", ","
    rows = tuple(zip(*cells, strict=True))
    path = draw.usual_path(draw.choice(ENDINGS[form]), theme.stems)
    return Table(
        path, write(form, delimiter, columns, rows), form, delimiter, tuple(columns), rows, draw.choice(theme.nouns)
    )


def reference_table(draw: Draw, key: Column, values: Sequence[str]) -> Table:
    """Draw a table with one row for each value of another table's column."""
    theme = draw.choice(THEMES[:-1])
    form: TableFormat = draw.weighted({"csv": 5, "jsonl": 2, "json": 1.5, "tsv": 1})
    inner = Draw(str(draw.rng.random()))
    labels = list(dict.fromkeys(values))
    inner.rng.shuffle(labels)
    others = [spec for spec in theme.others if key.spoken not in spec.spoken]
    columns, cells = [Column(key.header, key.spoken, "label")], [labels]
    for spec in inner.some(others, inner.between(1, 3)):
        columns.append(Column(joined(spec.spoken[0].split(), "snake"), spec.spoken[0], spec.kind))
        cells.append(_cells(inner, spec, len(labels)))
    delimiter = {"tsv": "\t", "csv": ","}.get(form, "")
    rows = tuple(zip(*cells, strict=True))
    path = draw.path(ENDINGS[form][0])
    if draw.chance(0.4):
        folder, slash, _ = path.rpartition("/")
        stem = key.spoken.replace(" ", "_") + draw.choice(("", "_info", "-list", "_data"))
        path = draw.named(f"{folder}{slash}{stem}.{ENDINGS[form][0]}")
    return Table(path, write(form, delimiter, columns, rows), form, delimiter, tuple(columns), rows, key.spoken)


def new_cell(draw: Draw, table: Table, column: Column) -> str:
    """Draw a cell like those of a column; a new one, but for a category."""
    known = table.cells(column)
    if column.kind == "label":
        cell = next((made for made in (_like(draw, known[0]) for _ in range(_LABELS)) if made not in known), "")
        cell = cell or f"{known[0]} {len(known) + 1}"
    elif column.kind == "int":
        cell = str(draw.between(1, max(int(text) for text in known) + 5))
    elif column.kind == "decimal":
        cell = _decimal_text(draw, int(max(map(float, known))) + 5, len(known[0].partition(".")[2]))
    elif column.kind == "date":
        cell = draw.date().isoformat()
    else:
        cell = draw.choice(known)
    return draw.named(cell)


def new_row(draw: Draw, table: Table) -> Row:
    """Draw a row with a new label, and cells like those of the table."""
    return tuple(new_cell(draw, table, column) for column in table.columns)


def _like(draw: Draw, label: str) -> str:
    if any(letter.isdigit() for letter in label):
        return "".join(str(draw.between(0, 9)) if letter.isdigit() and letter.isascii() else letter for letter in label)
    if "." in label:
        return draw.thing("hostname")
    if " " in label:
        return draw.person() if label.istitle() else f"{draw.adjective()} {draw.noun()}"
    return draw.thing("city") if label[:1].isupper() else draw.noun()


# --- themes ---


@dataclass(frozen=True, slots=True)
class Spec:
    """A column that a theme may have: its names in words, its kind, and the draw of one cell."""

    spoken: tuple[str, ...]
    kind: Kind
    cell: Callable[[Draw], str]
    values: int = 0  # most values that a category has; 0: each cell is drawn anew


@dataclass(frozen=True, slots=True)
class Theme:
    """A kind of table: what its rows are called, names of its file, the label and the other columns."""

    nouns: tuple[str, ...]
    stems: tuple[str, ...]
    label: Spec
    others: tuple[Spec, ...]


OWN = ""  # a column named by nouns that the table draws
_WIDTHS = {1: 1, 2: 3, 3: 4, 4: 3, 5: 1.5, 6: 0.5}


def _int(*spoken: str, top: int, low: int = 1) -> Spec:
    return Spec(spoken, "int", lambda draw: str(draw.between(low, top)))


def _decimal(*spoken: str, top: int, digits: int = 2) -> Spec:
    return Spec(spoken, "decimal", lambda draw: _decimal_text(draw, top, digits))


def _decimal_text(draw: Draw, top: int, digits: int) -> str:
    return f"{draw.between(1, top)}.{draw.between(0, 10**digits - 1):0{digits}}"


def _one_of(*spoken: str, options: str) -> Spec:
    choices = options.split("|")
    return Spec(spoken, "category", lambda draw: draw.choice(choices), 6)


def _pool(*spoken: str, name: str, values: int = 5) -> Spec:
    return Spec(spoken, "category", lambda draw: draw.thing(name), values)


def _text(*spoken: str, name: str) -> Spec:
    return Spec(spoken, "text", lambda draw: draw.thing(name))


def _product(draw: Draw) -> str:
    kind = draw.rng.random()
    if kind < 0.4:
        return draw.noun()
    if kind < 0.6:
        return f"{draw.adjective()} {draw.noun()}"
    return draw.thing(draw.choice(("fruit", "vegetable", "dish", "drink", "spice")))


def _title(draw: Draw) -> str:
    return draw.choice(("The {b}", "{a} {b}", "{b} of {c}", "The {a} {b}", "A {b} in {d}")).format(
        a=draw.adjective().title(), b=draw.noun().title(), c=draw.noun().title(), d=draw.thing("city")
    )


def _phone(draw: Draw) -> str:
    return f"{draw.choice(('+1', '+44', '+49', '555', '0'))}-{draw.between(100, 999)}-{draw.between(1000, 9999)}"


def _ip(draw: Draw) -> str:
    return f"{draw.choice(('10.0', '192.168'))}.{draw.between(0, 40)}.{draw.between(1, 254)}"


_DATE = Spec(("date", "day", "created", "due date"), "date", lambda draw: draw.date().isoformat())
_CITY = _pool("city", "town", "location", name="city")
_COUNTRY = _pool("country", name="country")
_EMAIL = Spec(("email", "e-mail", "mail"), "text", Draw.email)
_STATUS = _one_of("status", "state", options="open|closed|pending|paid|cancelled|shipped|done|active|new|failed")
_CODE = Spec(("id", "code", "reference", "number"), "text", Draw.code)
_QUANTITY = _int("quantity", "qty", "count", "units", "pieces", top=60)
_PRICE = _decimal("price", "unit price", "cost", top=300)
_AMOUNT = _decimal("amount", "total", "sum", "value", top=900)
_NOTE = _text("note", "comment", name="occupation")
_RATING = _decimal("rating", "score", "grade", top=9, digits=1)
_TEAM = Spec(("team", "group", "class"), "category", Draw.noun, 4)
_DEPARTMENT = _one_of("department", "dept", options="Sales|Marketing|Finance|Support|Legal|IT|HR|Research|Design")
_PRIORITY = _one_of("priority", "severity", options="low|medium|high|urgent")
_PAYMENT = _one_of("payment", "method", options="cash|card|transfer|invoice|voucher")

THEMES: tuple[Theme, ...] = (
    Theme(
        ("people", "contacts", "customers", "members", "guests"),
        ("contacts", "customers", "members", "guests", "people", "clients", "address-book", "subscribers"),
        Spec(("name", "full name", "contact", "customer"), "label", Draw.person),
        (
            *(_CITY, _COUNTRY, _EMAIL, _STATUS, _text("company", name="company"), _int("age", top=88, low=18)),
            *(Spec(("phone", "telephone", "mobile"), "text", _phone), _text("street", "address", name="street")),
            *(Spec(("birthday", "joined", "since"), "date", _DATE.cell), _pool("language", name="language")),
        ),
    ),
    Theme(
        ("employees", "colleagues", "staff members", "workers"),
        ("employees", "staff", "team", "salaries", "payroll", "hr_export"),
        Spec(("name", "employee", "worker"), "label", Draw.person),
        (
            *(
                _DEPARTMENT,
                _CITY,
                _TEAM,
                _EMAIL,
                _int("salary", "pay", top=98000, low=24000),
                _text("role", "job", name="occupation"),
            ),
            *(
                _int("age", top=67, low=18),
                _decimal("hours", "overtime", top=44, digits=1),
                _int("vacation days", "days off", top=30),
            ),
            *(
                Spec(("start date", "hired", "hire date"), "date", _DATE.cell),
                _int("desk", "room", "extension", top=900),
            ),
        ),
    ),
    Theme(
        ("students", "participants", "players", "runners", "applicants"),
        ("students", "grades", "scores", "results", "ranking", "participants", "league"),
        Spec(("name", "student", "player", "participant"), "label", Draw.person),
        (
            *(_int("points", "score", "goals", top=120), _TEAM, _RATING, _int("age", top=60, low=7), _COUNTRY, _CITY),
            *(
                _one_of("level", "rank", options="beginner|intermediate|advanced|expert"),
                _int("games", "attempts", top=30),
            ),
            *(_one_of("passed", "present", options="yes|no"), _DATE),
        ),
    ),
    Theme(
        ("products", "items", "articles", "goods"),
        ("products", "inventory", "stock", "catalog", "price-list", "warehouse", "items", "menu"),
        Spec(("product", "item", "name", "article"), "label", _product),
        (
            *(
                _PRICE,
                _int("stock", "quantity", "in stock", "available", top=400),
                _pool("color", "colour", name="color"),
            ),
            *(
                _text("supplier", "brand", "vendor", name="company"),
                Spec(("sku", "code", "article no"), "text", Draw.code),
            ),
            *(
                _decimal("weight", "weight kg", top=40, digits=1),
                _RATING,
                Spec(("category", "type"), "category", Draw.noun, 4),
            ),
            *(
                _one_of("size", options="S|M|L|XL"),
                _int("shelf", "aisle", "bin", top=40),
                _one_of("available", options="yes|no"),
            ),
        ),
    ),
    Theme(
        ("orders", "invoices", "sales", "purchases", "deliveries"),
        ("orders", "invoices", "sales", "purchases", "deliveries", "shop_export", "bookings"),
        Spec(("order", "order id", "id", "invoice", "number"), "label", Draw.code),
        (
            *(_AMOUNT, _QUANTITY, _STATUS, _DATE, _CITY, _PAYMENT, _PRICE, _COUNTRY),
            Spec(("customer", "buyer", "client"), "category", Draw.person, 6),
            Spec(("product", "item"), "category", _product, 6),
        ),
    ),
    Theme(
        ("expenses", "payments", "transactions", "entries", "bookings"),
        ("expenses", "budget", "costs", "payments", "transactions", "travel-costs", "spending"),
        Spec(("description", "item", "what", "purpose"), "label", lambda draw: f"{draw.noun()} {draw.noun()}"),
        (
            *(
                _AMOUNT,
                _DATE,
                _PAYMENT,
                _one_of("category", "type", options="food|travel|rent|office|fun|health|books|gifts"),
            ),
            *(Spec(("paid by", "person", "owner"), "category", lambda draw: draw.thing("first_name"), 4), _NOTE),
            *(_pool("currency", name="currency", values=3), _one_of("approved", "reimbursed", options="yes|no")),
        ),
    ),
    Theme(
        ("readings", "measurements", "stations", "sensors"),
        ("readings", "measurements", "sensors", "weather", "temperatures", "stations"),
        Spec(("sensor", "station", "device"), "label", lambda draw: f"{draw.noun()}-{draw.between(1, 99)}"),
        (
            *(_decimal("temperature", "temp", top=38, digits=1), _int("humidity", "moisture", top=100), _DATE),
            *(
                _decimal("pressure", "voltage", "wind", top=99, digits=1),
                _one_of("status", options="ok|low|fault|offline"),
            ),
            *(_CITY, Spec(("time", "at"), "text", Draw.clock), _int("battery", top=100)),
        ),
    ),
    Theme(
        ("books", "films", "songs", "titles", "albums"),
        ("books", "library", "films", "movies", "reading-list", "playlist", "collection"),
        Spec(("title", "book", "film", "name"), "label", _title),
        (
            *(
                Spec(("author", "director", "artist"), "category", Draw.person, 6),
                _int("year", top=2025, low=1950),
                _RATING,
            ),
            *(_int("pages", "length", "minutes", top=700, low=40), _pool("language", name="language", values=4)),
            *(_one_of("genre", options="drama|comedy|crime|history|poetry|science|travel|fantasy"), _PRICE),
            *(_one_of("read", "seen", "lent", options="yes|no"), _int("shelf", "copies", top=20)),
        ),
    ),
    Theme(
        ("servers", "hosts", "machines", "services"),
        ("servers", "hosts", "machines", "services", "infra", "fleet"),
        Spec(("host", "hostname", "server", "name"), "label", lambda draw: draw.thing("hostname")),
        (
            *(
                _int("cpu", "cores", "load", top=64),
                _int("memory", "ram", "disk", top=512),
                _pool("os", "system", name="os"),
            ),
            *(Spec(("ip", "address"), "text", _ip), _one_of("status", "state", options="up|down|degraded|maintenance")),
            *(
                _one_of("region", "zone", options="eu-west|eu-north|us-east|us-west|asia"),
                _int("port", top=9999, low=80),
            ),
            *(
                Spec(("version", "release"), "category", Draw.version, 4),
                Spec(("owner", "admin"), "category", lambda draw: draw.thing("first_name"), 4),
            ),
        ),
    ),
    Theme(
        ("tickets", "issues", "bugs", "tasks", "requests"),
        ("tickets", "issues", "bugs", "backlog", "tasks", "support"),
        Spec(
            ("id", "ticket", "key", "issue"), "label", lambda draw: f"{draw.noun()[:4].upper()}-{draw.between(1, 9999)}"
        ),
        (
            *(
                _PRIORITY,
                _STATUS,
                _DATE,
                Spec(("assignee", "owner", "reporter"), "category", lambda draw: draw.thing("first_name"), 5),
            ),
            *(
                _int("votes", "comments", "points", "hours", top=40),
                Spec(("component", "area", "module"), "category", Draw.noun, 5),
            ),
            *(
                Spec(("version", "fixed in"), "category", Draw.version, 4),
                Spec(("title", "summary"), "text", lambda draw: f"{draw.noun()} {draw.noun()} {draw.adjective()}"),
            ),
        ),
    ),
    Theme(
        ("events", "meetings", "courses", "workshops", "concerts", "trips"),
        ("events", "meetings", "courses", "workshops", "schedule", "program", "trips"),
        Spec(("event", "title", "course", "name"), "label", lambda draw: f"{draw.adjective()} {draw.noun()}"),
        (
            *(
                _DATE,
                _CITY,
                _int("attendees", "seats", "guests", "participants", top=300),
                _PRICE,
                _int("minutes", "duration", top=240, low=10),
            ),
            *(
                Spec(("room", "venue"), "category", lambda draw: f"Room {draw.between(1, 30)}", 4),
                Spec(("speaker", "host", "teacher"), "category", Draw.person, 5),
            ),
            *(_pool("day", "weekday", name="weekday"), Spec(("start", "time"), "text", Draw.clock), _STATUS),
        ),
    ),
    Theme(
        ("cities", "places", "destinations", "branches", "stores", "offices"),
        ("cities", "places", "branches", "stores", "offices", "destinations"),
        Spec(("city", "place", "town", "branch"), "label", lambda draw: draw.thing("city")),
        (
            *(
                _int("population", "visitors", "inhabitants", top=900000, low=900),
                _COUNTRY,
                _pool("state", "region", name="state"),
            ),
            *(_int("employees", "rooms", "hotels", top=200), _decimal("distance", "distance km", top=900, digits=1)),
            *(_decimal("rent", "revenue", top=9000), _int("opened", "founded", top=2025, low=1900), _RATING),
            *(Spec(("manager", "mayor"), "text", Draw.person), _one_of("open", "visited", options="yes|no")),
        ),
    ),
    Theme(
        ("rows", "records", "entries", "lines"),
        (),
        Spec(
            ("name", "key", "id", OWN, OWN),
            "label",
            lambda draw: draw.identifier(draw.choice(("snake", "kebab", "camel"))),
        ),
        (
            *(
                _int(OWN, top=999),
                _decimal(OWN, top=99),
                Spec((OWN,), "category", Draw.noun, 5),
                _DATE,
                Spec((OWN,), "text", Draw.value),
            ),
            *(_int(OWN, top=50), Spec((OWN,), "category", Draw.adjective, 4), Spec((OWN,), "text", Draw.code)),
        ),
    ),
)


def _header_style(draw: Draw) -> Callable[[str], str]:
    styles: Mapping[Callable[[str], str], float] = {
        lambda words: joined(words.split(), "snake"): 6,
        lambda words: words[:1].upper() + words[1:]: 1.2,
        lambda words: words.title(): 1,
        lambda words: joined(words.split(), "camel"): 0.7,
        lambda words: joined(words.split(), "upper"): 0.4,
        lambda words: words: 0.4,
    }
    return draw.weighted(dict(styles))


def _cells(draw: Draw, spec: Spec, count: int) -> list[str]:
    if spec.values:
        values = list(dict.fromkeys(spec.cell(draw) for _ in range(draw.between(2, spec.values))))
        return [draw.choice(values) for _ in range(count)]
    cells: list[str] = []
    seen: set[str] = set()
    for index in range(count):
        cell = spec.cell(draw)
        if spec.kind == "label":
            for _ in range(_LABELS):
                if cell not in seen:
                    break
                cell = spec.cell(draw)
            else:
                cell = f"{cell} {index}"
        seen.add(cell)
        cells.append(cell)
    return cells
