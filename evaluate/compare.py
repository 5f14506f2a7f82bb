"""`tokar distill compare`: a teacher, its one-step students, and what needs no training: quality, dependence, cost, time.

Shapes: `B` batch, `N` samples, `T` tokens of an image, `D` code width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conf.compose import Composed
from ..conf.schema import Compare
from ..data.files import check_place
from ..data.progress import progress_bar
from ..errors import UserError
from ..models.build import pick_device, weights_hash
from ..models.distill.codebook import codebook_of, nearest
from ..models.distill.distilled import Ask, Distilled, Helper
from ..models.distill.one_step import OneStepGenerator
from ..models.distill.student import Student
from ..models.distill.trajectory import distributions
from ..models.open import OpenedDistilled, OpenedGenerator, open_distilled
from ..models.samplers.decode import Choices, Tally, choices_for
from .console import say
from .dependence import beyond_chance, distinct, groups_of, over_pairs
from .generation import Reference, evaluate_samples
from .images import save_figure
from .protocol import Result, content_id
from .protocols import Judging, by_features
from .samples import class_ids, decode_batches
from .setting import Setting, evaluation_folder
from .stopwatch import in_turns
from .ways import Frequencies, Way, check_skip, distilled_way, independent_way, skipping_way, teacher_way

BATCHES = (1, 32)
"""Images drawn at once where time is taken."""
Row = dict[str, Any]


def compare(composed: Composed) -> list[list[str]]:
    """Measure every way, write a result for each and one picture beside them, and return the table, its header first."""
    config: Compare = composed.typed
    if config.strategy.threads:
        torch.set_num_threads(config.strategy.threads)
    teacher = Path(config.model)
    folder = Path(config.out) if config.out else evaluation_folder(Path(config.student or config.dd2 or config.model))
    check_place(folder)
    contest = Contest(config, composed.plain.get("sampling") or {}, teacher, pick_device(config.strategy.accelerator))
    results = contest.results()
    name = content_id({**results[0].protocol, "subjects": [dict(result.subject) for result in results]})
    for result in results:
        result.save(folder / f"{result.name}-{content_id({**result.protocol, **result.subject})}.json")
    picture = draw_plane(results, folder / f"distillation-{name}_speed_and_quality.png")
    say(f"{len(results)} results and {picture.name} in {folder}")
    return rows_of(results)


@dataclass(frozen=True)
class Contest(Setting):
    """Every way is measured on the same classes, by the same judges, with the same numbers of samples."""

    config: Compare

    @cached_property
    def teacher(self) -> OpenedGenerator:
        """Teacher and tokenizer."""
        opened = self.opened_generator()
        if opened.generator.text is not None:
            raise UserError("a teacher of texts", where="model", fix="one-step students are of classes: take such a teacher")
        return opened

    def results(self) -> list[Result]:
        """One for each way, the teacher first."""
        check_skip(self.teacher.generator, self._skipped)  # refused before anything is drawn, like what was distilled
        sampling, trained = self._sampling, self._trained
        judging = self.judging(by_features(self.config, "samples", self.config.count))
        labels = class_ids(self.config.count, None, self.teacher.generator.num_classes)
        sample = teacher_way(self.teacher.generator, sampling, self.config.seed + 1)
        codes = torch.cat([part["codes"] for part in self._draw(sample, labels, "the teacher's own", Tally())])
        frequencies = Frequencies(codes.to(self.device), labels.to(self.device), self.teacher.generator.num_classes)
        judges = Judges(self, judging, self.reference(judging), codes, labels, self._choices(sampling))
        ways = self._untrained(sampling, frequencies) | trained
        measured = {name: judges.measure(name, way) for name, way in ways.items()}
        times = self._times(ways, labels)
        return [replace(found, numbers={**found.numbers, **times[name]}) for name, found in measured.items()]

    @property
    def _sampling(self) -> dict[str, Any]:
        """The teacher's; its step is compiled where the students' passes are."""
        found = self.sampling_of(self.teacher)
        return {**found, "compile": found["compile"] or self.config.strategy.compile}

    @property
    def _skipped(self) -> int:
        return self.config.skip or self.teacher.generator.plan.n_units // 2

    def _untrained(self, sampling: Mapping[str, Any], frequencies: Frequencies) -> dict[str, Way]:
        generator, seed, skipped = self.teacher.generator, self.config.seed, self._skipped
        return {
            "teacher": teacher_way(generator, sampling, seed),
            "independent": independent_way(frequencies, generator.plan.n_tokens, seed),
            f"teacher, last {skipped} skipped": skipping_way(generator, frequencies, sampling, seed, skipped),
        }

    @cached_property
    def _trained(self) -> dict[str, Way]:
        """The ways of the networks that were given."""
        found: dict[str, Way] = {}
        for place in filter(None, (self.config.student, self.config.dd2)):
            opened = self._opened(Path(place))
            found |= {name: distilled_way(opened, self.config.seed, ask) for name, ask in self._asks(opened.model).items()}
        return found

    def _opened(self, place: Path) -> OpenedDistilled:
        tokenizer = Path(self.config.decode_with) if self.config.decode_with else None
        opened = open_distilled(place, tokenizer=tokenizer, ema=self.config.ema)
        opened.model.to(self.device)
        opened.tokenizer.to(self.device)
        taught = (opened.facts.get("teacher") or {}).get("hash")
        if taught != weights_hash(self.teacher.generator):
            raise UserError(
                f"was distilled from another teacher ({str(taught)[:12]}…)", where=place, fix="compare it with its own teacher"
            )
        return opened

    def _asks(self, model: Distilled) -> dict[str, Ask]:
        """Of a student one step, all that it was trained for, and those with its teacher's help; of others what they do."""
        compile = self.config.strategy.compile or None
        if isinstance(model, OneStepGenerator):
            return {"DD2, 1 step": Ask(compile=compile), "DD2, 1 step, not snapped": Ask(split=0, compile=compile)}
        if not isinstance(model, Student):
            return {"diffusion, token by token": Ask()}
        steps = model.timesteps
        found = {"DD1, 1 step": Ask(steps=[0], compile=compile)}
        if len(steps) > 1:
            keep = steps[-1] // 2 if self.config.keep is None else self.config.keep
            helper = Helper(self.teacher.generator, self.config.seed, self._sampling)
            found[f"DD1, {len(steps)} steps"] = Ask(compile=compile)
            found[f"DD1, teacher from {keep} to {steps[-1]}"] = Ask(keep=keep, teacher=helper, compile=compile)
        return found

    def _choices(self, sampling: Mapping[str, Any]) -> Choices:
        """Guided and tempered, not truncated: what a student says beyond the truncation is unlikely, not impossible."""
        return choices_for(self.teacher.generator, guidance=sampling["guidance"], temperature=sampling["temperature"])

    @torch.inference_mode()
    def _draw(self, way: Way, labels: Tensor, title: str, tally: Tally) -> Iterator[dict[str, Tensor]]:
        """Batches of `codes`, `label` and perhaps `vectors`."""
        codebook, size = codebook_of(self.teacher.tokenizer), self.config.batch_size
        with progress_bar(None, len(labels), title) as advance:
            for start in range(0, len(labels), size):
                part = labels[start : start + size].to(self.device)
                found = way(part, range(start, start + len(part)), tally)
                yield _batch(found, codebook) | {"label": part}
                advance(len(part))

    def _times(self, ways: Mapping[str, Way], labels: Tensor) -> dict[str, dict[str, float]]:
        """Milliseconds from classes to tokens, `ms_1` and `ms_32`, the decoder of images left out."""
        found: dict[str, dict[str, float]] = {name: {} for name in ways}
        with progress_bar(None, len(ways) * len(BATCHES) * self.config.turns, "timing") as advance:
            for size in BATCHES:
                part = labels[torch.arange(size) % len(labels)].to(self.device)
                calls = {name: _call(way, part) for name, way in ways.items()}
                for name, seconds in in_turns(calls, self.config.turns, self.device, advance).items():
                    found[name][f"ms_{size}"] = 1000 * seconds
        slowest = found["teacher"][f"ms_{BATCHES[-1]}"]
        return {name: {**times, "times_as_fast": slowest / times[f"ms_{BATCHES[-1]}"]} for name, times in found.items()}


