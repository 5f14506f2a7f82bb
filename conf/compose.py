"""From a stage and overrides to a checked config: Hydra composes, the schema checks the whole tree, all problems at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from ..errors import ConfigError, UserError, nearest
from .conflicts import conflicts
from .nodes import Node
from .overrides import ROOT, Sorted, say_hydra, sort_overrides
from .schema import FILLED, SCHEMAS
from .signature import check_components, say

TRAINING = ("tokenizer", "generator", "classifier", "distill", "diffusion", "dd2")
"""Stages of `tokar train`."""

NEUTRAL = (
    "name", "paths", "logger", "loop.log_every", "loop.keep", "loop.keep_every", "loop.save_async", "loop.accumulate",
    "data.source", "data.path", "data.workers", "data.decoder", "data.prepare_size", "resume_from", "guard.hang_after",
    "profile",
    *(f"strategy.{key}" for key in ("name", "devices", "nodes", "accelerator", "recompute", "channels_last", "offload",
                                    "reshard", "persistent", "bucket_mib", "backend", "timeout", "threads")),
)  # fmt: skip
"""Keys that do not change what a run computes: they neither name its folder nor forbid to resume it."""


@dataclass(frozen=True)
class Composed:
    """A checked config: typed for code, plain for files."""

    typed: Any
    plain: dict[str, Any]
    overrides: tuple[str, ...]

    def yaml(self) -> str:
        """The resolved config as YAML."""
        return str(OmegaConf.to_yaml(OmegaConf.create(self.plain)))


def compose(stage: str, overrides: Sequence[str]) -> Composed:
    """Compose and check the config of `stage`.

    Raises:
        ConfigError: every problem, one line each.
    """
    plain, found = unchecked(stage, overrides)
    try:
        return check(stage, plain, found.canonical, found.problems)
    except ConfigError as error:
        if found.group_refused:  # what the refused option would have set is not missing
            raise ConfigError([line for line in error.lines if ": missing; " not in line]) from None
        raise


def unchecked(stage: str, overrides: Sequence[str]) -> tuple[dict[str, Any], Sorted]:
    """The composed config of `stage` before the schema sees it, and what became of the overrides.

    Raises:
        ConfigError: Hydra cannot compose it.
    """
    if stage not in SCHEMAS:
        raise UserError("no such stage", where=stage, fix=nearest(stage, SCHEMAS))
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(ROOT), version_base=None):
        found = sort_overrides(overrides, stage, GlobalHydra.instance().config_loader())
        plain = _compose(stage, found)
    for key in found.emptied:
        _set(plain, key.split("."), None)
    return plain, found


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def check(stage: str, plain: dict[str, Any], overrides: Sequence[str] = (), problems: Sequence[str] = ()) -> Composed:
    """Check plain containers against the schema of `stage`.

    Raises:
        ConfigError: every problem, those in `problems` first.
    """
    found = list(problems)
    if plain.get("stage") != stage:
        raise ConfigError([*found, f"stage: is {plain.get('stage')!r} here, not {stage!r}; leave it to the command"])
    found += _missing(plain)
    typed = None
    try:
        typed = SCHEMAS[stage].model_validate(plain)
    except ValidationError as error:
        found += _schema_problems(error, SCHEMAS[stage])
    found += check_components(plain, FILLED.get(stage, frozenset()))
    if typed is not None:
        found += conflicts(typed)
    if found or typed is None:
        raise ConfigError(found)
    return Composed(typed, plain, tuple(overrides))


@functools.cache  # an explanation asks for each key
def groups() -> dict[str, list[str]]:
    """Config groups and their options, e.g. `{"experiment": ["digits_vqgan", …]}`."""
    found: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("*/**/*.yaml")):
        relative = path.relative_to(ROOT)
        found.setdefault(relative.parent.as_posix(), []).append(relative.stem)
    return found


def _compose(stage: str, found: Sorted) -> dict[str, Any]:
    try:
        config = hydra_compose(config_name=root_config(stage), overrides=found.usable)
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        own = [group for group in groups() if group.partition("/")[0] in SCHEMAS[stage].model_fields]
        raise ConfigError([*found.problems, say_hydra(error, stage, own)]) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def root_config(stage: str) -> str:
    """Name of the YAML file that a stage's config starts from."""
    return f"train_{stage}" if stage in TRAINING else stage


def _missing(plain: Mapping[str, Any]) -> list[str]:
    return [f"{path}: missing; give it a value with {path}=…" for path, value in flatten(plain).items() if value == "???"]


def _schema_problems(error: ValidationError, schema: type[Node]) -> Iterator[str]:
    seen: set[str] = set()
    for item in error.errors():
        location = [part for part in item["loc"] if not _is_union_branch(part)]
        path = ".".join(str(part) for part in location)
        if path in seen:
            continue
        seen.add(path)
        if item["type"] == "extra_forbidden":
            yield f"{path}: no such key; {nearest(str(location[-1]), _fields(schema, location[:-1]))}"
        elif item["input"] == "???":
            continue  # told already, together with those that any text would satisfy
        elif item["type"] == "missing" and isinstance(location[-1], int):
            yield f"{'.'.join(map(str, location[:-1]))}: too few values; give at least {location[-1] + 1}"
        elif item["type"] == "too_short":
            yield f"{path}: must not be empty; give a value, or leave it out"
        elif item["type"] == "missing":
            yield f"{path}: missing; give it a value with {path}=…"
        else:
            yield f"{path}: {say(item, item['input'])}"


def _is_union_branch(part: int | str) -> bool:
    """Pydantic adds the name of each branch of a union to the location."""
    return isinstance(part, str) and (part in {"float", "int", "str", "bool"} or "[" in part or part.startswith("function-"))


def _fields(schema: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Valid names at `location` of the schema."""
    for part in location:
        field = schema.model_fields.get(str(part))
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return []
        schema = inner
    return list(schema.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is Union or get_args(annotation):
        return next((model for model in map(_model_in, get_args(annotation)) if model), None)
    return None


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and leaf values of a config."""
    leaves: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], named: Sequence[str] = ()) -> list[str]:
    """Keys that change what a run computes and differ, as `key: old → new`.

    A key that only the newer config has came with a newer version, whose default is what the older one did: it counts
    only when the user named it.

    Args:
        mine: the config now.
        theirs: the config of the run as it was made.
        named: keys and groups that the user's overrides set.
    """
    new, old = flatten(mine), flatten(theirs)
    known = [key for key in new if any(_related(key, other) for other in old) or any(_related(key, name) for name in named)]
    keys = [key for key in sorted(set(known) | old.keys()) if not is_neutral(key)]
    return [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in keys if new.get(key) != old.get(key)]


def _related(key: str, other: str) -> bool:
    """Equal, or one lies below the other."""
    return key == other or key.startswith(other + ".") or other.startswith(key + ".")


def is_neutral(key: str) -> bool:
    """The key does not change what a run computes."""
    return any(key == name or key.startswith(name + ".") for name in NEUTRAL)
