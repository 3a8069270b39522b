"""Everyday functions, computations, files and commands, with requests as people make them.

`functions.draw_function` draws functions of random words whose requests name each parameter. Here a request seldom
does: in `Ferry to Bari on 2025-06-02, coming from Split, please`, the kinds of values say which goes where.
`functions/`, `computations/`, `files/` and `commands/` hold lists of entries by topic. In a request, `[a|b]` stands for
one of its alternatives and `{key}` for the words for a parameter; the parameters in it are those that the request
states.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentkit_evals.synth.catalog.inputs import INPUTS, NAMESPACE, InputFile
from agentkit_evals.synth.catalog.slots import SLOTS, Value
from agentkit_evals.synth.draw import Draw, joined
from agentkit_evals.synth.functions import STYLES, DrawnFunction
from agentkit_evals.synth.mention import mention_value
from agentkit_evals.synth.parameters import Parameter, series, spoken
from agentkit_evals.synth.shell import quote

K = TypeVar("K", bound="_Model")
FOLDER = Path(__file__).parent
ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
KEY = re.compile(r"\{(\w+)\}")
QUOTED = re.compile(r"[\"'`]\{(\w+)\}")
GLUED = re.compile(r"(?<=[^\s.,:;!?(])\{(\w+)\}|\{(\w+)\}(?=[^\s.,:;!?)])")
"""Keys without a space around, as in `{x}x + {y}y`, where a number cannot be a word."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Kind(_Model):
    """The kind of a parameter's values, given by one of these fields.

    Attributes:
        slot: Name of a kind of value, see `slots.SLOTS`.
        values: Texts to choose from.
        enum: Each value with the ways to say it.
        flag: Ways to say True (`yes`) and False (`no`; none if False is never said).
        list: A list of two to four of these.
        object: A nested object; `said` is its template.
    """

    slot: str | None = None
    values: tuple[str | int | float, ...] | None = None
    enum: dict[str | int, tuple[str, ...]] | None = None
    flag: dict[Annotated[str, Field(pattern="^(yes|no)$")], tuple[str, ...]] | None = None
    list: Kind | None = None
    object: dict[str, Kind] | None = None
    said: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = ("slot", "values", "enum", "flag", "list", "object")
        given = [name for name in fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a parameter needs one of {', '.join(fields)}, not {', '.join(given) or 'none'}")
        if self.slot is not None and self.slot not in SLOTS:
            raise ValueError(f"no slot {self.slot!r}; expected one of {', '.join(SLOTS)}")
        if self.object is not None and set(KEY.findall(self.said)) != set(self.object):
            raise ValueError(f"said {self.said!r} must state each of {', '.join(self.object)}")
        return self

    @property
    def schema_(self) -> dict[str, Any]:
        """The JSON schema."""
        if self.slot is not None:
            return {"type": SLOTS[self.slot].type}
        if self.values is not None:
            return {"type": _type(self.values)}
        if self.enum is not None:
            return {"type": _type(self.enum), "enum": [*self.enum]}
        if self.flag is not None:
            return {"type": "boolean"}
        if self.list is not None:
            return {"type": "array", "items": self.list.schema_}
        parts = self.object or {}
        properties = {name: part.schema_ for name, part in parts.items()}
        return {"type": "object", "properties": properties, "required": [*parts]}

    def draw(self, draw: Draw) -> Value:
        """Draw a value."""
        if self.slot is not None:
            return SLOTS[self.slot].draw(draw)
        if self.values is not None:
            chosen = draw.choice(self.values)
            return Value(chosen, draw.named(str(chosen)))
        if self.enum is not None:
            key = draw.choice([*self.enum])
            return Value(key, draw.choice(self.enum[key]))
        if self.flag is not None:
            answer = draw.choice([*self.flag])
            return Value(answer == "yes", draw.choice(self.flag[answer]))
        if self.list is not None:
            drawn = [self.list.draw(draw) for _ in range(draw.weighted({2: 4, 3: 4, 4: 1}))]
            different = list({one.said: one for one in drawn}.values())
            return Value([one.argument for one in different], series([one.said for one in different]))
        parts = {name: part.draw(draw) for name, part in (self.object or {}).items()}
        said = self.said.format_map({name: part.said for name, part in parts.items()})
        return Value({name: part.argument for name, part in parts.items()}, said)


class KnownParameter(Kind):
    """A parameter: names that its schema may have (its key if there are none), and descriptions."""

    names: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A drawn request, and the arguments that it states, by key."""

    text: str
    arguments: dict[str, Any]


class Known(_Model):
    """An entry of the catalog. Raises ValueError if a request misses a parameter."""

    other_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of requests that are not parameters."""

    parameters: dict[str, KnownParameter]
    requests: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        required = {key for key, one in self.parameters.items() if not one.optional}
        for request in self.requests:
            if unknown := set(KEY.findall(request)) - self.parameters.keys() - self.other_keys:
                raise ValueError(f"{request!r} has {', '.join(sorted(unknown))}, which is no parameter")
            parts = ALTERNATIVES.split(request)  # plain text and alternatives in turn
            if any(mark in "".join(parts[::2]) for mark in "[]|"):
                raise ValueError(f"{request!r} has alternatives inside alternatives, or a `|` outside of them")
            stated = set(KEY.findall(" ".join(parts[::2])))
            for alternatives in parts[1::2]:
                stated |= set.intersection(*(set(KEY.findall(each)) for each in alternatives.split("|")))
            if missing := required - stated:
                raise ValueError(f"{request!r} does not always state {', '.join(sorted(missing))}")
        return self

    def request(self, draw: Draw, **slots: str) -> Request:
        """Draw a request; `slots` are texts for keys that are not parameters."""
        template = draw.expand(draw.choice(self.requests))
        return self._request(draw, template, self._values(draw, template), slots)

    def _values(self, draw: Draw, template: str) -> dict[str, Value]:
        stated = set(KEY.findall(template))
        return {key: one.draw(draw) for key, one in self.parameters.items() if key in stated}

    @staticmethod
    def _request(draw: Draw, template: str, values: Mapping[str, Value], slots: Mapping[str, str]) -> Request:
        glued = _glued(template)
        said = {key: value.digits if key in glued else value.said for key, value in values.items()}
        said |= {key: values[key].plain for key in QUOTED.findall(template) if key in values}
        text = template.format_map({**said, **slots})
        text = text[0].upper() + text[1:] if draw.chance(0.6) else text
        return Request(text, {key: value.argument for key, value in values.items()})


class KnownFunction(Known):
    """A function with the requests that need it."""

    names: tuple[Annotated[str, Field(pattern=r"^\w{1,64}$")], ...] = Field(min_length=1)
    descriptions: tuple[str, ...] = Field(min_length=1)

    def draw(self, draw: Draw) -> DrawnFunction:
        """Draw the function's schema; its parameters are in the order of `parameters`."""
        names = _names(draw, self.parameters)
        return DrawnFunction(
            name=draw.choice(self.names),
            verb="",
            topic="",
            description=draw.choice(self.descriptions),
            parameters=tuple(
                Parameter(names[key], _described(draw, names[key], one), argument=None, phrase="", shown="")
                for key, one in self.parameters.items()
            ),
            required=frozenset(names[key] for key, one in self.parameters.items() if not one.optional),
            style=draw.choice(STYLES),
            salt=str(draw.between(0, 9999)),
            words=tuple(draw.word() for _ in range(8)),
        )

    def call(self, draw: Draw, function: DrawnFunction) -> Request:
        """Draw a request for a function that `draw` returned, with the arguments under the names of its schema."""
        return self._named(self.request(draw), function)

    def call_each(self, draw: Draw, function: DrawnFunction) -> tuple[str, list[dict[str, Any]]] | None:
        """Draw a request that states two or three values of a text parameter, with the arguments of a call for each.

        None if its words have no place for several.
        """
        template = draw.expand(draw.choice(self.requests))
        keys, single = KEY.findall(template), _glued(template) | {*QUOTED.findall(template)}
        texts = [key for key in keys if self.parameters[key].schema_ == {"type": "string"} and keys.count(key) == 1]
        if not (free := [key for key in texts if key not in single]):
            return None
        several = draw.choice(free)
        drawn = [self.parameters[several].draw(draw) for _ in range(draw.weighted({2: 3, 3: 1}))]
        different = {value.said: value.argument for value in drawn}
        if len({*different.values()}) < 2:
            return None
        values = self._values(draw, template) | {several: Value(None, series([*different]))}
        text = self._request(draw, template, values, {}).text
        arguments = [{key: value.argument for key, value in values.items()} | {several: a} for a in different.values()]
        return text, [self._named(Request(text, each), function).arguments for each in arguments]

    def _named(self, request: Request, function: DrawnFunction) -> Request:
        names = dict(zip(self.parameters, (one.name for one in function.parameters), strict=True))
        return Request(request.text, {names[key]: argument for key, argument in request.arguments.items()})


class KnownComputation(Known):
    """A calculation: a Python expression in which `{key}` becomes the argument's literal."""

    expression: str
    imports: str = ""

    def solve(self, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Return the script, and what it prints."""
        expression = self.expression.format_map({key: repr(argument) for key, argument in arguments.items()})
        known: dict[str, Any] = {}
        exec(self.imports, known)  # trusted: the catalog only
        script = f"{self.imports}\n\nprint({expression})" if self.imports else f"print({expression})"
        return script, str(eval(expression, known))


class KnownFile(Known):
    """A file to create: its content, in which `{key}` is the argument as text, see `_Argument`."""

    other_keys = frozenset({"path"})

    ending: str = ""
    name: str = ""
    folder: bool = False
    content: str

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        if bool(self.ending) == bool(self.name):
            raise ValueError(f"a file needs an ending or a name, not {self.ending!r} and {self.name!r}")
        for request in self.requests:
            if "{path}" not in request:
                raise ValueError(f"{request!r} does not state {{path}}")
        return self

    def draw_path(self, draw: Draw) -> str:
        """Draw a path for the file."""
        depth = draw.between(1, 2) if self.folder else None
        path = draw.path(self.ending or "txt", depth=depth)
        return draw.named(f"{path.rpartition('/')[0]}/{self.name}".lstrip("/")) if self.name else path

    def text(self, arguments: Mapping[str, Any]) -> str:
        """Return the content for these arguments."""
        return self.content.format_map({key: _Argument(argument) for key, argument in arguments.items()})


class KnownCommand(_Model):
    """Something to do with one text file, by a shell command or a Python script.

    Attributes:
        input: The kind of file, see `inputs.INPUTS`.
        command, script: How it is done; `{name}` is a part of the file, quoted for the shell or as a Python literal.
        answer, writes, changes: Expression for what is printed, for the content of `{out}`, or for that of `{path}`.
        ending: Ending of `{out}`; by default that of `{path}`.
    """

    input: str
    command: str = ""
    script: str = ""
    answer: str = ""
    writes: str = ""
    changes: str = ""
    ending: str = ""
    requests: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.input not in INPUTS:
            raise ValueError(f"no input {self.input!r}; expected one of {', '.join(INPUTS)}")
        for names in (("command", "script"), ("answer", "writes", "changes")):
            if sum(bool(getattr(self, name)) for name in names) != 1:
                raise ValueError(f"a command needs one of {', '.join(names)}")
        for request in self.requests:
            for key in ("path", "out") if self.writes else ("path",):
                if f"{{{key}}}" not in request:
                    raise ValueError(f"{request!r} does not state {{{key}}}")
        return self

    def request(self, draw: Draw, file: InputFile, **paths: str) -> str:
        """Draw a request about the file; `paths` are those of the file and of `{out}`, as the request has them."""
        template = draw.expand(draw.choice(self.requests))
        quoted = set(QUOTED.findall(template))
        said = {
            key: value if key in quoted or key.endswith("_col") else mention_value(draw, value)
            for key, value in file.variables.items()
            if isinstance(value, str)
        }
        text = template.format_map({**file.variables, **said, **paths})
        return text[0].upper() + text[1:] if draw.chance(0.6) else text

    def call(self, file: InputFile, **paths: str) -> tuple[str, dict[str, str]]:
        """Return the call of `bash` or `python` that does it."""
        values = {key: value for key, value in file.variables.items() if isinstance(value, (str, int))} | paths
        if self.script:
            return "python", {"code": _filled(self.script, {key: repr(value) for key, value in values.items()}).strip()}
        return "bash", {"command": _filled(self.command, {key: quote(str(value)) for key, value in values.items()})}

    def result(self, file: InputFile) -> str:
        """Return what is printed, or the content of the file that is written."""
        return str(eval(self.answer or self.writes or self.changes, {**NAMESPACE, **file.variables}))  # trusted


def _glued(template: str) -> set[str]:
    """Return the keys without a space around."""
    return {key for pair in GLUED.findall(template) for key in pair}


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Replace each `{name}` of a value; other braces, such as those of awk, stay."""
    return KEY.sub(lambda match: values.get(match[1], match[0]), template)


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument in a file's content: `{key:lines}`, `{key:json}` and so on."""

    value: Any

    def __format__(self, form: str) -> str:
        if form == "json":
            return json.dumps(self.value, ensure_ascii=False)
        if form == "count":
            return "\n".join(str(number) for number in range(1, self.value + 1))
        if form == "commas":
            return ", ".join(map(str, self.value))
        if form == "numbered":
            return "\n".join(f"{number}. {each}" for number, each in enumerate(self.value, 1))
        if form in ("lines", "bullets"):
            return "\n".join(f"- {each}" if form == "bullets" else str(each) for each in self.value)
        if form:
            raise ValueError(f"no form {form!r}; expected json, count, commas, numbered, lines or bullets")
        return str(self.value)


@functools.cache
def functions_by_domain() -> Mapping[str, tuple[KnownFunction, ...]]:
    """Return the functions of each domain. Raises ValueError if a file does not hold such a list."""
    return {path.stem: tuple(_read(path, KnownFunction)) for path in sorted((FOLDER / "functions").glob("*.yaml"))}


@functools.cache
def computations() -> tuple[KnownComputation, ...]:
    """Return all computations. Raises ValueError if a file does not hold such a list."""
    return _all("computations", KnownComputation)


@functools.cache
def files() -> tuple[KnownFile, ...]:
    """Return all files to create. Raises ValueError if a file does not hold such a list."""
    return _all("files", KnownFile)


@functools.cache
def commands() -> tuple[KnownCommand, ...]:
    """Return all commands. Raises ValueError if a file does not hold such a list."""
    return _all("commands", KnownCommand)


def _all(folder: str, kind: type[K]) -> tuple[K, ...]:
    return tuple(entry for path in sorted((FOLDER / folder).glob("*.yaml")) for entry in _read(path, kind))


class _Loader(yaml.SafeLoader):
    """YAML in which `yes`, `on`, `18:30` and `2025-03-14` are texts."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", "true|false", "tf"),
    ("int", "-?(?:0|[1-9][0-9]*)", "-0123456789"),
    ("float", r"-?[0-9]+\.[0-9]+", "-0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def _read(path: Path, kind: type[K]) -> Iterator[K]:
    for number, entry in enumerate(yaml.load(path.read_text(encoding="utf-8"), _Loader), 1):
        try:
            yield kind.model_validate(entry)
        except ValueError as error:
            raise ValueError(f"{path.name}, entry {number}: {error}") from error


def _names(draw: Draw, parameters: Mapping[str, KnownParameter]) -> dict[str, str]:
    """Draw a schema name for each parameter; all differ."""
    camel = draw.chance(0.1)
    found: dict[str, str] = {}
    for key, one in parameters.items():
        name = draw.choice(one.names) if one.names and draw.chance(0.8) else key
        name = joined(name.split("_"), "camel") if camel and "_" in name else name
        found[key] = key if name in found.values() else name
    return found if len(set(found.values())) == len(found) else {key: key for key in parameters}


def _described(draw: Draw, name: str, one: KnownParameter) -> dict[str, Any]:
    if one.about and draw.chance(0.6):
        return {**one.schema_, "description": draw.choice(one.about)}
    if draw.chance(0.5):
        return one.schema_
    words = spoken(name)
    return {**one.schema_, "description": draw.choice((f"The {words}.", f"{words.capitalize()}.", f"the {words}"))}


def _type(values: Any) -> str:
    kinds = {type(value) for value in values}
    return "string" if str in kinds else "number" if float in kinds else "integer"
