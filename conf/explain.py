"""What there is to configure: every key of a stage with its type, its value and what it means."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ..errors import ConfigError
from .compose import groups, unchecked
from .nodes import Length, Node, Varying
from .schema import SCHEMAS
from .signature import NoTargetError, parameters

_ALIASES = {Length: "duration", Varying: "number or schedule", None: "null", type(None): "null", str: "text", Any: "any"}
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


@dataclass(frozen=True)
class Key:
    """A dotted key of a stage.

    Args:
        path: e.g. `optim.lr`.
        kind: its type, in users' words.
        value: in the composed config.
        about: what it means; empty when its name says it.
        options: values or group options to choose from.
    """

    path: str
    kind: str
    value: str
    about: str = ""
    options: tuple[str, ...] = ()


def keys(stage: str, overrides: Sequence[str] = ()) -> list[Key]:
    """Every key of `stage`, constructor arguments of its components included.

    Raises:
        ConfigError: the overrides cannot be used.
    """
    plain, found = unchecked(stage, overrides)
    if found.problems:
        raise ConfigError(found.problems)
    return list(_walk(SCHEMAS[stage], plain, ""))


def explain(stage: str, overrides: Sequence[str] = ()) -> list[str]:
    """The keys of `stage` as aligned lines."""
    rows = [(key.path, key.kind, key.value, _about(key)) for key in keys(stage, overrides)]
    widths = [min(48, max(len(row[column]) for row in rows)) for column in range(3)]
    return ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]


def _about(key: Key) -> str:
    group = f"conf/{key.path.replace('.', '/')}: {', '.join(key.options)}" if key.options and "group" in key.kind else ""
    return "; ".join(part.rstrip(".") for part in (key.about, group) if part)


def _walk(schema: type[Node], values: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    for name, field in schema.model_fields.items():
        path, value = prefix + name, values.get(name, _default(field))
        inner = _model(field.annotation)
        options = tuple(groups().get(path.replace(".", "/"), ()))
        if inner is not None:
            yield Key(path, "group", "" if isinstance(value, Mapping) else _say(value), inner.__doc__ or "", options)
            yield from _walk(inner, value if isinstance(value, Mapping) else {}, f"{path}.")
        elif isinstance(value, Mapping) and "_target_" in value:
            yield from _walk_component(path, value, options)
        else:
            yield Key(path, kind(field.annotation, field.metadata), _say(value), field.description or "", _choices(field))


def _walk_component(path: str, node: Mapping[str, Any], options: tuple[str, ...]) -> Iterator[Key]:
    target = str(node["_target_"])
    yield Key(path, "group", target.rpartition(".")[2], "", options)
    try:
        expected = parameters(target) or {}
    except NoTargetError:
        expected = {}
    for name, parameter in expected.items():
        value = node.get(name, parameter.default)
        if isinstance(value, Mapping) and "_target_" in value:
            inner = f"{path}.{name}"
            yield from _walk_component(inner, value, tuple(groups().get(inner.replace(".", "/"), ())))
        else:
            shown = "" if value is None and parameter.required else _say(value)
            yield Key(f"{path}.{name}", parameter.annotation, shown, parameter.about)


def _default(field: FieldInfo) -> Any:
    return "???" if field.is_required() else field.get_default(call_default_factory=True)


def _say(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_say, value))}]"
    return {"None": "null", "True": "true", "False": "false", "???": "(missing)"}.get(str(value), str(value))


def _model(annotation: Any) -> type[Node] | None:
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model(part))), None)


def kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in users' words: `float > 0`, `cosine | wsd`, `duration | null`."""
    if _alias(annotation, metadata) in _ALIASES:
        return _ALIASES[_alias(annotation, metadata)]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(parts[0], parts[1:])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(map(kind, parts))
    if origin in (list, tuple):
        return f"list of {kind(parts[0])}"
    bounds = [f"{sign} {getattr(item, name)}" for item in metadata for name, sign in _BOUNDS.items() if hasattr(item, name)]
    name = _ALIASES.get(annotation) or getattr(annotation, "__name__", str(annotation))
    return " ".join([str(name), *bounds])


def _alias(annotation: Any, metadata: Sequence[Any]) -> Any:
    """The alias that pydantic has taken apart into type and metadata, put together again."""
    return Annotated[annotation, *metadata] if metadata and get_origin(annotation) is not Annotated else annotation


def _choices(field: FieldInfo) -> tuple[str, ...]:
    parts = [field.annotation, *get_args(field.annotation)]
    named = [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return tuple(named) or (("true", "false") if field.annotation is bool else ())


def highlight(text: str) -> str:
    """YAML with colours when the standard output is a terminal."""
    if not sys.stdout.isatty():
        return text
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console()
    with console.capture() as captured:
        console.print(Syntax(text, "yaml", background_color="default"), soft_wrap=True)
    return captured.get()
