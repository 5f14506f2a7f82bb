"""What overrides with several values span: lists, ranges and intervals of Hydra's grammar as dimensions, and their points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from ..errors import ConfigError, UserError
from .compose import Composed, compose
from .overrides import ROOT, is_hydras, parse_override

DIGITS = 4
"""Significant digits of a number that is drawn: enough for any search, and run folders stay readable."""


@dataclass(frozen=True)
class Dimension:
    """A key with several values.

    Args:
        key: as written, with a sign and a package where there are some.
        values: texts in Hydra's grammar; empty for an interval.
        low, high: ends of an interval, both included.
        log: the interval is even in the logarithm.
        integer: the interval holds whole numbers only.
        ordered: the values are whole numbers in even steps.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    ordered: bool = False

    def override(self, value: str | float) -> str:
        """The override that gives the key one of its values, a number of an interval with `DIGITS` digits."""
        if isinstance(value, str):
            return f"{self.key}={value}"
        if self.integer or self.ordered:
            return f"{self.key}={round(value)}"
        return f"{self.key}={min(self.high, max(self.low, float(f'{value:.{DIGITS}g}')))}"

    def at(self, share: float) -> str:
        """The override at a share in [0, 1) of the dimension."""
        if self.values:
            return self.override(self.values[int(share * len(self.values))])
        low, high = (self.low, self.high + 1) if self.integer else (self.low, self.high)
        value = math.exp(math.log(low) + share * math.log(high / low)) if self.log else low + share * (high - low)
        return self.override(min(self.high, math.floor(value)) if self.integer else value)

    @property
    def corners(self) -> list[str]:
        """Every value, or both ends of an interval, which stand for all between."""
        if self.values:
            return [self.override(value) for value in self.values]
        return [self.override(end) for end in (self.low, self.high)]


def split_space(overrides: Sequence[str]) -> tuple[list[str], list[Dimension]]:
    """Overrides with one value, as they were written, and those with several.

    An override that cannot be read counts as one with one value: whoever composes with it tells.

    Raises:
        ConfigError: an interval that holds nothing, or keys of Hydra itself.
    """
    fixed, dimensions, problems = [], [], []
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(ROOT), version_base=None):
        loader = GlobalHydra.instance().config_loader()
        for text in overrides:
            try:
                found = _dimension(text, loader)
            except UserError as error:
                problems += error.lines
                continue
            if found is None:
                fixed.append(text)
            else:
                dimensions.append(found)
    if problems:
        raise ConfigError(problems)
    return fixed, dimensions


def _dimension(text: str, loader: ConfigLoader) -> Dimension | None:
    try:
        override = parse_override(text, loader)
    except UserError:
        return None
    if is_hydras(override.key_or_group):
        raise UserError("a key of Hydra", where=text, fix="use it with `tokar train … --multirun`, or leave it out")
    return dimension(override, loader, text) if override.is_sweep_override() else None


def dimension(override: Override, loader: ConfigLoader, text: str) -> Dimension:
    """The dimension that an override with several values spans.

    Raises:
        UserError: it holds nothing, or its logarithm does not exist.
    """
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return _interval(key, value, text)
    override.config_loader = loader  # what glob(…) asks for the options of a group
    try:
        values = tuple(override.sweep_string_iterator())
    except HydraException as error:
        raise UserError(" ".join(str(error).split()), where=text, fix="list the values") from error
    if not values:
        raise UserError("no values", where=text, fix="list some, or leave it out")
    ordered = isinstance(value, RangeSweep) and not value.shuffle and all(_is_whole(each) for each in values)
    return Dimension(key, values, ordered=ordered and len(values) > 1)


def _is_whole(text: str) -> bool:
    return text.lstrip("-").isdigit()


def _interval(key: str, value: IntervalSweep, text: str) -> Dimension:
    low, high = value.start, value.end
    if low is None or high is None or not low < high:
        raise UserError("the interval is empty", where=text, fix="write the lower end first: interval(1e-4,1e-2)")
    log = "log" in value.tags
    if log and low <= 0:
        raise UserError("a logarithmic interval begins above 0", where=text, fix="raise its lower end, or leave out tag(log,…)")
    return Dimension(key, (), low, high, log, isinstance(low, int) and isinstance(high, int))


def beside_the_first(dimensions: Sequence[Dimension]) -> list[list[str]]:
    """Points that show each value once: every corner of a dimension beside the first corners of the others."""
    corners = [each.corners for each in dimensions]
    first = [each[0] for each in corners]
    return [first] + [[*first[:i], text, *first[i + 1 :]] for i, each in enumerate(corners) for text in each[1:]]


def compose_all(
    stage: str, points: Iterable[Sequence[str]], advance: Callable[[int], Any] = lambda count: None
) -> list[Composed]:
    """Compose and check many points.

    Args:
        stage: whose config they change.
        points: the overrides of each.
        advance: called with 1 after each.

    Raises:
        ConfigError: the problems of all points, each once.
    """
    composed: list[Composed] = []
    problems: dict[str, None] = {}
    for point in points:
        try:
            composed.append(compose(stage, point))
        except ConfigError as error:
            problems |= dict.fromkeys(error.lines)
        advance(1)
    if problems:
        raise ConfigError(list(problems))
    return composed
