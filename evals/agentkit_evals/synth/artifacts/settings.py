"""Settings as JSON, YAML, TOML, INI or an env file, flat or in sections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agentkit_evals.synth.draw import Draw, Style
from agentkit_evals.synth.world import Artifact

SettingsFormat = Literal["json", "yaml", "toml", "ini", "env"]
ENDINGS: dict[SettingsFormat, tuple[str, ...]] = {
    "json": ("json",),
    "yaml": ("yaml", "yml"),
    "toml": ("toml",),
    "ini": ("ini", "cfg", "conf"),
    "env": ("env",),
}
STYLES: dict[SettingsFormat, tuple[Style, ...]] = {
    "json": ("snake", "snake", "camel", "kebab"),
    "yaml": ("snake", "snake", "camel", "kebab"),
    "toml": ("snake", "kebab"),
    "ini": ("snake", "snake", "kebab"),
    "env": ("upper",),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its section ("" at the top), key, value as text, and its line without indentation.

    `quoted` says that the format writes this value in quotes.
    """

    section: str
    key: str
    value: str
    quoted: bool
    line: str


@dataclass(frozen=True, slots=True)
class Settings(Artifact):
    format: SettingsFormat
    settings: tuple[Setting, ...]

    def changed(self, setting: Setting, value: str) -> str:
        """Return the setting's line with another value."""
        return line(self.format, setting.key, value, setting.quoted)


def draw_settings(draw: Draw) -> Settings:
    """Draw a file of two to fifteen settings; keys differ in the whole file."""
    shares: dict[SettingsFormat, float] = {"json": 3, "yaml": 3, "toml": 1.5, "ini": 1.5, "env": 1}
    form = draw.weighted(shares)
    style = draw.choice(STYLES[form])
    sections = [
        draw.identifier(style if style != "upper" else "snake", parts=1)
        for _ in range(draw.weighted({0: 3, 1: 2, 2: 2, 3: 1}))
    ]
    if form == "env":
        sections = []
    if form == "ini" and not sections:
        sections = [draw.noun()]
    sections = list(dict.fromkeys(sections))
    settings: list[Setting] = []
    seen: set[str] = {*sections}
    for section in sections or [""]:
        for _ in range(draw.between(2, 5)):
            if (key := draw.identifier(style)) in seen:
                continue
            seen.add(key)
            settings.append(_setting(draw, form, section, key))
    return Settings(
        path=_path(draw, form),
        text=write(form, settings),
        format=form,
        settings=tuple(settings),
    )


def new_value(draw: Draw, setting: Setting) -> str:
    """Draw another value of the same type."""
    while (value := _like(draw, setting)) == setting.value:
        pass
    return value


def line(form: SettingsFormat, key: str, value: str, quoted: bool) -> str:
    """Return one setting as the format writes it, without indentation and comma."""
    text = json.dumps(value, ensure_ascii=False) if quoted else value
    return {"json": f'"{key}": {text}', "yaml": f"{key}: {text}", "env": f"{key}={text}"}.get(form, f"{key} = {text}")


def write(form: SettingsFormat, settings: Sequence[Setting]) -> str:
    """Return the whole file."""
    sections = list(dict.fromkeys(setting.section for setting in settings))
    groups = [(section, [one.line for one in settings if one.section == section]) for section in sections]
    if form == "json":
        if sections == [""]:
            return "{\n" + ",\n".join(f"  {text}" for text in groups[0][1]) + "\n}\n"
        inner = (f'  "{name}": {{\n' + ",\n".join(f"    {text}" for text in lines) + "\n  }" for name, lines in groups)
        return "{\n" + ",\n".join(inner) + "\n}\n"
    if form == "yaml":
        return "".join(
            (f"{name}:\n" if name else "") + "".join(f"{'  ' if name else ''}{text}\n" for text in lines)
            for name, lines in groups
        )
    return "\n".join((f"[{name}]\n" if name else "") + "".join(f"{text}\n" for text in lines) for name, lines in groups)


def _path(draw: Draw, form: SettingsFormat) -> str:
    if form == "env" and draw.chance(0.5):
        return draw.named(draw.choice((".env", ".env.local", ".env.production", "deploy/.env")))
    return draw.path(draw.choice(ENDINGS[form]))


def _setting(draw: Draw, form: SettingsFormat, section: str, key: str) -> Setting:
    kind = draw.weighted({"number": 4, "flag": 2, "word": 3, "text": 1.5, "decimal": 0.7})
    if kind == "number":
        value = draw.number(0, draw.choice((9, 99, 999, 99999)))
    elif kind == "decimal":
        value = draw.named(f"{draw.between(0, 99)}.{draw.between(1, 99)}")
    elif kind == "flag":
        value = draw.choice(("true", "false"))
    else:
        value = draw.word() if kind == "word" else draw.words_value() if draw.chance(0.4) else draw.value()
    # A plain word needs no quotes in YAML, INI and env files; anything else is safe only in them.
    text = kind in ("word", "text")
    quoted = text and (form in ("json", "toml") or (form == "yaml" and (kind == "text" or draw.chance(0.2))))
    return Setting(section, key, value, quoted, line(form, key, value, quoted))


def _like(draw: Draw, setting: Setting) -> str:
    if setting.value in ("true", "false"):
        return "false" if setting.value == "true" else "true"
    if setting.value.isdecimal():
        return draw.number(0, 10 ** max(2, len(setting.value)))
    if setting.value.replace(".", "", 1).isdecimal():
        return draw.named(f"{draw.between(0, 99)}.{draw.between(1, 99)}")
    return draw.word() if setting.value.isalpha() or not setting.quoted else draw.value()
