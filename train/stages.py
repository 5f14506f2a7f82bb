"""From a checked config to a stage and its data: one builder for each stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conf.spine import Data, Spine
from ..conf.stages import ClassifierRun, DD2Run, DiffusionRun, DistillRun, GeneratorRun, TokenizerRun
from ..data.codes import CodeDataset
from ..data.shards import ImageDataset
from ..data.stream import Dataset, Stream
from ..errors import UserError
from ..evaluate.reference import augmented_split, plain_split
from ..models.build import resolve_target, weights_hash
from ..models.generators.conditions import TextCondition
from ..models.open import open_tokenizer
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.layout import TokenLayout
from .adapt import AdaptStage
from .classifier import ClassifierStage
from .contrast import ContrastStage
from .dd2 import DD2Stage, DiffusionStage
from .distill import DistillStage, open_pairs, open_teacher
from .generator import GeneratorStage
from .rehearsal import rehearse
from .stage import Stage
from .strategy import Workers
from .tokenizer import TokenizerStage


@dataclass(frozen=True)
class Built:
    """A stage with its training stream and its validation images or codes."""

    stage: Stage
    train: Stream
    validate: Stream


def build_tokenizer(config: TokenizerRun, workers: Workers) -> Built:
    """Images in, images out."""
    stage = TokenizerStage(config)
    side = config.data.image_size
    check_image_size(side, stage.tokenizer.layout)
    rehearse(stage.rehearse, [item.module for item in stage.trainables.values()], (2, 3, side, side))
    return _built(config, workers, stage, *image_splits(config.data))


def build_classifier(config: ClassifierRun, workers: Workers) -> Built:
    """Images in, classes out."""
    train, validate = image_splits(config.data)
    _check_labels(train)
    known = {"image_size": config.data.image_size, "num_classes": len(train.classes)}
    stage = ClassifierStage(config, fill(config.classifier, known), {"classes": train.classes})
    return _built(config, workers, stage, train, validate)


def build_generator(config: GeneratorRun, workers: Workers) -> Built:
    """Codes in, from code shards or from images encoded on the fly."""
    tokenizer, origin = find_tokenizer(config)
    if tokenizer is None and origin:
        workers.warn(f"{origin['path']}: the tokenizer of these codes is not here; no pictures are drawn while training")
    train, validate = _code_splits(config, tokenizer) if config.codes.path else image_splits(config.data)
    if not config.generator.get("condition"):
        _check_labels(train)
    layout = TokenLayout.from_dict(train.layout) if isinstance(train, CodeDataset) else _layout_of(tokenizer, config.data)
    known = {"num_classes": len(train.classes), **sizes_of(layout)}
    facts = {
        "layout": layout.to_dict(), "classes": train.classes, "tokenizer": origin, "class_dropout": config.class_dropout,
        "text": getattr(train, "text", None),
    }  # fmt: skip
    node = fill(config.generator, known)
    _check_complete(node, layout)
    kind = ContrastStage if config.contrast else AdaptStage if config.adapt else GeneratorStage
    stage = kind(config, node, tokenizer, facts)
    stage.generator.plan.check(layout)
    if stage.generator.text is not None:
        _check_texts(stage.generator.text, train, validate)
    return _built(config, workers, stage, train, validate)


def build_distill(config: DistillRun, workers: Workers) -> Built:
    """Pairs of noise and codes in, or their noise alone."""
    opened = open_teacher(config)
    train, validate = open_pairs(config, opened)
    return _built(config, workers, DistillStage(config, opened), train, validate)


def build_diffusion(config: DiffusionRun, workers: Workers) -> Built:
    """As `build_distill`."""
    opened = open_teacher(config)
    train, validate = open_pairs(config, opened)
    return _built(config, workers, DiffusionStage(config, opened), train, validate)


def build_dd2(config: DD2Run, workers: Workers) -> Built:
    """As `build_distill`; without `pair_weight` only the class is read of the pairs."""
    opened = open_teacher(config)
    train, validate = open_pairs(config, opened)
    return _built(config, workers, DD2Stage(config, opened), train, validate)


BUILDERS: dict[str, Callable[..., Built]] = {
    "tokenizer": build_tokenizer,
    "classifier": build_classifier,
    "generator": build_generator,
    "distill": build_distill,
    "diffusion": build_diffusion,
    "dd2": build_dd2,
}


def image_splits(data: Data) -> tuple[ImageDataset, ImageDataset]:
    """The training and validation images of a data set; only the training ones are augmented."""
    return augmented_split(data, data.train_split), plain_split(data, data.val_split)


def fill(node: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A component node completed with what the layout and the data decide, where its constructor asks for it."""
    wanted = inspect.signature(resolve_target(node["_target_"])).parameters
    return {**node, **{name: value for name, value in known.items() if name in wanted and name not in node}}


