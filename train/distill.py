"""The distill stage: a one-step student of a teacher's trajectories (Distilled Decoding 1), from pairs or drawn on the fly."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..conf.stages import DistillRun, TaughtRun
from ..data.pairs import PairDataset, PairNumbers
from ..data.stream import to_uint8
from ..models.build import build, weights_hash
from ..models.distill import dd1
from ..models.distill.codebook import codebook_of, decode_vectors
from ..models.distill.flow_map import TokenMap
from ..models.distill.students import student_node
from ..models.distill.trajectory import check_teacher, follow
from ..models.open import OpenedGenerator, open_generator
from ..models.tokenizers.losses import LPIPS
from .clock import Clock
from .network import Trainable
from .pairs import BAKED_IN
from .randomness import sample_uniform
from .stage import Batch, Networks

STEP_SALT = 1


def open_teacher(config: TaughtRun) -> OpenedGenerator:
    """The teacher and its tokenizer.

    Raises:
        UserError: none there, or of a kind that has no trajectories.
    """
    place = Path(config.decode_with) if config.decode_with else None
    opened = open_generator(Path(config.model), tokenizer=place)
    check_teacher(opened.generator)
    opened.check_guidance(config.sampling.guidance)
    return opened


def open_pairs(config: TaughtRun, opened: OpenedGenerator) -> list[PairDataset | PairNumbers]:
    """Pairs to learn from and those held out: as they lie on disk, or their numbers alone.

    Raises:
        UserError: pairs of another teacher, tokenizer or guidance.
    """
    layout, tokenizer_hash = opened.tokenizer.layout.to_dict(), weights_hash(opened.tokenizer)
    if config.pairs is None:
        classes = opened.facts.get("classes") or [str(number) for number in range(opened.generator.num_classes)]
        counts = (config.count, config.loop.eval_samples)
        return [
            PairNumbers(layout, classes, config.seed, count, held) for count, held in zip(counts, (False, True), strict=True)
        ]
    teacher, sampling = weights_hash(opened.generator), config.sampling.model_dump(include=set(BAKED_IN))
    folders = [Path(config.pairs) / split for split in ("train", "val")]
    return [PairDataset(folder, layout, tokenizer_hash, teacher=teacher, sampling=sampling) for folder in folders]


class DistillStage:
    """A student learns to go from a point of a trajectory to its end; every sample's point is one of its timesteps.

    Args:
        config: of the run.
        opened: the teacher, whose weights the student begins with, and the tokenizer; frozen.
    """

    def __init__(self, config: DistillRun, opened: OpenedGenerator) -> None:
        self.config, self.teacher, self.tokenizer = config, opened.generator, opened.tokenizer
        self.codebook = codebook_of(self.tokenizer)
        node = student_node(opened.node, self.teacher, self.codebook.shape[1], config.student.timesteps, config.student.split)
        self.student = build(node)
        self.student.load_state_dict(self.student.weights_from(self.teacher))
        facts = {**opened.facts, "teacher": {"path": config.model, "hash": weights_hash(self.teacher)}}
        self.trainables = {"student": Trainable(self.student, node, config.optim, facts=facts)}
        self.frozen: list[nn.Module] = [self.tokenizer.requires_grad_(False).eval(), self.teacher.requires_grad_(False).eval()]
        self.lpips: LPIPS | None = None
        if config.losses.perceptual_weight:
            self.lpips = LPIPS(config.losses.lpips_weights)
            self.frozen.append(self.lpips)

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch."""
        steps = torch.tensor([self.student.tokens_in(units) for units in self.student.timesteps], device=batch["label"].device)
        uniform = sample_uniform(self.config.seed, batch["epoch"], batch["index"], STEP_SALT)
        losses = self._losses(batch, steps[(uniform * len(steps)).long()], networks)[0]
        networks["student"].backward(losses["loss"])
        return losses

    def _losses(self, batch: Batch, done: Tensor, networks: Networks) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses by name, and codes `[B, N]` of the student's logits and of the teacher."""
        codes, codebook, weights = self._codes(batch), self.codebook.to(done.device), self.config.losses
        pending = self.student.pending(done)
        found = networks["student"](dd1.point(codes, batch["noise"], codebook, pending), batch["label"], done)
        losses = dd1.losses(
            found, codes, codebook, pending, vector_weight=weights.vector_weight,
            perceptual=self._perceptual if self.lpips else None, perceptual_weight=weights.perceptual_weight,
        )  # fmt: skip
        return losses, found.logits.argmax(-1), codes

    def _codes(self, batch: Batch) -> Tensor:
        if "codes" in batch:
            return batch["codes"].long()
        token_map = TokenMap(self.codebook.to(batch["noise"].device))
        choices = self.config.sampling.model_dump(include=set(BAKED_IN))
        return follow(self.teacher, batch["label"], batch["noise"], token_map, **choices).clone()  # out of inference mode

    def _perceptual(self, vectors: Tensor, true: Tensor) -> Tensor:
        assert self.lpips is not None
        distance: Tensor = self.lpips(decode_vectors(self.tokenizer, vectors), decode_vectors(self.tokenizer, true))
        return distance.mean()

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Of one step on noise that was held out: losses, the share of whole sequences, and what it bounds.

        The total variation distance between student and teacher is at most `tv_bound`, one minus `sequence_accuracy`.
        """
        losses, ours, codes = self._losses(batch, torch.zeros_like(batch["label"]), networks)
        accuracy = dd1.sequence_accuracy(ours, codes).float()
        return {**losses, "sequence_accuracy": accuracy, "tv_bound": 1 - accuracy}

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Ends of the same trajectories: the teacher's, and the student's in one step and in all."""
        codebook = self.codebook.to(batch["noise"].device)
        ask = (self.student, codebook, batch["label"], batch["noise"])
        vectors = {"one_step": dd1.generate(*ask, steps=[0])}
        if len(self.student.timesteps) > 1:
            vectors[f"{len(self.student.timesteps)}_steps"] = dd1.generate(*ask)
        pictures = {name: decode_vectors(self.tokenizer, found) for name, found in vectors.items()}
        pictures["teacher"] = self.tokenizer.decode(self._codes(batch))
        return {name: to_uint8(images) for name, images in pictures.items()}
