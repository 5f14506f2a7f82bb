"""Opens models by what they are: a tokenizer, or a generator with the tokenizer of its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..errors import UserError
from .build import CONFIG_NAME, load_model, locate_model, model_facts, model_node, resolve_target, weights_hash
from .convert.files import read_published
from .distill.distilled import Distilled
from .generators.base import Generator
from .samplers.guidance import Varying, check_guidance
from .tokenizers.base import Tokenizer

ITS_TOKENIZER = "tokenizer"
"""In the model folder of a generator or a student that is to travel: the model folder of its tokenizer."""


class Opened(NamedTuple):
    """A model in eval mode, what lies beside its weights (`classes`, `layout`, …), and its node."""

    model: nn.Module
    facts: dict[str, Any]
    node: dict[str, Any]


def open_model(path: Path, *, ema: bool = True, family: str | None = None, config: Mapping[str, Any] | None = None) -> Opened:
    """Whatever model lies at `path`.

    Args:
        path: a run, a checkpoint, an exported model, or the checkpoint file of a published one (see `convert`).
        ema: prefer averaged weights.
        family: of a published one, where its keys fit several.
        config: of a published one, what its weights do not tell (see `convert.files.read_published`).

    Raises:
        UserError: no model there, or its files are broken.
    """
    if path.is_file():
        published = read_published(path, family, config)
        return Opened(published.model(), {"family": published.family.name}, published.node)
    folder = locate_model(path)
    model, facts = load_model(folder, ema=ema), model_facts(folder)
    if (folder / ITS_TOKENIZER / CONFIG_NAME).is_file():
        facts["tokenizer"] = {**(facts.get("tokenizer") or {}), "path": str(folder / ITS_TOKENIZER)}
    return Opened(model, facts, model_node(folder))


def open_tokenizer(path: Path, *, ema: bool = True, expected_hash: str | None = None) -> Tokenizer:
    """The tokenizer of a run, a checkpoint or an exported model, in eval mode.

    Args:
        path: where it lies.
        ema: prefer averaged weights.
        expected_hash: of the weights whose codes are to be decoded.

    Raises:
        UserError: no model there, no tokenizer, or not the one expected.
    """
    model = open_model(path, ema=ema).model
    if not isinstance(model, Tokenizer):
        raise UserError(f"holds a {type(model).__name__}, not a tokenizer", where=path, fix="point at a tokenizer run")
    if expected_hash is not None and weights_hash(model) != expected_hash:
        raise UserError(
            "is not the tokenizer of these codes: its weights have another hash",
            where=path,
            fix="use the tokenizer they were made with, or encode and train again",
        )
    return model


@dataclass(frozen=True)
class OpenedGenerator:
    """A generator, the tokenizer that decodes its codes, what lies beside the weights (`classes`, `layout`, …), its node."""

    generator: Generator
    tokenizer: Tokenizer
    facts: dict[str, Any]
    node: dict[str, Any]

    def check_guidance(self, guidance: Varying) -> None:
        """Make sure that the generator can be guided so; see `samplers.guidance.check_guidance`."""
        check_guidance(guidance, self.generator.plan, self.facts.get("class_dropout", 1.0))


def open_generator(path: Path, *, tokenizer: Path | None = None, ema: bool = True) -> OpenedGenerator:
    """The generator of a run, a checkpoint or an exported model, in eval mode.

    Args:
        path: where it lies.
        tokenizer: where its tokenizer lies now; `None`: where it lay while training.
        ema: prefer averaged weights.

    Raises:
        UserError: no generator there, its tokenizer is gone, or is another one.
    """
    return with_tokenizer(open_model(path, ema=ema), path, tokenizer)


def with_tokenizer(opened: Opened, path: Path, tokenizer: Path | None) -> OpenedGenerator:
    """The generator that was opened, bound to its tokenizer; see `open_generator`."""
    generator, facts, node = opened
    if not isinstance(generator, Generator):
        raise UserError(f"holds a {type(generator).__name__}, not a generator", where=path, fix="point at a generator run")
    its = its_tokenizer(path, facts, tokenizer)
    generator.bind(its)
    return OpenedGenerator(generator, its, facts, node)


@dataclass(frozen=True)
class OpenedDistilled:
    """A network distilled from a generator, the tokenizer whose codes it speaks, and what lies beside the weights."""

    model: Distilled
    tokenizer: Tokenizer
    facts: dict[str, Any]


def holds_distilled(path: Path) -> bool:
    """Whether `path` (see `locate_model`) holds a network distilled from a generator."""
    target = resolve_target(str(model_node(locate_model(path))["_target_"]))
    return isinstance(target, type) and issubclass(target, Distilled)


def open_distilled(path: Path, *, tokenizer: Path | None = None, ema: bool = True) -> OpenedDistilled:
    """The one-step student, one-step generator or diffusion model of a run, a checkpoint or an exported model, in eval mode.

    Args:
        path: where it lies.
        tokenizer: where its tokenizer lies now; `None`: where it lay while training.
        ema: prefer averaged weights.

    Raises:
        UserError: nothing distilled there, its tokenizer is gone, or is another one.
    """
    return distilled_with_tokenizer(open_model(path, ema=ema), path, tokenizer)


def distilled_with_tokenizer(opened: Opened, path: Path, tokenizer: Path | None) -> OpenedDistilled:
    """The network that was opened, bound to its tokenizer; see `open_distilled`."""
    model, facts, _ = opened
    if not isinstance(model, Distilled):
        raise UserError(f"holds a {type(model).__name__}, not what was distilled", where=path, fix="point at a distill run")
    its = its_tokenizer(path, facts, tokenizer)
    model.bind(its)
    return OpenedDistilled(model, its, facts)


def its_tokenizer(path: Path, facts: dict[str, Any], given: Path | None) -> Tokenizer:
    """The tokenizer of what lies at `path`: the one given, or the one that its facts name.

    Raises:
        UserError: it is gone, or another one.
    """
    return open_tokenizer(tokenizer_place(path, facts, given), expected_hash=(facts.get("tokenizer") or {}).get("hash"))


def tokenizer_place(path: Path, facts: dict[str, Any], given: Path | None) -> Path:
    """Where the tokenizer of what lies at `path` is: as given, or as its facts say.

    Raises:
        UserError: nowhere.
    """
    origin = facts.get("tokenizer") or {}
    place = given or (Path(origin["path"]) if origin.get("path") else None)
    if place is None or not place.exists():
        known = f"its tokenizer {place} is not here" if place else "it does not say which tokenizer made its codes"
        raise UserError(known, where=path, fix="give the place of the tokenizer: decode_with=…, in Python tokenizer=…")
    return place
