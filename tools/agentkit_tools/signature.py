"""Convert the signature of a typed Python function to a JSON schema (2020-12) and a pydantic model for the arguments.

Unsupported signatures are refused where the tool is defined; the error names the parameter and a remedy.
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typing_extensions
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from agentkit_tools.errors import ToolDefinitionError
from agentkit_tools.validation import SchemaProblemError, Validator

SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*$")
ENTRY = re.compile(r"\s+\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")  # `name: text` or `name (type): text`


@dataclass(frozen=True, slots=True)
class Signature:
    """The parts of a function's signature that a tool uses."""

    description: str  # the docstring's prose, without its sections
    parameters: dict[str, Any]  # JSON schema shown to the model
    validator: Validator  # for the same schema, but refuses unknown parameters
    model: type[BaseModel]  # parses arguments; field i is named `p{i}`, with the parameter's name as its alias
    names: tuple[str, ...]  # parameter names, in the order of the model's fields
    injected: tuple[str, ...]  # parameters that receive the `ToolContext`
    deps_types: tuple[type, ...]  # the class `Database` of a parameter annotated `ToolContext[Database]`
    defaults: Mapping[str, Callable[[], Any]]  # `Field(...)` defaults, which Python does not apply


def read_signature(fn: Callable[..., Any], *, name: str, injected_type: type) -> Signature:
    """Read the parameters of `fn` from its signature, annotations and docstring.

    Every parameter needs an annotation that JSON can represent. Parameters annotated `injected_type` or
    `injected_type[...]` and keyword arguments bound by `functools.partial` are left out of the schema. Descriptions
    come from `Annotated[T, "text"]`, `Field(description=...)` or the docstring's `Args:` section.

    Raises:
        ToolDefinitionError: the signature is unsupported; the message names the tool, the parameter and a remedy.
    """
    base = underlying(fn)
    description, documented = parse_docstring(inspect.getdoc(base) or "")
    scope, namespace = getattr(base, "__globals__", {}), _local_names(base)
    fields: dict[str, Any] = {}
    names: list[str] = []
    injected: list[str] = []
    deps_types: list[type] = []
    defaults: dict[str, Callable[[], Any]] = {}
    fixed = _fixed_names(fn)
    for parameter in _parameters(fn, name):
        if parameter.name in fixed:
            continue
        where = f"tool {name!r}, parameter {parameter.name!r}"
        annotation = _annotation(parameter, where, scope, namespace)
        if _asks_for(annotation, injected_type):
            injected.append(parameter.name)
            deps_types += _deps_types(annotation, injected_type)
            continue
        annotation = portable(annotation, where, namespace)
        field = f"p{len(names)}"
        fields[field], default = _field(parameter, annotation, documented.get(parameter.name), where)
        if default is not None:
            defaults[parameter.name] = default
        names.append(parameter.name)
    try:
        model: type[BaseModel] = create_model(
            "Arguments", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
        )
        schema = model.model_json_schema()
        parameters = {"type": "object", "properties": {}} | strip_noise(schema)
        validator = Validator(schema)
    except SchemaProblemError as error:
        raise ToolDefinitionError(f"tool {name!r}, parameters: {error}") from error
    except Exception as error:  # each parameter is valid, but not all of them together
        raise ToolDefinitionError(f"tool {name!r}: not all parameters are valid together ({error})") from error
    del parameters["additionalProperties"]  # only the validator needs it
    return Signature(
        description, parameters, validator, model, tuple(names), tuple(injected), tuple(deps_types), defaults
    )


def underlying(fn: Any) -> Any:
    """Return the `def` function below partials, decorators and `__call__`."""
    while True:
        inner = inspect.unwrap(fn.func if isinstance(fn, functools.partial) else fn)
        if not (inspect.isroutine(inner) or inspect.isclass(inner) or isinstance(inner, functools.partial)):
            inner = inner.__call__
        if inner is fn:
            return fn
        fn = inner


def _fixed_names(fn: Any) -> set[str]:
    """Return the keyword arguments bound by partials, including those below decorators; their values may be secrets."""
    names: set[str] = set()
    while isinstance(fn, functools.partial) or hasattr(fn, "__wrapped__"):
        if isinstance(fn, functools.partial):
            names |= fn.keywords.keys()
            fn = fn.func
        else:
            fn = fn.__wrapped__
    return names


