"""Parameters of generated functions: a schema, a value, and the words with which a request states the value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentkit_evals.synth.draw import Draw

_NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a function, and what one request says about it.

    Attributes:
        name: Its name in the schema.
        schema: Its JSON schema, with description.
        argument: The value that the request gives.
        phrase: Words that follow the main clause, such as `in Oslo` or `with a radius of 3 meters`.
        shown: The value as the request writes it.
        sentence: The same as a sentence of its own; "" if there is none.
        default: What the function uses if the argument is missing, for optional parameters.
    """

    name: str
    schema: dict[str, Any]
    argument: Any
    phrase: str
    shown: str
    sentence: str = ""
    default: Any = None

    @property
    def named(self) -> str:
        """The phrase with the parameter's name, for requests where the value alone could be another parameter's."""
        words = spoken(self.name)
        return self.phrase if words in self.phrase else f"with the {words} {self.shown}"


@dataclass(frozen=True, slots=True)
class Category:
    """A kind of value with a pool of words: names of its parameters, and phrases with `{v}` and, as words, `{n}`."""

    names: tuple[str, ...]
    value: Callable[[Draw], str]
    phrases: tuple[str, ...]
    sentences: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    """Sentences that a description may add."""


def _from(*pools: str) -> Callable[[Draw], str]:
    return lambda draw: draw.thing(draw.choice(pools))


def _date(draw: Draw) -> str:
    return draw.named(draw.date().isoformat())


