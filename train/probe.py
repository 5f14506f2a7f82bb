"""`tokar probe`: how well a small next-token model learns a tokenizer's codes, by one recipe for all tokenizers.

1 encode the images of the tokenizer's run · 2 train the recipe `ar_probe` on the codes · 3 measure the cross-entropy of
held-out codes and, with a feature network, samples · 4 write the result beside the tokenizer's. Each part is the command
that it would be alone, so a probe that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..conf.compose import Composed, check, unchecked
from ..conf.schema import Features
from ..conf.spine import Data
from ..data.codes import CodeDataset
from ..data.progress import progress_bar
from ..data.stream import Stream
from ..errors import ConfigError, UserError
from ..evaluate.console import say, table
from ..evaluate.features import features_place, load_features
from ..evaluate.likelihood import code_likelihood
from ..evaluate.protocol import Result, content_id
from ..evaluate.reference import augmented_split, facts_of, plain_split
from ..evaluate.run import Task
from ..evaluate.setting import evaluation_folder, run_of
from ..models.build import locate_model, model_facts, pick_device, weights_hash
from ..models.open import open_generator, open_tokenizer
from ..models.tokenizers.layout import TokenLayout
from .encode import encode
from .folder import default_name, read_config, run_folder
from .run import start

EXPERIMENT = "experiment=ar_probe"
RECIPE = ("generator", "optim", "schedule", "ema", "class_dropout")
"""Parts of the config that belong to the protocol of a probe."""


def probe(model: Path, overrides: Sequence[str], features: str | None = None, count: int | None = None) -> int:
    """Encode, train, measure, write.

    Args:
        model: a tokenizer's run, checkpoint or exported model.
        overrides: of the config of the stage `generator`, on top of the recipe.
        features: run of the classifier, or `inception=FILE`, `dinov2=FOLDER`, for samples; `None` draws none.
        count: samples; `None`: as many as there are validation images.

    Returns:
        The exit code of the training, 0 when all was done.
    """
    if count is not None and count < 1:
        raise UserError(f"{count} samples", where="--count", fix="give 1 or more")
    tokenizer = open_tokenizer(model)
    composed = compose_probe(model, overrides)
    network = named_features(features)
    if network.path and network.name:
        load_features(network.name, features_place(network.name, network.path))  # or a mistake is told after the training
    views = _encode(model, composed)
    if code := start(composed):
        return code
    result = _measure(model, composed, views, network, count)
    subject = {"target": str(model), "weights": weights_hash(tokenizer)[:16], **result.subject}
    result = replace(result, subject=subject)
    path = result.save(evaluation_folder(model) / f"{result.name}-{content_id({**result.protocol, **subject})}.json")
    say(table(f"{model}: {result.name}, protocol {result.protocol_id}", result.numbers))
    say(f"written to {path}")
    return 0


def compose_probe(model: Path, overrides: Sequence[str]) -> Composed:
    """The config of the probe's training: the recipe on the data of the tokenizer's run, in a run folder named by both.

    Raises:
        ConfigError: its problems.
        UserError: several devices, or no data set is known.
    """
    plain, found = unchecked("generator", [EXPERIMENT, *overrides])
    plain["data"] = _data(model, plain["data"], [text.split("=")[0] for text in found.canonical])
    plain["codes"] = {"path": None, "tokenizer": str(model)}
    composed = check("generator", plain, found.canonical, found.problems)
    if composed.typed.strategy.name != "single":
        raise ConfigError(["strategy.name: a probe runs on one device; leave it at single"])
    run = run_of(model)
    label = model.name if run in (None, model) else f"{run.name}-{model.name}"  # type: ignore[union-attr]
    plain["name"] = plain["name"] or f"{label}-{default_name(composed)}"
    plain["codes"]["path"] = str(Path(plain["paths"]["runs"]) / plain["name"] / "codes")
    return check("generator", plain, found.canonical)


def _data(model: Path, composed: dict[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The data of the tokenizer's run, unless the user names a data set; single keys of it may be changed."""
    run = run_of(model)
    if "data" in given:
        return composed
    if run is None:
        raise UserError("does not say on which data it was trained", where=model, fix="name a data set, e.g. data=digits")
    changed = {key.removeprefix("data.") for key in given if key.startswith("data.")}
    return {**read_config(run)["data"], **{key: composed[key] for key in changed}}


def named_features(text: str | None) -> Features:
    """`features` of an evaluation from one word: a classifier's run, or NAME=PATH of another network."""
    name, equals, path = (text or "").partition("=")
    if equals and name in ("classifier", "inception", "dinov2"):
        return Features.model_validate({"name": name, "path": path})
    return Features(name="classifier", path=text)


def _encode(model: Path, composed: Composed) -> str:
    """Codes of the training images, with the views that the data's augmentation asks for, and of the validation images."""
    data = composed.typed.data
    views = "ten-crop" if data.crop == "random" else "flip" if data.flip else "one"
    for split, wanted in ((data.train_split, views), (data.val_split, "one")):
        plain, _ = unchecked("encode", [])
        plain |= {"model": str(model), "out": composed.typed.codes.path, "data": composed.plain["data"]}
        plain |= {"splits": [split], "views": wanted, "strategy": composed.plain["strategy"]}
        encode(check("encode", plain))
    return views


def _measure(model: Path, composed: Composed, views: str, network: Features, count: int | None) -> Result:
    """Cross-entropy of the validation codes and, where there is a feature network, what samples come to."""
    config, run = composed.typed, run_folder(composed)
    data: Data = config.data
    device = pick_device(config.strategy.accelerator)
    opened = open_generator(run)
    codes = CodeDataset(Path(str(config.codes.path)) / data.val_split)
    batches = Stream(codes, batch_size=64, seed=0, shuffle=False).once()
    with progress_bar(None, len(codes), "measuring") as advance:
        layout = TokenLayout.from_dict(model_facts(locate_model(run))["layout"])
        numbers = code_likelihood(opened.generator.to(device), layout, batches, advance)
    protocol = _protocol(composed, views, len(codes))
    if network.path:
        samples = _samples(composed, network, count or len(codes))
        numbers, protocol["samples"] = {**numbers, **samples.numbers}, dict(samples.protocol)
        protocol["sampling"] = composed.plain["sampling"]
    size = sum(parameter.numel() for parameter in opened.generator.parameters())
    return Result("ar_probe", numbers, protocol, {"generator": str(run), "parameters": size, "seed": config.seed})


def _protocol(composed: Composed, views: str, count: int) -> dict[str, Any]:
    """What makes two probes comparable: the recipe and the images, but not the tokenizer nor the seed."""
    data: Data = composed.typed.data
    train = augmented_split(data, data.train_split)
    return {
        "data": facts_of(data, data.val_split, plain_split(data, data.val_split), count),
        "train": {**facts_of(data, data.train_split, train, len(train)), "views": views},
        "count": count,
        "condition": "class",
        "recipe": {key: composed.plain[key] for key in RECIPE}
        | {"duration": composed.typed.loop.duration, "batch_size": composed.typed.loop.batch_size},
    }


def _samples(composed: Composed, network: Features, count: int) -> Result:
    """The evaluation of the trained generator, as `tokar evaluate` would do it."""
    run = run_folder(composed)
    plain, _ = unchecked("evaluate", [])
    plain |= {"target": str(run), "features": network.model_dump(), "count": count, "strategy": composed.plain["strategy"]}
    task = check("evaluate", plain)
    return Task(task.typed, {}, run, pick_device(composed.typed.strategy.accelerator)).result()
