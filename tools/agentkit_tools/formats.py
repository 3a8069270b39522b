"""Regular expressions for the JSON Schema `format`s that are checked; each matches the whole text.

The engine enforces the same formats during decoding, from its own copy of this table (`schema_forms.FORMATS`): the
packages do not import each other, and a test keeps the copies identical. The expressions allow every spelling that
RFC 3339, 4122, 4291 and 3986 allow, and two that pydantic also reads: a time without seconds or zone, and a space
instead of the `T`.
"""

from __future__ import annotations

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP}-02-29)"
_HOURS = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOURS}(?::[0-5][0-9](?:\.[0-9]{{1,9}})?)?(?:[zZ]|[+-]{_HOURS})?"
_CLOCK = "T(?:[0-9]+H(?:[0-9]+M)?(?:{s})?|[0-9]+M(?:{s})?|{s})".format(s=r"[0-9]+(?:\.[0-9]+)?S")
_DAYS = "(?:[0-9]+Y(?:[0-9]+M)?(?:[0-9]+D)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_IPV4 = r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?:\.(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])){3})"
_H16 = "[0-9A-Fa-f]{1,4}"


def _ipv6() -> str:
    forms = [f"(?:{_H16}:){{7}}{_H16}", f"(?:{_H16}:){{6}}{_IPV4}"]
    for left in range(8):  # number of groups before `::`, which replaces one or more groups
        right = 7 - left
        begin = f"{_H16}(?::{_H16}){{{left - 1}}}" if left else ""
        ends = ([f"{_H16}(?::{_H16}){{0,{right - 1}}}"] if right else []) + (
            [f"(?:{_H16}:){{0,{right - 2}}}{_IPV4}"] if right >= 2 else []
        )
        forms.append(f"{begin}::(?:{'|'.join(ends)})?" if ends else f"{begin}::")
    return "|".join(forms)


FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[tT ]{_TIME}",
    "duration": f"[+-]?P(?:[0-9]+W|{_DAYS}(?:{_CLOCK})?|{_CLOCK})",
    "email": r"[^@\s]+@[^@\s]+",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[^\s]*",
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
}
"""Format name to regular expression; all other formats are ignored."""