PLACE_PHRASES = ("in {v}", "for {v}", "in {v}", "at {v}", "near {v}", "with {v} as the {n}")
CATEGORIES: tuple[Category, ...] = (
    Category(
        ("city", "location", "town", "place", "city_name", "destination", "venue", "region"),
        _from("city"),
        PLACE_PHRASES,
        ("I am in {v}.", "It is about {v}.", "We are going to {v}.", "My {n} is {v}."),
        ("For example Boston.", "Name of the {n}, such as Denver."),
    ),
    Category(
        ("location", "city", "place"),
        lambda draw: draw.named(f"{draw.thing('city')}, {draw.thing('state')}"),
        ("in {v}", "for {v}", "near {v}"),
        ("I live in {v}.",),
        ("City and state, such as Boston, Massachusetts.", "In the form City, State."),
    ),
    Category(
        ("country", "nation", "country_name", "market"),
        _from("country"),
        ("in {v}", "for {v}", "of {v}", "from {v}"),
        ("I want it for {v}.",),
    ),
    Category(("state", "province"), _from("state"), ("in {v}", "for {v}", "for the state of {v}")),
    Category(("street", "address", "street_name"), _from("street"), ("in {v} Street", "on {v}", "at {v}")),
    Category(
        ("origin", "from_city", "start", "source", "departure_city", "start_location"),
        _from("city"),
        ("from {v}", "starting in {v}", "leaving from {v}", "departing from {v}"),
        ("I start in {v}.",),
    ),
    Category(
        ("destination", "to_city", "target", "end", "arrival_city", "end_location"),
        _from("city"),
        ("to {v}", "arriving in {v}", "ending in {v}"),
        ("I have to be in {v}.",),
    ),
    Category(
        (
            *("name", "person", "customer", "user", "employee", "patient", "author", "student", "owner", "guest"),
            *("full_name", "client", "member", "contact", "recipient", "player", "artist", "actor", "teacher"),
        ),
        Draw.person,
        ("for {v}", "of {v}", "by {v}", "for the {n} {v}", "with {v}", "whose {n} is {v}"),
        ("My name is {v}.", "The {n} is {v}.", "It is for {v}."),
    ),
    Category(
        ("first_name", "name", "user", "friend", "owner", "child"),
        _from("first_name"),
        ("for {v}", "of {v}", "by {v}", "named {v}", "called {v}", "with {v}"),
        ("I am {v}.", "This is for {v}."),
    ),
    Category(
        ("company", "company_name", "brand", "vendor", "supplier", "organization", "employer", "manufacturer"),
        _from("company"),
        ("of {v}", "for {v}", "from {v}", "at {v}", "for the company {v}", "by {v}"),
        ("I work for {v}.",),
    ),
    Category(("bank", "bank_name", "institution"), _from("bank"), ("at {v}", "with {v}", "from {v}")),
    Category(
        ("symbol", "ticker", "stock", "stock_symbol"), _from("ticker"), ("of {v}", "for {v}", "for the stock {v}")
    ),
    Category(
        ("currency", "currency_code", "base_currency"),
        _from("currency"),
        ("in {v}", "in the currency {v}", "as {v}"),
        hints=("Three-letter code, such as USD.",),
    ),
    Category(("language", "target_language", "lang"), _from("language"), ("in {v}", "into {v}", "to {v}")),
    Category(("nationality", "cuisine", "style"), _from("nationality"), ("for {v}", "with the {n} {v}", "{v} style")),
    Category(
        ("occupation", "job", "job_title", "profession", "role", "position"),
        _from("occupation"),
        ("for {v}", "as {v}", "for the {n} {v}", "working as {v}"),
        ("I am looking for a {v}.",),
    ),
    Category(
        ("dish", "food", "meal", "recipe", "item", "food_item"),
        _from("dish", "fruit", "vegetable"),
        ("for {v}", "of {v}", "with {v}", "to make {v}"),
        ("I want to eat {v}.",),
    ),
    Category(("drink", "beverage", "cocktail"), _from("drink"), ("for {v}", "with {v}", "of {v}")),
    Category(
        ("ingredient", "fruit", "vegetable", "spice", "product"),
        _from("fruit", "vegetable", "spice"),
        ("with {v}", "of {v}", "for {v}", "containing {v}"),
    ),
    Category(("color", "colour", "background_color"), _from("color"), ("in {v}", "with the {n} {v}", "colored {v}")),
    Category(
        ("car", "model", "vehicle", "car_model"),
        _from("car"),
        ("of the {v}", "for a {v}", "with a {v}"),
        ("I own a {v}.",),
    ),
    Category(("aircraft", "airplane"), _from("airplane"), ("of the {v}", "for the {v}")),
    Category(("device", "phone", "device_model"), _from("phone"), ("for the {v}", "of my {v}", "on the {v}")),
    Category(("operating_system", "os", "platform"), _from("os"), ("on {v}", "for {v}", "running {v}")),
    Category(
        ("programming_language", "language"), _from("programming_language"), ("in {v}", "for {v}", "written in {v}")
    ),
    Category(
        ("domain", "host", "website", "site", "server"), _from("hostname"), ("of {v}", "for {v}", "on {v}", "at {v}")
    ),
    Category(
        ("email", "email_address", "to", "recipient"),
        Draw.email,
        ("to {v}", "for {v}", "with the email {v}", "at {v}"),
        ("My email is {v}.",),
    ),
    Category(
        ("username", "user", "account", "login", "handle"),
        _from("username"),
        ("for {v}", "of {v}", "as {v}", "of the user {v}"),
    ),
    Category(
        ("day", "weekday", "day_of_week"), _from("weekday"), ("on {v}", "for {v}", "next {v}"), ("I have time on {v}.",)
    ),
    Category(("month", "month_name"), _from("month"), ("in {v}", "for {v}", "during {v}")),
    Category(
        ("date", "start_date", "end_date", "due_date", "day", "check_in", "birthday", "deadline", "departure_date"),
        _date,
        ("on {v}", "for {v}", "with the {n} {v}", "dated {v}", "for the {n} {v}"),
        ("The {n} is {v}.",),
        ("In the format YYYY-MM-DD.", "ISO date."),
    ),
    Category(
        ("time", "start_time", "alarm_time", "end_time", "hour"),
        Draw.clock,
        ("at {v}", "for {v}", "with the {n} {v}"),
        ("The {n} is {v}.",),
        ("In the format HH:MM.", "24-hour clock."),
    ),
    Category(
        (
            "order_id",
            "id",
            "invoice",
            "ticket",
            "reference",
            "case_number",
            "tracking_number",
            "booking_id",
            "sku",
            "code",
        ),
        Draw.code,
        ("for {v}", "with {n} {v}", "of {v}", "{v}", "number {v}", "with the {n} {v}"),
        ("The {n} is {v}.", "My {n} is {v}."),
    ),
    Category(
        ("version", "release", "tag"), Draw.version, ("version {v}", "for version {v}", "at {v}", "with the {n} {v}")
    ),
    Category(
        ("file", "path", "filename", "file_name", "document"),
        lambda draw: draw.path(draw.choice(("txt", "csv", "pdf", "json", "md", "png", "log", "py"))),
        ("from {v}", "in {v}", "for {v}", "with the file {v}", "of {v}"),
    ),
    Category(
        ("key", "setting", "variable", "field", "attribute", "column"),
        Draw.identifier,
        ("for {v}", "of {v}", "named {v}"),
    ),
)

