"""Checks a `_target_` node against the constructor it names, without importing it.

The signature is the schema: argument names, types and ranges are read from the source by `ast`, so that a config error
answers before torch is imported. Only targets inside tokar are read; others are checked when they are built.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .. import ranges
from ..errors import nearest

ROOT = Path(__file__).resolve().parents[1]
_NAMES: dict[str, Any] = {
    "int": int, "float": float, "bool": bool, "str": str, "None": None, "tuple": tuple, "list": list, "dict": dict,
    "Literal": Literal, "Sequence": Sequence, "Mapping": Mapping, "Any": Any,
    **{name: value for name, value in vars(ranges).items() if name[0].isupper()},
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor, with its type and default as the source writes them and what its docstring says.

    `adapter` is `None` where the annotation names a built object.
    """

    name: str
    adapter: TypeAdapter[Any] | None
    annotation: str
    default: str | None
    about: str = ""

    @property
    def required(self) -> bool:
        """There is no default."""
        return self.default is None


class NoTargetError(LookupError):
    """The `_target_` names nothing in tokar."""


def parameters(target: str) -> dict[str, Parameter] | None:
    """Arguments of the class or function `tokar.package.module.Name`; `None` when it lies outside tokar.

    Raises:
        NoTargetError: there is no such module or name; the message holds a hint.
    """
    return _parameters(target) if target.startswith("tokar.") else None


@functools.cache
def _parameters(target: str) -> dict[str, Parameter]:
    module, _, name = target.removeprefix("tokar.").rpartition(".")
    folder = ROOT.joinpath(*module.split("."))
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    if not path.is_file():
        modules = [file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in ROOT.glob("models/**/*.py")]
        raise NoTargetError(
            f"no module {'tokar.' + module!r}; {nearest('tokar.' + module, [f'tokar.{name}' for name in modules])}"
        )
    body = ast.parse(path.read_text()).body
    definitions = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    lent = {  # by a package, under its own name
        alias.name: f"tokar.{module}.{node.module}.{alias.name}"
        for node in body if isinstance(node, ast.ImportFrom) and node.level == 1 and folder.is_dir()
        for alias in node.names
    }  # fmt: skip
    if name in lent:
        return _parameters(lent[name])
    if name not in definitions:
        raise NoTargetError(f"no {name!r} in tokar.{module}; {nearest(name, [*definitions, *lent])}")
    node = definitions[name]
    described = _described(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not inits:
            return {}
        node = inits[0]
        described |= _described(ast.get_docstring(node) or "")
    return {item.name: replace(item, about=described.get(item.name, "")) for item in _read_arguments(node.args)}


def _described(docstring: str) -> dict[str, str]:
    """What the `Args:` of a docstring say of each argument."""
    section = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE) if section else []
    return {name: " ".join(text.split()) for name, text in entries}


def _read_arguments(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [argument for argument in arguments.args if argument.arg != "self"]
    undefaulted: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults = [*undefaulted, *arguments.defaults, *arguments.kw_defaults]
    for argument, default in zip([*positional, *arguments.kwonlyargs], defaults, strict=True):
        annotation = ast.unparse(argument.annotation) if argument.annotation else "Any"
        yield Parameter(argument.arg, _adapter(argument.annotation), annotation, ast.unparse(default) if default else None)


def _adapter(annotation: ast.expr | None) -> TypeAdapter[Any] | None:
    if annotation is None:
        return None
    try:
        evaluated = eval(compile(ast.Expression(annotation), "<annotation>", "eval"), {"__builtins__": {}}, _NAMES)
    except (NameError, AttributeError, TypeError):
        return None  # names an object (nn.Module, …) that the builder makes from a nested node
    return TypeAdapter(evaluated, config=ConfigDict(strict=False))


def check_components(tree: Any, filled: frozenset[str] = frozenset(), path: str = "") -> Iterator[str]:
    """Problems of every `_target_` node below `tree`, one line each, dotted path first.

    Args:
        tree: the config as plain containers.
        filled: argument names that a stage fills in by itself, so they need not be given.
        path: dotted path of `tree`.
    """
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            yield from _check_node(tree, filled, path)
        for key, value in tree.items():
            yield from check_components(value, filled, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from check_components(value, filled, f"{path}[{index}]")


def _check_node(node: Mapping[str, Any], filled: frozenset[str], path: str) -> Iterator[str]:
    try:
        expected = parameters(str(node["_target_"]))
    except NoTargetError as error:
        yield f"{path}._target_: {error}"
        return
    if expected is None:
        return
    given = {key: value for key, value in node.items() if key != "_target_"}
    for key, value in given.items():
        if key not in expected:
            yield f"{path}.{key}: no such key; {nearest(key, expected)}"
        else:
            yield from _check_value(expected[key], value, f"{path}.{key}")
    for key, parameter in expected.items():
        if parameter.required and key not in given and key not in filled:
            yield f"{path}.{key}: missing; {node['_target_'].rpartition('.')[2]} needs it"


def _check_value(parameter: Parameter, value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping) and "_target_" in value:
        return
    if parameter.adapter is None:
        if isinstance(value, int | float | str) or (value is None and "None" not in parameter.annotation):
            yield f"{path}: must be a component, not {value!r}; choose an option of its group, or give a _target_"
        return
    if value == "???":
        return  # missing, which is told with all the others
    try:
        parameter.adapter.validate_python(value)
    except ValidationError as error:
        yield f"{path}: {say(error.errors()[0], value)}"


def say(error: Mapping[str, Any], value: Any) -> str:
    """One clause for a pydantic error."""
    kind, message = str(error["type"]), str(error["msg"])
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    wanted = next(
        (words for start, words in _WANTED.items() if kind.startswith(start)), message.removeprefix("Input should be ")
    )
    return f"must be {wanted}, not {value!r}"


_WANTED = {
    "int_": "a whole number", "float_": "a number", "bool_": "true or false", "string_": "text",
    "dict_": "a group of keys", "model_": "a group of keys", "list_": "a list", "tuple_": "a list",
}  # fmt: skip
"""What users call the types, by the beginning of pydantic's error type."""
