"""`tokar evaluate`: a tokenizer against the images it reconstructs, a generator or a set of images against real ones."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..conf.compose import Composed
from ..conf.protocols import Protocol
from ..conf.schema import Evaluate, Probe
from ..data.files import check_place
from ..data.progress import progress_bar
from ..data.stream import to_image
from ..errors import UserError
from ..models.build import load_model, locate_model, pick_device, weights_hash
from ..models.classifier import Classifier
from ..models.distill.distilled import Distilled
from ..models.generators.base import Generator
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.losses import LPIPS
from .console import say, table
from .crops import LOOKED_AT, evaluate_crops
from .feature_net import Features
from .generated import distilled_samples, generator_samples, stored_images
from .likelihood import evaluate_likelihood
from .measures import Batch, Mean, logits_of
from .prefixes import evaluate_prefixes, prefixes_of
from .probe import images_seen, linear_probe
from .probe_features import generator_features, token_features
from .protocol import SECONDS, Result, content_id
from .protocols import Judging, choose_protocol
from .ranks import accumulate, this_rank
from .reconstruction import evaluate_tokenizer
from .reference import reference_batches, split_images
from .samples import with_texts
from .setting import evaluation_folder
from .task import Evaluation


def evaluate(composed: Composed, device: torch.device | None = None) -> int:
    """Measure what `target` names, print the numbers, and write them with their protocol.

    Args:
        composed: the config.
        device: of this rank, where several measure together; `None`: as configured.
    """
    config: Evaluate = composed.typed
    target = Path(config.target)
    if not target.exists():
        raise UserError("no such file or folder", where=target, fix="point at a run, a model, an .npz or a folder of images")
    folder = Path(config.out) if config.out else evaluation_folder(target)
    check_place(folder)
    sampling = composed.plain.get("sampling") or {}
    task = Task(config, sampling, target, device or pick_device(config.strategy.accelerator), folder)
    try:
        result = task.result()
    except UserError as error:
        if not isinstance(error.__cause__, OSError):  # what a full disk stopped goes on; a mistake leaves nothing behind
            _forget(task)
        raise
    if this_rank()[0] == 0:
        _tell(task, result, folder)
    return 0


def _forget(task: Task) -> None:
    """Remove the states of an evaluation, and the folders that were made for them."""
    for states in task.states:
        shutil.rmtree(states, ignore_errors=True)
        with suppress(OSError):  # other evaluations have their states there, or their results
            states.parent.rmdir()
            states.parent.parent.rmdir()


def _tell(task: Task, result: Result, folder: Path) -> None:
    path = result.save(folder / f"{result.name}-{content_id({**result.protocol, **result.subject})}.json")
    _forget(task)
    for name, draw in task.pictures.items():
        say(f"drawn in {draw(path.with_name(f'{path.stem}_{name}.png'))}")
    if changed := result.protocol.get("changed"):
        changes = ", ".join(f"{key}={value}" for key, value in changed.items())
        sys.stderr.write(f"warning: protocol {result.protocol['name']} with {changes}: not comparable with others' numbers\n")
    if result.speed:
        images = f"{1 / result.speed[SECONDS]:.1f} images a second, {result.speed['batch_size']} at once, the decoder left out"
        say(f"{images}: {result.speed['device']}, {result.speed['threads']} threads")
    say(table(f"{task.target}: {result.name}, protocol {result.protocol_id}", result.numbers))
    say(f"written to {path}")


class Task(Evaluation):
    """One evaluation."""

    def result(self) -> Result:
        """Measure."""
        if _is_images(self.target):
            return stored_images(self)
        folder = locate_model(self.target)
        model = load_model(folder, ema=self.config.ema).to(self.device)
        subject = {
            "target": str(self.target),
            "checkpoint": folder.parent.name,
            "weights": weights_hash(model)[:16],
            "ema": self.config.ema,
        }
        owner = Generator if self.config.measure == "likelihood" else Tokenizer
        if self.config.measure != "quality" and (self.config.probe or not isinstance(model, owner)):
            what = "a probe" if self.config.probe else f"a {type(model).__name__}"
            raise UserError(f"not for {what}", where=f"measure={self.config.measure}", fix="leave it out")
        if not self.config.dealt and this_rank()[1] > 1:
            raise UserError("runs on one device", where="strategy.devices", fix="leave out strategy")
        if not self.config.dealt or isinstance(model, Classifier):
            self._refuse_what_is_of_quality()
        if self.config.probe:
            return self._probe(self.config.probe, model, subject)
        match model:
            case Tokenizer() if self.config.measure == "prefixes":
                return self._prefixes(model, subject)
            case Tokenizer() if self.config.measure == "crops":
                return self._crops(model, subject)
            case Tokenizer():
                return self._reconstruction(model, subject)
            case Generator() if self.config.measure == "likelihood":
                return self._likelihood(subject)
            case Generator():
                return generator_samples(self, subject)
            case Distilled():
                return distilled_samples(self, subject)
            case Classifier():
                return self._classification(model, subject)
        raise UserError(
            f"holds a {type(model).__name__}, which has no evaluation", where=self.target, fix="point at another run"
        )

    def _refuse_what_is_of_quality(self) -> None:
        for key in ("protocol", "reference", "captions", "statistics"):
            if getattr(self.config, key) is not None:
                raise UserError("is not for this measure", where=key, fix="leave it out")

    def _probe(self, settings: Probe, model: torch.nn.Module, subject: dict[str, Any]) -> Result:
        """Linear probe of a tokenizer's tokens, or of a generator that reads them."""
        what: dict[str, Any] = {"of": "tokenizer", "tokens": settings.tokens, "pool": settings.pool}
        if isinstance(model, Generator):
            opened = self.opened_generator()
            extract = generator_features(opened.generator, opened.tokenizer)
            what = {"of": "generator", "layer": "middle block", "pool": "mean over slots", "condition": "no class"}
        elif isinstance(model, Tokenizer):
            extract = token_features(model, settings.tokens, settings.pool)
        else:
            raise UserError(f"holds a {type(model).__name__}", where=self.target, fix="probe a tokenizer or a generator")
        data, split, count = self.data, self.config.split, self.config.count
        with progress_bar(None, images_seen(data, settings, split, count), "probing") as advance:
            return linear_probe(
                extract, data, settings, what=what, device=self.device, split=split, count=count, subject=subject,
                batch_size=self.config.batch_size, seed=self.config.seed, on_image=advance,
            )  # fmt: skip

    def _reconstruction(self, tokenizer: Tokenizer, subject: dict[str, Any]) -> Result:
        if self.config.reference:
            what = "a tokenizer is compared with the images that it reconstructs"
            raise UserError(what, where="reference", fix="leave it out; data and split say which")
        protocol, split = choose_protocol(self.config, "tokenizer"), self.config.split or self.data.val_split
        source, total, facts = split_images(self.data, split)
        count = facts["images"] = self.count(protocol, total)
        judging, perceptual = self.judges(protocol)
        sides = partial(judging.sides, count) if judging else None
        empty = sides() if sides else ()
        for side in empty if count > 1 else ():
            side.check(count)
        identity = {
            "subject": subject, "data": facts, "lpips": perceptual and weights_hash(perceptual),
            "sides": [side.protocol() for side in empty],
        }  # fmt: skip
        with progress_bar(None, count, "reconstructing") as advance:
            result = evaluate_tokenizer(
                tokenizer, source, count, self.pace(identity, advance), sides=sides, perceptual=perceptual, data=facts,
                subject=subject,
            )  # fmt: skip
        return replace(result, protocol={**(judging.name() if judging else {}), **result.protocol})

    def _prefixes(self, tokenizer: Tokenizer, subject: dict[str, Any]) -> Result:
        prefixes_of(tokenizer)  # refused before anything is read
        split = self.config.split or self.data.val_split
        batches, count, facts = reference_batches(self.data, split, self.config.batch_size, self.config.count)
        judging, perceptual = self.judges(choose_protocol(self.config, "tokenizer"))
        sides = partial(judging.sides, count) if judging else None
        with progress_bar(None, count, "reconstructing") as advance:
            measured = evaluate_prefixes(
                tokenizer, batches, sides=sides, perceptual=perceptual, data=facts, subject=subject, on_batch=advance
            )
        self.pictures.update(curves=measured.draw_curves, images=measured.draw_images)
        return measured.result

    def _crops(self, tokenizer: Tokenizer, subject: dict[str, Any]) -> Result:
        split = self.config.split or self.data.val_split
        limit = self.config.count or LOOKED_AT
        batches, count, facts = reference_batches(self.data, split, self.config.batch_size, limit)
        with progress_bar(None, count, "looking for details") as advance:
            crops = evaluate_crops(tokenizer, batches, data=facts, subject=subject, on_batch=advance)
        self.pictures["crops"] = crops.draw
        return crops.result

    def judges(self, protocol: Protocol) -> tuple[Judging | None, LPIPS | None]:
        """The features and the perceptual distance, where they are given or a named protocol asks for them."""
        asked = self.config.features.path or self.config.judge or self.config.protocol
        judging = self.judging(protocol) if asked else None
        return judging, LPIPS(self.config.lpips_weights).to(self.device) if self.config.lpips_weights else None

    def _likelihood(self, subject: dict[str, Any]) -> Result:
        opened, split = self.opened_generator(), self.config.split or self.data.val_split
        batches, count, facts = reference_batches(self.data, split, self.config.batch_size, self.config.count)
        if opened.generator.text is not None:
            batches = with_texts(batches, self.texts(opened, split, count))
        with progress_bar(None, count, "measuring") as advance:
            return evaluate_likelihood(
                opened.generator, opened.tokenizer, batches, draws=self.config.draws, seed=self.config.seed, data=facts,
                subject=subject, on_batch=advance,
            )  # fmt: skip

    @torch.no_grad()
    def _classification(self, classifier: Classifier, subject: dict[str, Any]) -> Result:
        split = self.config.split or self.data.val_split
        source, count, facts = split_images(self.data, split, self.config.count)

        def make() -> Mean:
            return Mean("accuracy", lambda features, batch: logits_of(features).argmax(-1).cpu() == batch["label"], {})

        def step(score: Mean, batch: Batch) -> None:
            pooled = classifier.features(to_image(batch["image"].to(self.device)))
            score.update(Features(pooled, classifier.classify(pooled)), batch)

        protocol = {"data": facts, "count": count}
        with progress_bar(None, count, "classifying") as advance:
            score = accumulate(make, source, count, step, self.pace({**protocol, "subject": subject}, advance))
        return Result("classification", score.compute(), protocol, subject)


def _is_images(target: Path) -> bool:
    """An .npz, or a folder that is neither a run nor a checkpoint nor a model."""
    marks = ("config.yaml", "config.json", "COMPLETE")
    return target.is_file() or not any((target / mark).is_file() for mark in marks)