UNITS: dict[str, tuple[str, ...]] = {
    "radius height width length depth distance diameter base side": ("meters", "cm", "feet", "km", "units", "inches"),
    "weight mass load": ("kg", "grams", "pounds", "tons"),
    "speed velocity initial_velocity final_velocity": ("m/s", "km/h", "mph"),
    "temperature": ("degrees", "degrees Celsius", "K"),
    "price amount budget cost salary income principal balance fee payment": ("dollars", "euros", "USD", "$"),
    "duration time wait delay": ("seconds", "minutes", "hours", "days"),
    "years term age": ("years",),
    "months": ("months",),
    "days nights": ("days", "nights"),
    "interest_rate rate discount tax_rate percentage growth_rate": ("%", "percent"),
    "volume capacity": ("liters", "ml", "cubic meters"),
    "area surface": ("square meters", "acres"),
    "voltage": ("volts",),
    "current": ("amperes",),
    "power energy force pressure": ("watts", "joules", "newtons", "pascals"),
    "angle rotation": ("degrees",),
}
MEASURES = [(name, units) for names, units in UNITS.items() for name in names.split()]
COUNTED = (
    "guests",
    "people",
    "rooms",
    "pages",
    "items",
    "tickets",
    "seats",
    "results",
    "copies",
    "players",
    "questions",
    "steps",
)