def _parameters(fn: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (ValueError, TypeError) as error:  # some C functions
        raise ToolDefinitionError(
            f"tool {name!r}: {fn!r} has no signature; call it from a function with typed parameters"
        ) from error


def _local_names(fn: Callable[..., Any]) -> dict[str, Any]:
    """Return the local names visible to `fn`: its closure, and the functions and classes now defining it.

    String annotations need them, and all annotations are strings under `from __future__ import annotations`.
    """
    names: dict[str, Any] = {}
    qualname = getattr(fn, "__qualname__", "")
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        outer = frame.f_code.co_qualname + "."
        if frame.f_globals is getattr(fn, "__globals__", None) and qualname.startswith(outer):
            names = dict(frame.f_locals) | names
        frame = frame.f_back
    closure: tuple[types.CellType, ...] = getattr(fn, "__closure__", None) or ()
    for variable, cell in zip(fn.__code__.co_freevars if closure else (), closure, strict=True):
        try:
            names[variable] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return names


def _annotation(
    parameter: inspect.Parameter, where: str, scope: Mapping[str, Any], namespace: Mapping[str, Any]
) -> Any:
    """Resolve the annotation of one parameter; raise ToolDefinitionError if a tool cannot have such a parameter."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ToolDefinitionError(
            f"{where}: given {parameter}, expected a named parameter; declare each one "
            "(decorators must use functools.wraps)"
        )
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ToolDefinitionError(f"{where}: is positional-only, but arguments are passed by name; remove the '/'")
    if parameter.annotation is parameter.empty:
        hint = "; a method must be bound: pass `instance.method`" if parameter.name == "self" else ""
        raise ToolDefinitionError(f"{where}: has no type annotation; write for example `{parameter.name}: str`{hint}")
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        return typing.get_type_hints(holder, globalns=dict(scope), localns=dict(namespace), include_extras=True)[
            parameter.name
        ]
    except Exception as error:  # evaluating an annotation can raise anything
        raise ToolDefinitionError(
            f"{where}: annotation {parameter.annotation!r} cannot be resolved ({error}); "
            "define its type at module level and import it outside TYPE_CHECKING"
        ) from error


def _asks_for(annotation: Any, wanted: type) -> bool:
    """Return whether an annotation is `wanted`, `wanted[...]`, `Annotated[wanted, ...]` or `wanted | None`."""
    if annotation is wanted or typing.get_origin(annotation) is wanted:
        return True
    return any(_asks_for(part, wanted) for part in _parts(annotation) or ())


def _deps_types(annotation: Any, injected_type: type) -> list[type]:
    """Return the class in `injected_type[...]`, if `isinstance` can check values against it."""
    if typing.get_origin(annotation) is not injected_type:
        return [found for part in _parts(annotation) or () for found in _deps_types(part, injected_type)]
    (argument,) = typing.get_args(annotation)
    if argument is Any or not inspect.isclass(argument) or typing.is_typeddict(argument):
        return []
    return [] if getattr(argument, "_is_protocol", False) else [argument]


def _parts(annotation: Any) -> tuple[Any, ...] | None:
    """Return the members of a union or the type inside `Annotated`; None for other annotations."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return typing.get_args(annotation)[:1]
    return typing.get_args(annotation) if origin in (typing.Union, types.UnionType) else None


def portable(annotation: Any, where: str, namespace: Mapping[str, Any], inside: tuple[Any, ...] = ()) -> Any:
    """Replace each `typing.TypedDict` by a typing_extensions one, which pydantic needs before Python 3.12.

    TypedDicts inside dataclasses and models are left unchanged, and pydantic refuses them.

    Raises:
        ToolDefinitionError: a type has a JSON schema but cannot be read from JSON.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        for member in (item for item in arguments if isinstance(item, enum.Enum)):
            try:
                TypeAdapter(annotation).validate_json(json.dumps(member.value))
            except (ValidationError, TypeError):
                raise ToolDefinitionError(
                    f"{where}: Literal[{member}] cannot be read from JSON; write its value, or the whole Enum"
                ) from None
        return annotation
    if origin is type or annotation is type:
        raise ToolDefinitionError(f"{where}: type {annotation!r} has no JSON schema; use a name, as in Literal[...]")
    if sys.version_info < (3, 12) and typing.is_typeddict(annotation) and type(annotation).__module__ == "typing":
        if annotation in inside:
            raise ToolDefinitionError(
                f"{where}: TypedDict {annotation.__name__!r} contains itself; "
                "import TypedDict from typing_extensions, or use a pydantic model"
            )
        try:
            hints = typing.get_type_hints(annotation, localns=dict(namespace), include_extras=True)
        except NameError as error:
            raise ToolDefinitionError(
                f"{where}: TypedDict {annotation.__name__!r} cannot be resolved ({error}); define it at module level"
            ) from error
        keys: dict[str, Any] = {}
        for key, hint in hints.items():
            qualifier = typing.get_origin(hint)
            if qualifier in (typing.Required, typing.NotRequired):
                hint = typing.get_args(hint)[0]
            elif key in annotation.__required_keys__:
                qualifier = typing.Required
            else:
                qualifier = typing.NotRequired
            keys[key] = qualifier[portable(hint, where, namespace, (*inside, annotation))]
        make: Any = typing_extensions.TypedDict
        made = make(annotation.__name__, keys)
        made.__doc__ = annotation.__doc__
        return made
    if not arguments or any(isinstance(argument, list) for argument in arguments):  # Callable[[...], ...]
        return annotation
    if origin is typing.Final:
        return portable(arguments[0], where, namespace, inside)
    if origin is Annotated:
        inner = portable(annotation.__origin__, where, namespace, inside)
        return annotation if inner is annotation.__origin__ else Annotated[(inner, *annotation.__metadata__)]
    converted = tuple(portable(argument, where, namespace, inside) for argument in arguments)
    if all(new is old for new, old in zip(converted, arguments, strict=True)):
        return annotation
    if _parts(annotation) is not None:
        return typing.Union[converted]  # noqa: UP007
    assert origin is not None  # it has arguments
    return origin[converted]


def _field(
    parameter: inspect.Parameter, annotation: Any, documented: str | None, where: str
) -> tuple[tuple[Any, FieldInfo], Callable[[], Any] | None]:
    """Return one parameter as a pydantic field, and its default factory if Python does not apply the default.

    Type and default are checked here, so that errors name the parameter.
    """
    default, written = parameter.default, annotation
    if isinstance(default, FieldInfo):
        annotation, default = Annotated[annotation, default], parameter.empty
    metadata = getattr(annotation, "__metadata__", ())
    infos = [item for item in metadata if isinstance(item, FieldInfo)]
    if any(info.alias or info.validation_alias for info in infos):
        raise ToolDefinitionError(f"{where}: Field(alias=...) is not supported; rename the parameter instead")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        adapter.json_schema()
    except Exception as error:  # custom types can raise anything while building a schema
        raise ToolDefinitionError(
            f"{where}: type {written!r} has no JSON schema; use str, int, float, bool, list, dict, Literal, "
            f"an Enum, a dataclass or a pydantic model ({_first_line(error)})"
        ) from error
    told = next((item for item in metadata if isinstance(item, str)), None)
    described = any(info.description for info in infos)
    description = None if described else told or documented
    options: dict[str, Any] = {"alias": parameter.name} | ({"description": description} if description else {})
    given = next((info for info in reversed(infos) if not info.is_required()), None)
    supplied: Callable[[], Any] | None = None
    if default is parameter.empty and given is not None:
        supplied = functools.partial(given.get_default, call_default_factory=True)
        try:
            default = supplied()
        except Exception as error:
            raise ToolDefinitionError(
                f"{where}: its default_factory fails ({_first_line(error)}); expected a function without arguments"
            ) from error
    if default is parameter.empty:
        return (annotation, typing.cast(FieldInfo, Field(**options))), None
    if not _fits(adapter, default):
        hint = f"write `{parameter.name}: ... | None = None`" if default is None else "change one of them"
        raise ToolDefinitionError(f"{where}: default {default!r} does not fit its type {written!r}; {hint}")
    if given is None or given.default_factory is None:
        shown = {"default": default} if _is_json(adapter, default) else {"default_factory": _nothing}
        options |= shown
    return (annotation, typing.cast(FieldInfo, Field(**options))), supplied


def _nothing() -> None:
    """Pydantic default of a parameter whose default is not JSON; Python applies the real one."""


def _fits(adapter: TypeAdapter[Any], default: Any) -> bool:
    try:
        adapter.validate_python(default, strict=True)
    except (ValidationError, ValueError, TypeError):
        return False
    return True


def _is_json(adapter: TypeAdapter[Any], value: Any) -> bool:
    """Return whether the value can be written as JSON, so that the schema can show it as the default."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            json.dumps(adapter.dump_python(value, mode="json"), allow_nan=False)
    except (ValueError, TypeError, UserWarning):
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into its prose and the descriptions in its `Args:` section (Google style)."""
    prose: list[str] = []
    arguments: dict[str, str] = {}
    section = current = ""
    indent = 0
    for line in text.splitlines():
        if heading := SECTION.match(line):
            section, current, indent = heading[1], "", 0
        elif not section or (line and not line[0].isspace()):
            section = ""
            prose.append(line.rstrip())
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            if depth == indent and (entry := ENTRY.match(line)):
                current = entry[1]
                arguments[current] = entry[2].strip()
            elif current:
                arguments[current] = f"{arguments[current]} {line.strip()}".strip()
    return "\n".join(prose).strip(), arguments


def strip_noise(schema: Any) -> Any:
    """Remove titles and OpenAPI discriminators, which pydantic adds and models do not need."""
    if isinstance(schema, list):
        return [strip_noise(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    short: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("title", "discriminator"):
            continue
        if key in ("properties", "patternProperties", "$defs"):
            short[key] = {name: strip_noise(item) for name, item in value.items()}
        else:
            short[key] = value if key in ("default", "const", "enum", "examples") else strip_noise(value)
    return short
