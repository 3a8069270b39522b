"""Everyday words, from two packages with free licences: wonderwords and mimesis (both MIT).

A pool is a sorted tuple without repetitions, so a seed draws the same word wherever the same versions are installed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version

from mimesis import Generic, Locale
from wonderwords import RandomWord, filter_profanity

PACKAGES = {"mimesis": "MIT", "wonderwords": "MIT"}
"""The packages that the words come from, with their licences."""
SCRIPTS = (Locale.RU, Locale.EL, Locale.JA, Locale.ZH, Locale.KO, Locale.DE, Locale.PL, Locale.ES, Locale.FR, Locale.TR)
"""Locales of names that are not plain English."""
DRAWS = 3000  # draws from a package's list that become a pool

_PLAIN = re.compile(r"[a-z]{3,11}")


def versions() -> dict[str, str]:
    """Return the installed version of each package."""
    return {name: version(name) for name in PACKAGES}


@functools.cache
def words(kind: str) -> tuple[str, ...]:
    """Return the lower-case words of one kind: `noun`, `verb` or `adjective`."""
    return _clean(RandomWord().filter(include_categories=[kind]))


@functools.cache
def common() -> tuple[str, ...]:
    """Return the nouns, verbs and adjectives among the frequent words of English text."""
    known = {word for kind in ("noun", "verb", "adjective") for word in words(kind)}
    return tuple(sorted(known.intersection(_drawn(lambda generic: generic.text.word(), 5 * DRAWS))))


@functools.cache
def common_nouns() -> tuple[str, ...]:
    """Return the nouns among the frequent words."""
    return tuple(sorted({*words("noun")}.intersection(common())))


@functools.cache
def pool(name: str, locale: Locale = Locale.EN) -> tuple[str, ...]:
    """Return the values of one category, such as `city` or `fruit`; see `POOLS`.

    Raises:
        ValueError: there is no such category.
    """
    if name not in POOLS:
        raise ValueError(f"no pool {name!r}; expected one of {', '.join(POOLS)}")
    return tuple(sorted({text for text in _drawn(POOLS[name], DRAWS, locale) if len(text) < 32}))


POOLS: dict[str, Callable[[Generic], str]] = {
    "first_name": lambda generic: generic.person.first_name(),
    "surname": lambda generic: generic.person.surname(),
    "occupation": lambda generic: generic.person.occupation(),
    "nationality": lambda generic: generic.person.nationality(),
    "language": lambda generic: generic.person.language(),
    "username": lambda generic: generic.person.username("l_d"),
    "city": lambda generic: generic.address.city(),
    "country": lambda generic: generic.address.country(),
    "state": lambda generic: generic.address.state(),
    "street": lambda generic: generic.address.street_name(),
    "fruit": lambda generic: generic.food.fruit(),
    "vegetable": lambda generic: generic.food.vegetable(),
    "dish": lambda generic: generic.food.dish(),
    "drink": lambda generic: generic.food.drink(),
    "spice": lambda generic: generic.food.spices(),
    "color": lambda generic: generic.text.color(),
    "company": lambda generic: generic.finance.company(),
    "bank": lambda generic: generic.finance.bank(),
    "currency": lambda generic: generic.finance.currency_iso_code(allow_random=True),
    "ticker": lambda generic: generic.finance.stock_ticker(),
    "car": lambda generic: generic.transport.car(),
    "airplane": lambda generic: generic.transport.airplane(),
    "phone": lambda generic: generic.hardware.phone_model(),
    "os": lambda generic: generic.development.os(),
    "programming_language": lambda generic: generic.development.programming_language(),
    "hostname": lambda generic: generic.internet.hostname(),
    "weekday": lambda generic: generic.datetime.day_of_week(),
    "month": lambda generic: generic.datetime.month(),
}


def _drawn(draw: Callable[[Generic], str], count: int, locale: Locale = Locale.EN) -> Iterable[str]:
    generic = Generic(locale, seed=0)
    return [draw(generic) for _ in range(count)]


def _clean(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({word for word in filter_profanity(list(found)) if _PLAIN.fullmatch(word)}))