def sizes_of(layout: TokenLayout) -> dict[str, Any]:
    """What a layout decides about a generator of its codes, by the names of constructor arguments."""
    first, *others = layout.streams
    sizes: dict[str, Any] = {"vocab_size": layout.vocab_size, "embed_dim": first.embed_dim}
    if layout.kind == "multiscale":
        sizes["grids"] = [stream.grid for stream in layout.streams]
    if first.grid is not None and not others:
        return {**sizes, "grid": first.grid}
    return {**sizes, "n_tokens": layout.total_tokens}


def _check_complete(node: Mapping[str, Any], layout: TokenLayout) -> None:
    target = resolve_target(node["_target_"])
    asked = inspect.signature(target).parameters.items()
    if missing := [name for name, asks in asked if asks.default is asks.empty and name not in node]:
        raise UserError(
            f"a {target.__name__} needs {', '.join(missing)}, which a {layout.kind} tokenizer does not have",
            where="generator",
            fix="choose a generator for these codes: var_… for scales, llamagen_… for one grid or a row",
        )


def find_tokenizer(config: GeneratorRun) -> tuple[Tokenizer | None, dict[str, Any]]:
    """The tokenizer whose codes a generator learns, and where it comes from.

    It is the one named by `codes.tokenizer`, or else the one that the code shards name, which need not be there any more.
    """
    place = config.codes.tokenizer
    if place is None and config.codes.path:
        manifest = CodeDataset(Path(config.codes.path) / config.data.train_split).manifest
        place = manifest["protocol"].get("tokenizer")
        if place and not Path(place).exists():
            return None, {"path": str(place), "hash": manifest["tokenizer_hash"]}
    if place is None:
        return None, {}
    tokenizer = open_tokenizer(Path(place))
    return tokenizer, {"path": str(place), "hash": weights_hash(tokenizer)}


def _code_splits(config: GeneratorRun, tokenizer: Tokenizer | None) -> tuple[CodeDataset, CodeDataset]:
    folder = Path(str(config.codes.path))
    expected = (tokenizer.layout.to_dict(), weights_hash(tokenizer)) if tokenizer is not None else (None, None)
    train, validate = (CodeDataset(folder / split, *expected) for split in (config.data.train_split, config.data.val_split))
    return train, validate


def _layout_of(tokenizer: Tokenizer | None, data: Data) -> TokenLayout:
    if tokenizer is None:
        raise UserError("no tokenizer to encode the images with", where="codes.tokenizer", fix="give a tokenizer run")
    check_image_size(data.image_size, tokenizer.layout)
    return tokenizer.layout


def _check_labels(data: ImageDataset | CodeDataset) -> None:
    if not data.classes:
        raise UserError(
            "the data has no classes", where=data.folder, fix="prepare it from folders of classes, or with .cls files"
        )


def _check_texts(wanted: TextCondition, *splits: ImageDataset | CodeDataset) -> None:
    for data in splits:
        text = data.text if isinstance(data, CodeDataset) else None
        if text is None:
            raise UserError(
                "a generator of texts, but no text features beside the codes",
                where=data.folder if isinstance(data, CodeDataset) else "codes.path",
                fix="encode with text=t5 (captions as .txt in the image shards), or choose a generator of classes",
            )
        wanted.check_shape(text["tokens"], text["features"])


def check_image_size(image_size: int, layout: TokenLayout) -> None:
    """Images must have the size that the layout describes.

    Raises:
        UserError: they have another.
    """
    if layout.image_size != (image_size, image_size):
        height, width = layout.image_size
        raise UserError(
            f"the tokenizer describes images of {height}x{width}, the data has {image_size}x{image_size}",
            where="data.image_size",
            fix=f"set tokenizer.image_size={image_size}, or data.image_size={height}",
        )


def _built(config: Spine, workers: Workers, stage: Stage, train: Dataset, validate: Dataset) -> Built:
    loop, rank, world = config.loop, workers.rank, workers.world
    stream = Stream(
        train, batch_size=loop.batch_size, seed=config.seed, rank=rank, world=world, accumulate=loop.accumulate,
        workers=config.data.workers, pin=workers.device.type == "cuda",
    )  # fmt: skip
    size = max(world, loop.batch_size // loop.accumulate)
    return Built(stage, stream, Stream(validate, batch_size=size, seed=0, shuffle=False, rank=rank, world=world))