@dataclass(slots=True)
class Parameters:
    """Draws parameters of one function; their names and values differ."""

    draw: Draw
    used: set[str] = field(default_factory=set)

    def next(self) -> Parameter:
        """Draw the next parameter."""
        kinds: dict[Callable[[], Parameter | None], float] = {
            self._category: 5, self._measure: 2.5, self._number: 2, self._count: 1, self._word: 1.5,
            self._enum: 1.3, self._flag: 0.8, self._list: 1, self._text: 0.6, self._object: 0.3,
        }  # fmt: skip
        while (found := self.draw.weighted(kinds)()) is None or found.name in self.used:
            pass
        self.used.add(found.name)
        return found

    def _category(self) -> Parameter | None:
        draw = self.draw
        category = draw.choice(CATEGORIES)
        name = draw.choice(category.names)
        value = category.value(draw)
        shown = value if draw.chance(0.85) else f'"{value}"'
        sentence = draw.choice(category.sentences) if category.sentences else ""
        words = spoken(name)
        description = self._described(words, category.hints)
        return Parameter(
            name,
            {"type": "string", **description},
            value,
            draw.choice(category.phrases).format(v=shown, n=words),
            shown,
            sentence.format(v=value, n=words),
        )

    def _measure(self) -> Parameter:
        draw = self.draw
        name, units = draw.choice(MEASURES)
        unit = draw.choice(units)
        value, text = self._figure(decimals=draw.chance(0.3))
        integer = isinstance(value, int)
        amount = (
            f"${text}"
            if unit == "$"
            else f"{text}%"
            if unit == "%"
            else f"{text} {unit}"
            if draw.chance(0.85)
            else text
        )
        words = spoken(name)
        phrase = draw.choice(
            ("with a {n} of {v}", "of {n} {v}", "with {n} {v}", "and a {n} of {v}", "{n} {v}", "for a {n} of {v}",
             "given a {n} of {v}", "with {v} {n}", "where the {n} is {v}", "at a {n} of {v}")
        )  # fmt: skip
        sentence = draw.choice(("The {n} is {v}.", "It has a {n} of {v}.", "Take a {n} of {v}."))
        kind = "integer" if integer and draw.chance(0.6) else "number"
        hint = (f"In {unit}.",) if unit not in ("$", "%", "percent", "units") else ()
        return Parameter(
            name, {"type": kind, **self._described(words, hint)}, value,
            phrase.format(n=words, v=amount), amount, sentence.format(n=words, v=amount),
        )  # fmt: skip

    def _number(self) -> Parameter:
        draw = self.draw
        name = draw.identifier(draw.choice(("snake", "snake", "camel")), parts=draw.choice((1, 1, 2)))
        if draw.chance(0.2):
            name = draw.choice(tuple("abcnkxym"))
        value, text = self._figure(decimals=draw.chance(0.2))
        words = spoken(name)
        phrase = draw.choice(
            ("with {n} {v}", "with {n} = {v}", "where {n} is {v}", "for {n} {v}", "with a {n} of {v}", "{n} {v}",
             "of {v}",              "and {n} {v}", "with {n} set to {v}", "using {v} as {n}", "with {v} as the {n}")
        )  # fmt: skip
        kind = "integer" if isinstance(value, int) and draw.chance(0.7) else "number"
        return Parameter(
            name, {"type": kind, **self._described(words)}, value,
            phrase.format(n=words, v=text), text, f"{words.capitalize()} is {text}.",
        )  # fmt: skip

    def _count(self) -> Parameter:
        draw = self.draw
        noun = draw.choice(COUNTED) if draw.chance(0.5) else f"{draw.noun()}s"
        name = draw.choice(
            (f"num_{noun}", f"number_of_{noun}", noun, f"{noun}_count", "count", "limit", "quantity", "n")
        )
        number = draw.between(1, 12) if draw.chance(0.7) else draw.between(13, 500)
        text = _NUMBER_WORDS[number] if number < 13 and draw.chance(0.25) else draw.named(str(number))
        phrase = draw.choice(("for {v} {n}", "with {v} {n}", "{v} {n}", "and {v} {n}", "up to {v} {n}"))
        return Parameter(
            name, {"type": "integer", **self._described(f"number of {noun}")}, number,
            phrase.format(v=text, n=noun), text, f"There are {text} {noun}.",
        )  # fmt: skip

    def _word(self) -> Parameter:
        draw = self.draw
        name = draw.identifier(draw.choice(("snake", "snake", "snake", "camel")), parts=draw.choice((1, 1, 2)))
        value = draw.weighted({"word": 4, "value": 2, "two": 2, "invented": 0.7})
        drawn = {"word": draw.word, "value": draw.value, "invented": draw.invented}.get(value)
        value = drawn() if drawn else draw.identifier("space", parts=2)
        words = spoken(name)
        shown = draw.weighted({value: 6, f'"{value}"': 2, f"'{value}'": 1, f"`{value}`": 1})
        phrase = draw.choice(
            ("with {n} {v}", "for the {n} {v}", "of {v}", "for {v}", "whose {n} is {v}", "where {n} is {v}",
             "with {v} as the {n}", "using the {n} {v}", "with the {n} {v}", "and {n} {v}")
        )  # fmt: skip
        return Parameter(
            name, {"type": "string", **self._described(words)}, value,
            phrase.format(n=words, v=shown), shown, f"The {words} is {shown}.",
        )  # fmt: skip

    def _enum(self) -> Parameter:
        draw = self.draw
        options = draw.choice(ENUMS) if draw.chance(0.5) else tuple({draw.word() for _ in range(draw.between(2, 5))})
        name = draw.choice(
            ("unit", "mode", "type", "format", "kind", "level", "order", "status", "size", "method", "category")
        )
        if draw.chance(0.4):
            name = draw.identifier("snake", parts=1)
        value = draw.choice(sorted(options))
        draw.names.update(options)
        words = spoken(name)
        phrase = draw.choice(
            ("in {v}", "with {n} {v}", "as {v}", "in {v} {n}", "using {v}", "with the {n} {v}", "({v})", "for {v}")
        )
        schema: dict[str, Any] = {"type": "string", **self._described(words)}
        if draw.chance(0.75):
            schema["enum"] = sorted(options) if draw.chance(0.5) else draw.some(sorted(options), len(options))
        else:
            schema["description"] = f"The {words}: {', '.join(sorted(options))}."
        return Parameter(
            name,
            schema,
            value,
            phrase.format(n=words, v=value),
            value,
            f"Use the {words} {value}.",
            default=sorted(options)[0],
        )

    def _flag(self) -> Parameter:
        draw = self.draw
        noun = draw.identifier("snake", parts=draw.choice((1, 1, 2)))
        words = spoken(noun)
        start, verb = draw.choice(
            (("include", "include"), ("with", "add"), ("show", "show"), ("use", "use"), ("is", "be"))
        )
        value = draw.chance(0.6)
        if start == "is":
            adjective = draw.adjective()
            name, words = f"is_{adjective}", adjective
            phrase = "that is {n}" if value else "that is not {n}"
        else:
            name = draw.choice((f"{start}_{noun}", noun))
            yes, no = draw.choice(
                (("with {n}", "without {n}"), ("including {n}", "excluding {n}"), ("and {v} {n}", "but do not {v} {n}"))
            )
            phrase = yes if value else no
        return Parameter(
            name, {"type": "boolean", **self._described(f"whether to {verb} {words}", article=False)}, value,
            phrase.format(n=words, v=verb), "", default=False,
        )  # fmt: skip

    def _list(self) -> Parameter:
        draw = self.draw
        count = draw.between(2, 5)
        if draw.chance(0.5):
            decimals = draw.chance(0.2)
            values: list[Any] = [
                draw.between(1, 99) / 2 if decimals else draw.between(0, draw.choice((9, 100))) for _ in range(count)
            ]
            kind = "number" if decimals or draw.chance(0.3) else "integer"
            draw.names.update(map(str, values))
            name = draw.choice(
                ("numbers", "values", "data", "scores", "grades", "list", "points", "prices", "temperatures")
            )
        else:
            pool = draw.choice(("first_name", "city", "fruit", "vegetable", "color", "country"))
            values = [draw.thing(pool) if draw.chance(0.7) else draw.word() for _ in range(count)]
            values = list(dict.fromkeys(values))
            kind = "string"
            name = draw.choice(("items", "names", "tags", "ingredients", "cities", "words", "options", "people"))
        if draw.chance(0.3):
            name = f"{draw.noun()}s"
        words = spoken(name)
        shown = [str(value) for value in values]
        text = draw.choice((", ".join(shown), series(shown), f"[{', '.join(shown)}]", series(shown)))
        phrase = draw.choice(
            ("of {v}", "for {v}", "with the {n} {v}", "for the {n} {v}", "with {n} {v}", "given {v}", "from {v}")
        )
        return Parameter(
            name, {"type": "array", "items": {"type": kind}, **self._described(f"list of {words}")}, values,
            phrase.format(n=words, v=text), text, f"The {words} are {text}.",
        )  # fmt: skip

    def _text(self) -> Parameter:
        draw = self.draw
        name = draw.choice(
            ("message", "text", "title", "query", "note", "subject", "content", "comment", "description", "body")
        )
        words = [draw.word() for _ in range(draw.between(2, 6))]
        value = draw.named(
            draw.choice((" ".join(words), " ".join(words).capitalize(), f"{' '.join(words).capitalize()}."))
        )
        phrase = draw.choice(
            ('"{v}"', 'with the {n} "{v}"', "saying '{v}'", 'that says "{v}"', ': "{v}"', 'with {n} "{v}"')
        )
        return Parameter(
            name,
            {"type": "string", **self._described(name)},
            value,
            phrase.format(n=name, v=value),
            f'"{value}"',
            f'The {name} is "{value}".',
        )

    def _object(self) -> Parameter:
        draw = self.draw
        name = (
            draw.choice(("address", "options", "filters", "settings", "details", "dimensions", "profile", "order"))
            if draw.chance(0.6)
            else draw.noun()
        )
        inner = Parameters(draw)
        parts = [
            draw.choice((inner._category, inner._number, inner._word, inner._measure))()
            for _ in range(draw.between(2, 3))
        ]
        found = {part.name: part for part in parts if part is not None}
        text = series([f"{spoken(part.name)} {_shown(part.argument)}" for part in found.values()])
        schema = {
            "type": "object",
            **self._described(spoken(name)),
            "properties": {part.name: part.schema for part in found.values()},
            "required": list(found),
        }
        argument = {part.name: part.argument for part in found.values()}
        return Parameter(
            name,
            schema,
            argument,
            draw.choice(("with {v}", "with the {n} {v}", "({v})")).format(n=spoken(name), v=text),
            text,
        )

    def _figure(self, *, decimals: bool) -> tuple[int | float, str]:
        """Draw a number and its text in a request: `1500`, `1,500` or `2.5`."""
        draw = self.draw
        if decimals:
            value = round(draw.between(1, 999) / draw.choice((10, 100, 10)), 2)
            return value, draw.named(str(value))
        number = draw.between(1, draw.choice((10, 100, 1000, 100_000)))
        return number, draw.named(f"{number:,}" if number > 999 and draw.chance(0.3) else str(number))

    def _described(self, words: str, hints: Sequence[str] = (), *, article: bool = True) -> dict[str, str]:
        draw = self.draw
        if draw.chance(0.12):
            return {}
        the = draw.choice(("The ", "The ", "A ", "")) if article else ""
        text = (
            the + words + draw.choice(("", "", " to use", " of the request", " to look for", " given by the user"))
        ).strip()
        text = text[0].upper() + text[1:] + draw.choice((".", "."))
        return {"description": f"{text} {draw.choice(hints).format(n=words)}" if hints and draw.chance(0.6) else text}


ENUMS: tuple[tuple[str, ...], ...] = tuple(
    tuple(options.split())
    for options in (
        *("metric imperial", "celsius fahrenheit", "low medium high", "asc desc", "daily weekly monthly", "km miles"),
        *("small medium large", "pdf csv json", "open closed", "public private", "economy business first"),
        *("male female", "email sms push", "draft published archived", "car bus train bike"),
    )
)


def spoken(name: str) -> str:
    """Return a parameter's name as words: `maxSize` and `max_size` are `max size`."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).replace("_", " ").strip()


def series(items: Sequence[str]) -> str:
    """Join items as `a`, `a and b` or `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
