"""Random choices of a world or a task: structure, and names and values as people write them."""

from __future__ import annotations

import keyword
import random
import re
import string
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Literal, TypeVar

from mimesis import Locale

from agentkit_evals.synth import vocabulary

T = TypeVar("T")
Style = Literal["snake", "kebab", "camel", "pascal", "upper", "space"]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_SIZES = ("max", "min", "default", "total", "last", "first", "next", "base", "extra", "new", "old", "main")
_UNITS = tuple("count limit size level rate name id date time mode path type code key".split())


class Draw:
    """Random choices of one world or task.

    `names` collects the names and values that were drawn, so that a task's signature can mask them; `choice` and
    `between` draw structure, which stays visible in the signature.
    """

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.names: set[str] = set()

    # --- structure ---

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def weighted(self, options: dict[T, float]) -> T:
        """Draw a key with a probability in proportion to its value."""
        return self.rng.choices(list(options), list(options.values()))[0]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Draw `count` different options, in random order."""
        return self.rng.sample(list(options), count)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def between(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, inclusive."""
        return self.rng.randint(low, high)

    def phrase(self, template: str, **slots: object) -> str:
        """Fill in a phrasing: draw one option of each `[a|b]`, innermost first, and replace each `{slot}`."""
        return self.expand(template).format_map(slots)

    def expand(self, template: str) -> str:
        """Draw one option of each `[a|b]` of a phrasing, innermost first."""
        while (text := _CHOICE.sub(lambda match: self.choice(match[1].split("|")), template)) != template:
            template = text
        return template

    # --- names and values ---

    def named(self, text: str) -> str:
        """Record a name or value that was drawn, and return it."""
        self.names.add(text)
        return text

    def fresh(self, make: Callable[[], str]) -> str:
        """Call `make` until its text has no overlap with a name of this draw; return it recorded."""
        for _ in range(200):
            text = make()
            if not any(text in other or other in text for other in self.names):
                break
        return self.named(text)

    def word(self) -> str:
        """Draw a lower-case word: mostly a frequent noun, else a rare noun, an adjective or any frequent word."""
        kind = self.rng.random()
        if kind < 0.55:
            words = vocabulary.common_nouns()
        elif kind < 0.7:
            words = vocabulary.words("noun")
        else:
            words = vocabulary.common() if kind < 0.85 else vocabulary.words("adjective")
        return self.named(self.choice(words))

    def noun(self) -> str:
        return self.named(self.choice(vocabulary.common_nouns() if self.chance(0.8) else vocabulary.words("noun")))

    def verb(self) -> str:
        return self.named(self.choice(vocabulary.words("verb")))

    def adjective(self) -> str:
        return self.named(self.choice(vocabulary.words("adjective")))

    def thing(self, name: str) -> str:
        """Draw a value of a pool of `vocabulary`, such as `city`."""
        return self.named(self.choice(vocabulary.pool(name)))

    def person(self) -> str:
        """Draw a full name; one in eight in another language or script."""
        locale = self.choice(vocabulary.SCRIPTS) if self.chance(0.125) else Locale.EN
        return self.named(" ".join(self.choice(vocabulary.pool(name, locale)) for name in ("first_name", "surname")))

    def identifier(self, style: Style = "snake", *, parts: int | None = None) -> str:
        """Draw a name of one to three words in one style, such as `max_connections` or `HttpProxy`."""
        count = parts or self.weighted({1: 4, 2: 5, 3: 1})
        words = [self.choice(vocabulary.common_nouns()) for _ in range(count)]
        if count > 1 and self.chance(0.35):
            words[0] = self.choice(_SIZES if self.chance(0.6) else vocabulary.words("adjective"))
        if count > 1 and self.chance(0.3):
            words[-1] = self.choice(_UNITS)
        if keyword.iskeyword(text := joined(words, style)):
            text += "s"
        return self.named(text)

    def file_stem(self) -> str:
        """Draw a file name without its ending, in any of the styles that people use."""
        kind = self.rng.random()
        if kind < 0.4:
            return self.word()
        if kind < 0.6:
            return self.identifier("snake", parts=2)
        if kind < 0.74:
            return self.identifier("kebab", parts=2)
        if kind < 0.8:
            return self.identifier("camel", parts=2)
        if kind < 0.84:
            return self.identifier("pascal", parts=2)
        if kind < 0.88:
            return self.identifier("space", parts=2)
        if kind < 0.93:
            return self.named(f"{self.word()}{self.choice('-_')}{self.date().isoformat()}")
        if kind < 0.96:
            return self.named(f"{self.word()}{self.choice(('-v', '_v', '-', ''))}{self.between(1, 30)}")
        if kind < 0.98:
            return self.named(self.choice(vocabulary.pool("city", self.choice(vocabulary.SCRIPTS))).replace(" ", "_"))
        return self.invented()

    def folder(self) -> str:
        """Draw the name of a folder."""
        if self.chance(0.4):
            folders = (
                "src docs config data logs tests scripts notes reports app lib assets backup archive tmp bin".split()
            )
            return self.named(self.choice(folders))
        return self.word() if self.chance(0.7) else self.identifier(self.choice(("snake", "kebab", "space")), parts=2)

    def path(self, ending: str, *, depth: int | None = None) -> str:
        """Draw a relative path: a file name with an ending, in up to three folders."""
        folders = [
            self.folder() for _ in range(self.weighted({0: 6, 1: 3, 2: 1.5, 3: 0.4}) if depth is None else depth)
        ]
        return self.named("/".join([*folders, f"{self.file_stem()}.{ending}"]))

    def usual_path(self, ending: str, stems: Sequence[str]) -> str:
        """Draw a path whose file name is mostly a usual one, such as `orders` or `orders_2024`, with an ending.

        A usual name has a suffix or a folder, since a bare one occurs everywhere, also in evaluations.
        """
        path = self.path(ending)
        if not stems or self.chance(0.45):
            return path
        folder, slash, _ = path.rpartition("/")
        kind = self.rng.random()
        if kind < 0.5 and folder:
            suffix = ""
        elif kind < 0.8:
            suffix = f"{self.choice(('_', '-', '_', ' '))}{self.noun()}"
        elif kind < 0.9:
            suffix = f"{self.choice('_-')}{self.date().isoformat()}"
        else:
            suffix = f"{self.choice('_-')}{self.choice((self.between(2019, 2027), self.between(1, 12)))}"
        return self.named(f"{folder}{slash}{self.choice(stems)}{suffix}.{ending}")

    def invented(self) -> str:
        """Draw a word of random syllables, or random letters and digits."""
        if self.chance(0.6):
            return self.named("".join(self.choice(_SYLLABLES) for _ in range(self.between(2, 4))))
        letters = string.ascii_lowercase + (string.digits if self.chance(0.5) else "")
        return self.named("".join(self.choice(letters) for _ in range(self.between(4, 9))))

    def number(self, low: int, high: int) -> str:
        return self.named(str(self.between(low, high)))

    def amount(self) -> str:
        """Draw a number with two decimals."""
        return self.named(f"{self.between(1, 9999)}.{self.between(0, 99):02}")

    def date(self) -> date:
        day = date(2019, 1, 1) + timedelta(days=self.between(0, 3200))
        self.names.add(day.isoformat())
        return day

    def clock(self) -> str:
        """Draw a time of day, such as `07:45`."""
        return self.named(f"{self.between(0, 23):02}:{self.between(0, 59):02}")

    def version(self) -> str:
        return self.named(".".join(str(self.between(0, top)) for top in ((9, 30, 12) if self.chance(0.8) else (30, 9))))

    def code(self) -> str:
        """Draw an id, such as `INV-2041`, `A7` or `9f3c21`."""
        kind = self.rng.random()
        letters = "".join(self.choice(string.ascii_uppercase) for _ in range(self.between(1, 4)))
        if kind < 0.4:
            return self.named(f"{letters}-{self.between(10, 99999)}")
        if kind < 0.6:
            return self.named(f"{letters}{self.between(1, 9999)}")
        if kind < 0.8:
            return self.named(f"{self.rng.getrandbits(4 * self.between(5, 8)):x}")
        return self.named("-".join(str(self.between(100, 9999)) for _ in range(self.between(2, 3))))

    def email(self) -> str:
        user, surname = (self.choice(vocabulary.pool(name)).lower() for name in ("first_name", "surname"))
        return self.named(f"{user}{self.choice(('.', '_', ''))}{surname}@{self.choice(vocabulary.pool('hostname'))}")

    def value(self) -> str:
        """Draw a value without spaces: a word, a number, a name, an id, a version, a date or an address."""
        return self.weighted(_VALUES)(self)

    def words_value(self) -> str:
        """Draw a value that may have spaces."""
        return self.person() if self.chance(0.3) else self.thing(self.choice(("city", "company", "dish", "occupation")))


_VALUES: dict[Callable[[Draw], str], float] = {
    Draw.word: 3,
    lambda draw: draw.number(0, 9999): 3,
    Draw.identifier: 1,
    Draw.code: 1,
    Draw.version: 0.7,
    lambda draw: draw.date().isoformat(): 0.7,
    Draw.amount: 0.7,
    Draw.email: 0.4,
    Draw.invented: 0.5,
    lambda draw: draw.thing("hostname"): 0.4,
}


def joined(words: Sequence[str], style: Style) -> str:
    """Join lower-case words in a style: `max_size`, `max-size`, `maxSize`, `MaxSize`, `MAX_SIZE` or `max size`."""
    if style == "camel":
        return words[0] + "".join(word.capitalize() for word in words[1:])
    if style == "pascal":
        return "".join(word.capitalize() for word in words)
    text = {"snake": "_", "kebab": "-", "upper": "_", "space": " "}[style].join(words)
    return text.upper() if style == "upper" else text
