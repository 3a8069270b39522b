"""The origin of tasks, trajectories and training rows, and the licences that an export accepts.

A task carries its `Provenance` as `metadata["provenance"]`. A training row of a trajectory adds the model and the
sampling parameters that wrote it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from agentkit.task import Strict
from agentkit.version import agentkit_version

PERMISSIVE = frozenset(
    (
        *("0BSD", "Apache-2.0", "BSD-1-Clause", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC"),
        *("MIT", "MIT-0", "NCSA", "PSF-2.0", "Python-2.0", "Python-2.0.1", "Unlicense", "Zlib", "ZPL-2.1"),
    )
)
"""SPDX identifiers of permissive licences: what an export accepts by default."""


class Provenance(Strict):
    """Origin of a task or of a row. None stands for "does not apply", except for `licence`: None is unknown."""

    generator: str
    """The code that made it, with the version of agentkit, as from `generator_name`."""
    seed: int | None = None
    package: str | None = None
    version: str | None = None
    licence: str | None = None
    """SPDX expression of the material: a package's licence, or that of generated text."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Hash of the file that the material was taken from."""
    model: str | None = None
    """The model that wrote the row."""
    sampling: dict[str, Any] | None = None
    """Sampling parameters of that model."""


@functools.cache
def generator_name(name: str) -> str:
    """Return the generator's name with the version of agentkit, such as `synth.bugs/0.1.0`."""
    return f"{name}/{agentkit_version()}"


def is_accepted(licence: str | None, accepted: Iterable[str] = PERMISSIVE) -> bool:
    """Return whether an SPDX expression can be satisfied by accepted licences alone; an unknown licence cannot.

    `A OR B` needs one of them, `A AND B` both; exceptions (`WITH`) count as the licence without them.
    """
    known = {name.casefold() for name in accepted}
    if not licence:
        return False
    text = licence.replace("(", " ( ").replace(")", " ) ").split()
    position = 0

    def either() -> bool:
        nonlocal position
        result = both()
        while position < len(text) and text[position].upper() == "OR":
            position += 1
            result = both() or result
        return result

    def both() -> bool:
        nonlocal position
        result = one()
        while position < len(text) and text[position].upper() == "AND":
            position += 1
            result = one() and result
        return result

    def one() -> bool:
        nonlocal position
        if position >= len(text):
            raise ValueError
        word = text[position]
        position += 1
        if word == "(":
            result = either()
            if position >= len(text) or text[position] != ")":
                raise ValueError
            position += 1
            return result
        if word.upper() in ("AND", "OR", "WITH", ")"):
            raise ValueError
        if position + 1 < len(text) and text[position].upper() == "WITH":
            position += 2
        return word.casefold() in known

    try:
        accepted_all = either()
    except (ValueError, RecursionError):
        return False
    return accepted_all and position == len(text)


# Classifiers and free texts of package metadata that name one licence without doubt.
_CLASSIFIERS: Mapping[str, str] = {
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "Zope Public License": "ZPL-2.1",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
_TEXTS: Mapping[str, str] = {
    **{name.casefold(): name for name in PERMISSIVE},
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "3-clause bsd": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "bsd-3": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "new bsd license": "BSD-3-Clause",
    "simplified bsd": "BSD-2-Clause",
    "isc license": "ISC",
    "mit license": "MIT",
    "the mit license": "MIT",
    "the mit license (mit)": "MIT",
}
_BSD_TEXTS = (
    ("neither the name", "BSD-3-Clause"),
    ("the names of its contributors may not", "BSD-3-Clause"),
    ("names of the contributors may not", "BSD-3-Clause"),
    ("redistributions in binary form must reproduce", "BSD-2-Clause"),
)


def licence_of(metadata: Mapping[str, Iterable[str]], licence_text: str = "") -> str | None:
    """Return the SPDX expression of a package's licence, or None if its metadata leaves it open.

    Args:
        metadata: Header names of the package's core metadata, with their values.
        licence_text: Text of the licence file; it tells the BSD licences apart, which one classifier stands for.
    """
    if expression := next(iter(metadata.get("License-Expression", ())), ""):
        return expression
    short = " ".join(next(iter(metadata.get("License", ())), "").split()).casefold()
    names = short.split(" or ")
    if all(name in _TEXTS for name in names):
        return " OR ".join(_TEXTS[name] for name in names)
    found: set[str] = set()
    for classifier in metadata.get("Classifier", ()):
        if not classifier.startswith("License :: "):
            continue
        name = classifier.rpartition(" :: ")[2]
        if name == "OSI Approved":
            continue
        if name == "BSD License":
            text = " ".join(licence_text.split()).casefold()
            found.add(next((spdx for words, spdx in _BSD_TEXTS if words in text), ""))
        else:
            found.add(_CLASSIFIERS.get(name, ""))
    if not found or "" in found:
        return None
    return " OR ".join(sorted(found))
