"""`tokar evaluate`: a tokenizer against the images it reconstructs, a generator or a set of images against real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conf.compose import Composed
from ..conf.schema import Evaluate, Probe
from ..data.files import check_place
from ..data.progress import progress_bar
from ..data.stream import to_image
from ..errors import UserError
from ..models.build import load_model, locate_model, pick_device, weights_hash
from ..models.classifier import Classifier
from ..models.distill.distilled import Distilled
from ..models.generators.base import Generator
from ..models.open import OpenedGenerator, open_distilled
from ..models.samplers.decode import Tally
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.losses import LPIPS
from .console import say, table
from .crops import LOOKED_AT, evaluate_crops
from .distilled import ask_of, draw_vectors
from .features import FeatureNet, load_features
from .generation import evaluate_generation
from .images import count_samples, load_samples
from .likelihood import evaluate_likelihood
from .prefixes import evaluate_prefixes, prefixes_of
from .probe import images_seen, linear_probe
from .probe_features import generator_features, token_features
from .protocol import Result, content_id
from .reconstruction import evaluate_tokenizer
from .reference import captions_of, reference_batches
from .samples import Texts, class_ids, decode_batches, draw_codes, text_encoder, with_texts
from .setting import Setting, evaluation_folder


def evaluate(composed: Composed) -> int:
    """Measure what `target` names, print the numbers, and write them with their protocol."""
    config: Evaluate = composed.typed
    target = Path(config.target)
    if not target.exists():
        raise UserError("no such file or folder", where=target, fix="point at a run, a model, an .npz or a folder of images")
    device = pick_device(config.strategy.accelerator)
    task = Task(config, composed.plain.get("sampling") or {}, target, device)
    folder = Path(config.out) if config.out else evaluation_folder(target)
    check_place(folder)
    result = task.result()
    path = result.save(folder / f"{result.name}-{content_id({**result.protocol, **result.subject})}.json")
    for name, draw in task.pictures.items():
        say(f"drawn in {draw(path.with_name(f'{path.stem}_{name}.png'))}")
    say(table(f"{target}: {result.name}, protocol {result.protocol_id}", result.numbers))
    say(f"written to {path}")
    return 0


@dataclass(frozen=True)
class Task(Setting):
    """One evaluation: what is measured, against what, where. `pictures` are drawn beside the result, by name."""

    config: Evaluate
    pictures: dict[str, Callable[[Path], Path]] = field(default_factory=dict)

    def result(self) -> Result:
        """Measure."""
        if _is_images(self.target):
            count = count_samples(self.target)
            return self._generation(load_samples(self.target, self.config.batch_size), count, {"images": str(self.target)})
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
                return self._samples(subject)
            case Distilled():
                return self._distilled_samples(subject)
            case Classifier():
                return self._classification(model, subject)
        raise UserError(
            f"holds a {type(model).__name__}, which has no evaluation", where=self.target, fix="point at another run"
        )

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
        split = self.config.split or self.data.val_split
        batches, count, facts = reference_batches(self.data, split, self.config.batch_size, self.config.count)
        network, perceptual = self._judges()
        with progress_bar(None, count, "reconstructing") as advance:
            return evaluate_tokenizer(
                tokenizer, batches, network=network, perceptual=perceptual, data=facts, subject=subject, on_batch=advance
            )

    def _prefixes(self, tokenizer: Tokenizer, subject: dict[str, Any]) -> Result:
        prefixes_of(tokenizer)  # refused before anything is read
        split = self.config.split or self.data.val_split
        batches, count, facts = reference_batches(self.data, split, self.config.batch_size, self.config.count)
        network, perceptual = self._judges()
        with progress_bar(None, count, "reconstructing") as advance:
            measured = evaluate_prefixes(
                tokenizer, batches, network=network, perceptual=perceptual, data=facts, subject=subject, on_batch=advance
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

    def _judges(self) -> tuple[FeatureNet | None, LPIPS | None]:
        """The feature network and the perceptual distance, where they are given."""
        place = self.features_path
        network = load_features(self.config.features.name, place, self.device) if place else None
        return network, LPIPS(self.config.lpips_weights).to(self.device) if self.config.lpips_weights else None

    def _likelihood(self, subject: dict[str, Any]) -> Result:
        opened, split = self.opened_generator(), self.config.split or self.data.val_split
        batches, count, facts = reference_batches(self.data, split, self.config.batch_size, self.config.count)
        if opened.generator.text is not None:
            batches = with_texts(batches, self._texts(opened, split, count))
        with progress_bar(None, count, "measuring") as advance:
            return evaluate_likelihood(
                opened.generator, opened.tokenizer, batches, draws=self.config.draws, seed=self.config.seed, data=facts,
                subject=subject, on_batch=advance,
            )  # fmt: skip

    def _samples(self, subject: dict[str, Any]) -> Result:
        opened = self.opened_generator()
        generator, tokenizer = opened.generator, opened.tokenizer
        sampling = self.sampling_of(opened)
        count = self.config.count or reference_batches(self.data, self.reference_split, 1, None)[1]
        conditions, tally = self._conditions(opened, count), Tally()
        subject = subject | ({} if generator.text is None else {"prompts": f"captions of {self.reference_split}"})
        with progress_bar(None, count, "sampling") as advance:
            codes = draw_codes(
                generator, conditions, seed=self.config.seed, sampling=sampling, batch_size=self.config.batch_size,
                on_batch=advance, tally=tally,
            )  # fmt: skip
            images = decode_batches(tokenizer, codes)
            result = self._generation(images, count, {**subject, "seed": self.config.seed, "sampling": sampling})
        return replace(result, numbers={**result.numbers, **tally.per_image})

    def _conditions(self, opened: OpenedGenerator, count: int) -> Tensor | Texts:
        """Classes in turn, or the captions of the reference."""
        if opened.generator.text is None:
            return class_ids(count, None, opened.generator.num_classes)
        return self._texts(opened, self.reference_split, count)

    def _texts(self, opened: OpenedGenerator, split: str, count: int) -> Texts:
        return Texts(text_encoder(opened, self.config.text_encoder, self.device), captions_of(self.data, split, count))

    def _distilled_samples(self, subject: dict[str, Any]) -> Result:
        place = Path(self.config.decode_with) if self.config.decode_with else None
        opened = open_distilled(self.target, tokenizer=place, ema=self.config.ema)
        opened.model.to(self.device)
        opened.tokenizer.to(self.device)
        student, sampling = self.config.student, self.as_sampled
        ask = ask_of(student, opened, sampling, seed=self.config.seed, tokenizer=place)
        count = self.config.count or reference_batches(self.data, self.reference_split, 1, None)[1]
        asked, tally = student.model_dump() | ({"sampling": sampling.model_dump()} if ask.teacher else {}), Tally()
        with progress_bar(None, count, "sampling") as advance:
            vectors = draw_vectors(
                opened, class_ids(count, None, opened.model.num_classes), ask, seed=self.config.seed,
                batch_size=self.config.batch_size, on_batch=advance, tally=tally,
            )  # fmt: skip
            images = decode_batches(opened.tokenizer, vectors)
            result = self._generation(images, count, {**subject, "seed": self.config.seed, "student": asked})
        return replace(result, numbers={**result.numbers, **tally.per_image})

    def _generation(self, images: Iterable[Mapping[str, Tensor]], count: int, subject: dict[str, Any]) -> Result:
        """Fréchet distance to the reference split, and class accuracy where a classifier judges."""
        network = self.features()
        reference = self.reference(network)
        return evaluate_generation(images, reference, network, judge=self.judge(network), subject={**subject, "count": count})

    @torch.no_grad()
    def _classification(self, classifier: Classifier, subject: dict[str, Any]) -> Result:
        split = self.config.split or self.data.val_split
        batches, count, facts = reference_batches(self.data, split, self.config.batch_size, self.config.count)
        right = 0
        with progress_bar(None, count, "classifying") as advance:
            for batch in batches:
                guess = classifier(to_image(batch["image"].to(self.device))).argmax(-1).cpu()
                right += int((guess == batch["label"]).sum())
                advance(len(guess))
        return Result("classification", {"accuracy": right / count}, {"data": facts, "count": count}, subject)


def _is_images(target: Path) -> bool:
    """An .npz, or a folder that is neither a run nor a checkpoint nor a model."""
    marks = ("config.yaml", "config.json", "COMPLETE")
    return target.is_file() or not any((target / mark).is_file() for mark in marks)
