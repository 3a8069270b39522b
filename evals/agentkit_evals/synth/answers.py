"""Verifiers of answers: a number, names that the answer must and must not mention, or a JSON value.

Those of numbers and names accept what a person would: `12`, `There are 12 of them.` and `**12**`, unless the request
demands the bare value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Layout = Literal["", "bare", "lines", "commas"]
"""The form of the answer that a request demands: none, the bare value, one item on each line, or commas."""

SCRIPT = '''\
"""Compare the answer with answer.json: a number, or names that it must and must not mention."""
import json, os, re, sys, unicodedata

def normal(text):
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())

def require(condition, message):
    if not condition:
        sys.exit(message)

folder = os.environ["AGENTKIT_VERIFIER_DIR"]
with open(os.path.join(folder, "answer.json"), encoding="utf-8") as file:
    expected = json.load(file)
answer = os.environ["AGENTKIT_ANSWER"].strip()
layout = expected["layout"]
require(answer, "there is no answer")

if "number" in expected:
    text, repeated = answer, set()
    for each in expected["ignored"]:
        if re.fullmatch(r"\\d+", each):
            repeated.add(float(each))
        else:
            text = text.replace(each, " ")
    found = re.findall(r"(?<![\\w.,-])-?[$€£]?\\d[\\d,]*(?:\\.\\d+)?(?![\\w]|[.,-]\\d)", text)
    values = {float(re.sub("[,$€£]", "", text)) for text in found}
    near = [value for value in values if abs(value - expected["number"]) <= expected["tolerance"] + 1e-9]
    require(near and not values - repeated - {*near}, f"expected {expected['number']}, found {sorted(values)}")
    if layout == "bare":
        require(re.fullmatch(r"-?[\\d,]+(\\.\\d+)?", answer), "expected the number and nothing else")
else:
    wanted = [normal(name) for name in expected["names"]]
    others = [normal(name) for name in expected["others"]]
    text, at = normal(answer), {}
    for name in sorted({*wanted, *others}, key=len, reverse=True):
        match = re.search(rf"(?<!\\w){re.escape(name)}(?!\\w)", text)
        if match:
            at[name] = match.start()
            text = re.sub(rf"(?<!\\w){re.escape(name)}(?!\\w)", lambda m: "\\0" * len(m[0]), text)
    for name in wanted:
        require(name in at, f"the answer does not mention {name!r}")
    for name in others:
        require(name in wanted or name not in at, f"the answer mentions {name!r}")
    places = [at[name] for name in wanted]
    require(not expected["ordered"] or places == sorted(places), "the names are not in the expected order")
    size = sum(map(len, wanted))
    require(len(answer) <= 3 * size + 120, f"the answer has {len(answer)} characters, expected about {size}")
    lines = [line for line in answer.splitlines() if line.strip()]
    if layout == "bare":
        require(normal(answer.strip("`\\"'.* ")) == normal(", ".join(wanted)), "expected the value and nothing else")
    if layout == "lines":
        require(len(lines) == len(wanted), "expected one name on each line")
    if layout == "commas":
        require(len(lines) == 1 and answer.count(",") >= len(wanted) - 1, "expected one line with commas")
'''

SAME_JSON = '''\
"""Compare the answer with answer.json as JSON values: 1 is 1.0, but neither true nor "1"."""
import json, os, sys

def normal(text):
    return json.dumps(json.loads(text, parse_int=float), sort_keys=True)

with open(os.path.join(os.environ["AGENTKIT_VERIFIER_DIR"], "answer.json"), encoding="utf-8") as file:
    expected = normal(file.read())
try:
    given = normal(os.environ["AGENTKIT_ANSWER"])
except ValueError as error:
    sys.exit(f"the answer is not JSON: {error}")
if given != expected:
    sys.exit(f"expected {expected}, found {given}")
'''


def number_is(value: float, *, layout: Layout = "", decimals: int = 0, ignored: Iterable[str] = ()) -> dict[str, Any]:
    """Return the fields of a draft whose answer is a number.

    Args:
        value: The number.
        layout: "bare" if the answer must be the number and nothing else.
        decimals: Decimal places that the answer must have right.
        ignored: File names and numbers of the request that an answer may repeat.
    """
    value = int(value) if value == int(value) else value
    written = f"{value:.2f}" if isinstance(value, float) else str(value)
    tolerance = 0.0 if decimals == 0 and value == int(value) else 0.6 * 10**-decimals
    return _verifier(
        written,
        {"number": value, "tolerance": tolerance, "layout": layout, "ignored": [text for text in ignored if text]},
    )


def names_are(
    names: Sequence[str], *, others: Iterable[str] = (), ordered: bool = False, layout: Layout = ""
) -> dict[str, Any]:
    """Return the fields of a draft that must name `names`, not `others`."""
    joint = ", " if layout == "commas" else "\n"
    return _verifier(
        joint.join(names), {"names": list(names), "others": sorted({*others}), "ordered": ordered, "layout": layout}
    )


def json_is(value: Any) -> dict[str, Any]:
    """Return the fields of a draft whose answer is JSON with this value, in any layout and order of keys."""
    return _checked(SAME_JSON, value, reply=json.dumps(value, ensure_ascii=False), alone=True)


def _verifier(reply: str, expected: dict[str, Any]) -> dict[str, Any]:
    alone = expected["layout"] != "" or "." in str(expected.get("number", ""))
    return _checked(SCRIPT, expected, reply=reply, alone=alone)


def _checked(script: str, expected: Any, *, reply: str, alone: bool) -> dict[str, Any]:
    return {
        "reply": reply,
        "alone": alone,
        "verifier": 'python3 "$AGENTKIT_VERIFIER_DIR/check_answer.py"',
        "verifier_files": {"check_answer.py": script, "answer.json": json.dumps(expected, ensure_ascii=False)},
    }
