"""Files and values as a request mentions them."""

from __future__ import annotations

from agentkit_evals.synth.draw import Draw


def mention(draw: Draw, path: str) -> str:
    """Return a path as people write it in a sentence: bare, in backticks or in quotes."""
    if " " in path:
        return draw.choice((f"`{path}`", f'"{path}"', f"'{path}'"))
    kind = draw.rng.random()
    if kind < 0.5:
        return path
    if kind < 0.82:
        return f"`{path}`"
    if kind < 0.9:
        return f'"{path}"'
    return f"the file {path}"


def mention_value(draw: Draw, value: str) -> str:
    """Return a key or a value as people write it in a sentence."""
    kind = draw.rng.random()
    if " " in value or not value:
        return f'"{value}"' if kind < 0.7 else f"`{value}`"
    return value if kind < 0.6 else f"`{value}`" if kind < 0.85 else f'"{value}"'
