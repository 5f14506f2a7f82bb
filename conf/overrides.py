"""Overrides as users write them: read, refused with a remedy, or put in the form that Hydra takes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ..errors import UserError, nearest

ROOT = Path(__file__).resolve().parent
_GRAMMAR = frozenset(",[]{}()'\"\\")
"""Characters with a meaning in Hydra's values; a value without them that Hydra cannot read is meant as text."""


@dataclass
class Sorted:
    """What became of a command's overrides.

    Args:
        usable: for Hydra. Values are forced in (`++`), so that Hydra does not stop at the first unknown key: the schema
            then names them all.
        emptied: dotted keys of groups to leave out (`discriminator=null`).
        canonical: one spelling for each, whatever way it was written.
        problems: one line for each that cannot be used.
        group_refused: keys may be missing because an option of a group was refused.
    """

    usable: list[str] = field(default_factory=list)
    emptied: list[str] = field(default_factory=list)
    canonical: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    group_refused: bool = False


def sort_overrides(overrides: Sequence[str], stage: str, loader: ConfigLoader) -> Sorted:
    """Read every override of `stage`; nothing is raised, problems are collected."""
    found = Sorted()
    for text in overrides:
        try:
            override = parse_override(text, loader)
        except UserError as error:
            found.problems += error.lines
            continue
        group = bool(_options(loader, override.key_or_group))
        problem = _problem(override, text, loader) or _experiment_problem(override, stage)
        if problem:
            found.problems.append(problem)
            found.group_refused |= group
            continue
        found.canonical.append(canonical(override))
        if group and override.value() is None and not override.is_delete():
            found.emptied.append(override.package or override.key_or_group.replace("/", "."))
        else:
            found.usable.append(for_hydra(override, loader))
    return found


def parse_override(text: str, loader: ConfigLoader) -> Override:
    """Read one override. A value that Hydra's grammar has no place for (a path with `=` or `~`) is taken as text.

    Raises:
        UserError: it is none.
    """
    parser = OverridesParser.create(config_loader=loader)
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        raise UserError("not an override", where=text, fix="write key=value")
    plain = key.strip() and not _GRAMMAR & set(value)
    for candidate in [text, f"{key}='{value}'"] if plain else [text]:
        try:
            override = parser.parse_override(candidate)
        except HydraException:
            continue
        if override.key_or_group:
            return override
    fix = f"quote it: \"{key}='…'\"" if re.fullmatch(r"[~+]*[\w@/.$]+", key) else "write key=value"
    raise UserError("cannot be read", where=text, fix=fix)


def for_hydra(override: Override, loader: ConfigLoader) -> str:
    """The text that makes Hydra take an override without complaint: groups by their name alone, values by force."""
    text = str(override.input_line).lstrip("+")
    if override.is_delete() or is_hydras(override.key_or_group) or _is_choice(override, loader):
        return text
    return f"++{text}"


def canonical(override: Override) -> str:
    """One spelling of an override: `+optim.lr=1e-3` and `optim.lr=0.001` are the same."""
    value = override.value()
    sign = "~" if override.is_delete() else ""
    place = f"{override.key_or_group}@{override.package}" if override.package else override.key_or_group
    if override.is_delete() and value is None:
        return f"{sign}{place}"
    return f"{sign}{place}={value if isinstance(value, str) else override.get_value_element_as_str()}"


def quoted(key: str, text: str) -> str:
    """The override that gives `key` a text whatever its characters, in Hydra's grammar."""
    if re.fullmatch(r"(?=.*[/_-])[A-Za-z_./][\w./=~+-]*", text):  # nothing that could be read as a number, null or true
        return f"{key}={text}"
    # a backslash means itself there, except before a quote
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
    return f"{key}='{escaped}'"


def is_hydras(key: str) -> bool:
    """A key of Hydra itself: where a sweep runs and what makes its points."""
    return re.match(r"hydra[./]", key) is not None


def _options(loader: ConfigLoader, key: str) -> list[str]:
    """Options of a group, none for a key of another kind. Hydra, which copies all its sources for each answer, is asked for
    its own groups alone."""
    if is_hydras(key):
        return list(loader.get_group_options(key))
    return sorted(path.stem for path in (ROOT / key).glob("*.yaml")) if os.path.isdir(ROOT / key) else []


def _is_choice(override: Override, loader: ConfigLoader) -> bool:
    """It names an option of a group, or several to sweep over, rather than changing keys of one."""
    return bool(_options(loader, override.key_or_group)) and not isinstance(override.value(), dict)


def _problem(override: Override, text: str, loader: ConfigLoader) -> str | None:
    key, value = override.key_or_group, override.value()
    if is_hydras(key):
        return f"{text}: only sweeps take keys of Hydra; add --multirun or leave it out"
    if override.is_sweep_override():
        return f"{text}: several values; add --multirun or quote the value"
    options = _options(loader, key)
    if _is_choice(override, loader) and value is not None and value not in options and not override.is_delete():
        return f"{key}={value}: no such option; {nearest(str(value), options)}"
    return None


def _experiment_problem(override: Override, stage: str) -> str | None:
    """An experiment of another stage, told before its groups fail to fit."""
    if override.key_or_group != "experiment" or not isinstance(name := override.value(), str):
        return None
    own = OmegaConf.select(OmegaConf.load(ROOT / "experiment" / f"{name}.yaml"), "stage")
    if own == stage:
        return None
    return f"experiment={name}: is for the stage {own!r}, not {stage!r}; run `tokar train {own} experiment={name}`"


def say_hydra(error: Exception, config_name: str, choices: Sequence[str]) -> str:
    """An error of Hydra or OmegaConf as one line: what, where, what to do.

    Args:
        error: while composing.
        config_name: of the root file.
        choices: groups that there are.
    """
    text = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
    for pattern, answer in _SAYINGS:
        if found := re.search(pattern, text):
            return answer.format(*found.groups(), near=nearest(found.group(1), choices))
    return f"{config_name}: {text}"


_SAYINGS: tuple[tuple[str, Any], ...] = (
    (r"Could not override '([^']+)'", "{0}: no such group in this command; {near}"),
    (r"Could not delete from config\. '([^']+)' does not exist", "~{0}: no such key; nothing to delete, leave it out"),
    (r"Could not delete from config\. The value of '([^']+)' is (.*) and not", "~{0}: its value is {1}; delete it with ~{0}"),
    (r"Could not delete '([^']+)'", "~{0}: no such group in this command; leave it out"),
    (r"^(?:\w+ raised while resolving interpolation: )?(.*?) full_key: (\S+)", "{1}: {0}; correct the ${{…}} or give a value"),
)
