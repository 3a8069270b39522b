"""Kinds of values of everyday parameters: what the call has, and how a request says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from agentkit_evals.synth.draw import Draw

NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True, slots=True)
class Value:
    """A drawn value: the argument, and the words for it."""

    argument: Any
    said: str

    @property
    def digits(self) -> str:
        """The words, or the digits of a number that is said as a word."""
        return str(self.argument) if self.said in NUMBER_WORDS else self.said

    @property
    def plain(self) -> str:
        """The words, or the text itself without the quotation marks of the request."""
        return self.argument if isinstance(self.argument, str) else self.said


@dataclass(frozen=True, slots=True)
class Slot:
    """A kind of value with its JSON type."""

    type: Literal["string", "integer", "number"]
    draw: Callable[[Draw], Value]


def _text(make: Callable[[Draw], str]) -> Slot:
    def draw(source: Draw) -> Value:
        text = make(source)
        return Value(text, text)

    return Slot("string", draw)


def _pool(*names: str) -> Slot:
    return _text(lambda draw: draw.thing(draw.choice(names)))


def _quoted(make: Callable[[Draw], str]) -> Slot:
    """Texts that a request sometimes has in quotation marks."""

    def draw(source: Draw) -> Value:
        text = source.named(make(source))
        return Value(text, source.weighted({text: 5.0, f'"{text}"': 3.0, f"'{text}'": 1.0}))

    return Slot("string", draw)


def _integer(low: int, high: int, *, words: bool = False, grouped: bool = False) -> Slot:
    def draw(source: Draw) -> Value:
        number = source.between(low, high)
        said = str(number)
        if words and number < len(NUMBER_WORDS) and source.chance(0.35):
            said = NUMBER_WORDS[number]
        elif grouped and number > 999 and source.chance(0.4):
            said = f"{number:,}"
        return Value(number, source.named(said))

    return Slot("integer", draw)


def _big(draw: Draw) -> Value:
    number = draw.between(1, 500) * draw.choice((1000, 1000, 500, 100, 250))
    return Value(number, draw.named(f"{number:,}" if draw.chance(0.4) else str(number)))


def _decimal(low: float, high: float, digits: int) -> Slot:
    def draw(source: Draw) -> Value:
        number = round(source.rng.uniform(low, high), digits)
        return Value(number, source.named(f"{number:.{digits}f}" if digits == 2 else str(number)))

    return Slot("number", draw)


def _percent(draw: Draw) -> Value:
    number: float = draw.between(1, 30) if draw.chance(0.6) else draw.between(10, 150) / 10
    return Value(number, draw.named(str(number)))


def _file(draw: Draw) -> str:
    return draw.named(
        f"{draw.file_stem()}.{draw.choice('txt csv pdf json md png jpg log py docx mp3 mp4 zip'.split())}"
    )


def _title(draw: Draw) -> str:
    words = [draw.word() for _ in range(draw.between(1, 3))]
    words[-1:] = [draw.noun()]
    return " ".join(word.capitalize() for word in words)


def _sentence(draw: Draw) -> str:
    noun, other, name = draw.noun(), draw.noun(), draw.thing("first_name")
    return draw.choice(
        (
            f"The {noun} is {draw.adjective()}.",
            f"{name} has the {noun}.",
            f"Please bring the {noun}",
            f"I forgot the {noun} and the {other}",
            f"the {noun} arrives at {draw.clock()}",
            f"See you at the {noun}",
            f"Our {noun} needs a new {other}.",
            f"{name} will call about the {noun}",
            f"No {noun} today",
            f"{draw.word()} {noun} {other}",
        )
    )


def _url(draw: Draw) -> str:
    return draw.named(f"https://{draw.thing('hostname')}/{draw.word()}")


def _phone_number(draw: Draw) -> str:
    parts = [str(draw.between(10, 999)), str(draw.between(100, 9999)), str(draw.between(100, 9999))]
    return draw.named(draw.choice((" ", "-")).join(parts))


SLOTS: dict[str, Slot] = {
    **{
        name: _pool(name)
        for name in (
            *("city", "country", "state", "street", "first_name", "surname", "company", "bank", "currency", "ticker"),
            *("language", "nationality", "occupation", "dish", "drink", "fruit", "vegetable", "spice", "color", "car"),
            *("airplane", "phone", "os", "programming_language", "hostname", "username", "weekday", "month"),
        )
    },
    "person": _text(Draw.person),
    "email": _text(Draw.email),
    "date": _text(lambda draw: draw.named(draw.date().isoformat())),
    "clock": _text(Draw.clock),
    "code": _text(Draw.code),
    "version": _text(Draw.version),
    "path": _text(lambda draw: draw.path(draw.choice(("txt", "csv", "pdf", "json", "md", "png", "log", "py")))),
    "file": _text(_file),
    "noun": _text(Draw.noun),
    "adjective": _text(Draw.adjective),
    "word": _text(Draw.word),
    "title": _quoted(_title),
    "sentence": _quoted(_sentence),
    "url": _text(_url),
    "phone_number": _text(_phone_number),
    "zip": _text(lambda draw: draw.number(10000, 99999)),
    "year_text": _text(lambda draw: draw.number(1900, 2030)),
    "count": _integer(1, 12, words=True),
    "integer": _integer(1, 1000),
    "big": Slot("integer", _big),
    "amount": _decimal(1, 900, 2),
    "decimal": _decimal(1, 100, 1),
    "small_decimal": _decimal(0.1, 9.9, 1),
    "percent": Slot("number", _percent),
    "year": _integer(1900, 2030),
    "age": _integer(1, 99),
    "minutes": _integer(5, 180),
    "hours": _integer(1, 24),
    "latitude": _decimal(-60, 70, 4),
    "longitude": _decimal(-180, 180, 4),
}