def _call(way: Way, labels: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def call() -> None:
        way(labels, range(len(labels)), Tally())

    return call


def _batch(found: Tensor, codebook: Tensor) -> dict[str, Tensor]:
    if found.is_floating_point():
        return {"vectors": found, "codes": nearest(found, codebook)}
    return {"codes": found}


@dataclass(frozen=True)
class Judges:
    """What the ways are held against.

    Args:
        contest: whose config counts.
        judging: the measures of images.
        reference: real images.
        codes: `[N, T]`, the teacher's, of another seed than its row.
        labels: `[N]`.
        choices: of the teacher's distribution.
    """

    contest: Contest
    judging: Judging
    reference: Reference
    codes: Tensor
    labels: Tensor
    choices: Choices

    def measure(self, name: str, way: Way) -> Result:
        """All numbers of one way but its times."""
        tally, parts = Tally(), list[dict[str, Tensor]]()
        config, teacher = self.contest.config, self.contest.teacher

        def kept() -> Iterator[dict[str, Tensor]]:
            for batch in self.contest._draw(way, self.labels, name, tally):
                nll = token_nll(teacher, batch["codes"], batch["label"], self.choices)
                parts.append({"codes": batch["codes"].cpu(), "nll": nll.cpu()})
                yield batch

        images = decode_batches(teacher.tokenizer, kept())
        score = self.judging.score(len(self.labels))
        for batch in images:
            score.update(batch)
        seen = evaluate_samples(score, len(self.labels), self.reference)
        codes = torch.cat([part["codes"] for part in parts])
        nll = torch.cat([part["nll"] for part in parts])
        numbers = {
            **seen.numbers,
            "teacher_nll": float(nll.double().mean()),
            "distinct_codes": float(distinct(codes)),
            **self._pairs(codes),
            **tally.per_image,
        }
        subject = {"way": name, "teacher": config.model, "student": config.student, "dd2": config.dd2, "seed": config.seed}
        return Result("distillation", numbers, {**seen.protocol, **self._protocol()}, subject)

    def _pairs(self, codes: Tensor) -> dict[str, float]:
        ours, theirs = self._information(codes), self._teachers
        return {"pair_information": over_pairs(ours), "pair_information_error": over_pairs((ours - theirs).abs())}

    @cached_property
    def _groups(self) -> Tensor:
        return groups_of(codebook_of(self.contest.teacher.tokenizer), self.contest.config.groups)

    @cached_property
    def _teachers(self) -> Tensor:
        return self._information(self.codes)

    def _information(self, codes: Tensor) -> Tensor:
        return beyond_chance(self._groups[codes.cpu()], self.labels, self.contest.config.groups)

    def _protocol(self) -> dict[str, Any]:
        config, device = self.contest.config, self.contest.device
        return {
            "teacher": weights_hash(self.contest.teacher.generator)[:16],
            "sampling": self.contest.sampling_of(self.contest.teacher),
            "teacher_nll": "nats per token under the teacher, guided and tempered, not truncated",
            "pair_information": f"nats given the class beyond chance, between {config.groups} groups of codes, mean over pairs",
            "pair_information_error": "mean absolute difference to as many samples of the teacher, of another seed",
            "evaluations": "passes of the network, those with guidance twice",
            "time": {
                "from": "classes", "to": "tokens, images not decoded", "turns": config.turns, "device": device.type,
                "threads": torch.get_num_threads(), "compile": config.strategy.compile,
            },
        }  # fmt: skip


@torch.inference_mode()
def token_nll(teacher: OpenedGenerator, codes: Tensor, labels: Tensor, choices: Choices) -> Tensor:
    """Nats `[B, T]` of codes under what the teacher draws them from, given those before."""
    logits = distributions(teacher.generator, codes, labels, choices)
    return -logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]


def rows_of(results: Sequence[Result]) -> list[list[str]]:
    """The table, its header first."""
    names = list(results[0].numbers)
    return [["way", *names], *([str(result.subject["way"]), *map(_short, result.numbers.values())] for result in results)]


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def draw_plane(results: Sequence[Result], path: Path) -> Path:
    """Every way as a point: its time for an image of a batch, and its Fréchet distance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    distance = next(name for name in results[0].numbers if name.startswith("fd_"))
    for result in results:
        place = (result.numbers[f"ms_{BATCHES[-1]}"] / BATCHES[-1], result.numbers[distance])
        axis.plot(*place, marker="o")
        axis.annotate(str(result.subject["way"]), place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel(f"ms an image, {BATCHES[-1]} at once, without the decoder")
    axis.set_ylabel(distance.replace("fd_", "Fréchet distance, "))
    axis.margins(x=0.3)
    axis.grid(alpha=0.3)
    return save_figure(figure, path)
