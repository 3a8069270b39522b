"""Small files that hold one value, alone or next to other lines; tasks write them and oracles parse them."""

from __future__ import annotations

from agentkit_evals.synth.family import Draw

_ALONE = ("{value}\n",)
_KEYED = (
    "value={value}\n",
    "value: {value}\n",
    "{key}={other}\nvalue={value}\n",
    "value={value}\n{key}={other}\n",
    "{key}: {other}\nvalue: {value}\n",
    "value: {value}\n{key}: {other}\n",
)


def value_file(draw: Draw, value: str) -> str:
    """Return a file text that holds `value`, either alone or after `value=` or `value: `."""
    layout = draw.choice(_ALONE if draw.chance(0.4) else _KEYED)
    if "{key}" in layout:
        return layout.format(value=value, key=draw.name(), other=draw.value())
    return layout.format(value=value)


def value_in(text: str) -> str:
    """Return the value in a text written by `value_file`."""
    for line in text.splitlines():
        if line.startswith("value"):
            return line.removeprefix("value").lstrip("=: ")
    return text.strip()
