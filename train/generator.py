"""The generator stage: next-token (or any plan's) likelihood of codes, from code shards or encoded on the fly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..conf.stages import GeneratorRun
from ..data.stream import to_image, to_uint8
from ..errors import UserError
from ..evaluate.images import Picture
from ..evaluate.reveal import reveal
from ..models.build import build
from ..models.generators.base import Generator
from ..models.samplers.decode import choices_for, sample
from ..models.samplers.guidance import check_guidance
from ..models.tokenizers.base import Tokenizer
from .clock import Clock
from .network import Trainable
from .randomness import sample_uniform, sample_uniforms
from .stage import Batch, Networks

DROPOUT_SALT, NOISE_SALT = 1, 2
SHOWN = 6
"""Samples that are shown building up."""


class GeneratorStage:
    """Maximum likelihood of codes given a class or a text; a share of the samples is trained without.

    Args:
        config: of the run.
        node: the generator's node, complete with what the layout and the classes decide.
        tokenizer: decodes codes for pictures, and encodes images where there are no code shards; frozen. `None`: no pictures.
        facts: layout, classes, tokenizer: what a reader of the weights must know.
    """

    def __init__(self, config: GeneratorRun, node: dict[str, Any], tokenizer: Tokenizer | None, facts: dict[str, Any]) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.generator: Generator = build(node)
        if tokenizer is not None:
            self.generator.bind(tokenizer)
        elif self.generator.needs_tokenizer:
            raise UserError(
                f"a {type(self.generator).__name__} looks at reconstructions of its tokenizer, which is not here",
                where="codes.tokenizer",
                fix="give the run of the tokenizer that made the codes",
            )
        drawn = config.sampling.model_dump(exclude={"cache", "compile"})
        choices_for(self.generator, **drawn)  # else a mistake in them would stop the run at its first picture
        check_guidance(config.sampling.guidance, self.generator.plan, config.class_dropout)
        self.trainables = {"generator": Trainable(self.generator, node, config.optim, facts=facts)}
        self.frozen: list[nn.Module] = [] if tokenizer is None else [tokenizer.requires_grad_(False).eval()]

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch."""
        uniform = sample_uniform(self.config.seed, batch["epoch"], batch["index"], DROPOUT_SALT)
        condition = self._condition(batch)
        dropped = (uniform < self.config.class_dropout).view(-1, *[1] * (condition.ndim - 1))
        condition = torch.where(dropped, self.generator.null(condition), condition)
        self.generator.anneal(clock.step / clock.total)
        losses = self._losses(batch, condition, networks)
        networks["generator"].backward(losses["loss"])
        return losses

    def _losses(self, batch: Batch, condition: Tensor, networks: Networks) -> dict[str, Tensor]:
        """Losses with random numbers that are each sample's own, whatever the batch or the rank."""
        size = self.generator.noise_size
        noise = [sample_uniforms(self.config.seed, batch["epoch"], batch["index"], NOISE_SALT, size)] if size else []
        losses: dict[str, Tensor] = networks["generator"](self._codes(batch), condition, *noise)
        return losses

    def _condition(self, batch: Batch) -> Tensor:
        return batch["label"] if self.generator.text is None else batch["text"].float()

    def _codes(self, batch: Batch) -> Tensor:
        if "codes" in batch:
            return batch["codes"].long()
        assert self.tokenizer is not None
        with torch.no_grad():
            return self.tokenizer.encode(to_image(batch["image"])).codes

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Loss in nats and bits per token of held-out codes, given their class or text."""
        losses = self._losses(batch, self._condition(batch), networks)
        return {**losses, "bits_per_token": losses["loss"] / math.log(2)}

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor | Picture]:
        """Samples, classes in turn or the texts of the batch, and how the first build up; the same seeds every time."""
        if self.tokenizer is None:
            return {}
        condition = self._condition(batch)
        if self.generator.text is None:
            condition = torch.arange(len(condition), device=condition.device) % self.generator.num_classes
        sampling = self.config.sampling.model_dump()
        codes = sample(self.generator, condition, seed=self.config.seed, **sampling)
        pictures: dict[str, Tensor | Picture] = {"samples": to_uint8(self.tokenizer.decode(codes))}
        if built := reveal(self.tokenizer, self.generator.plan, codes[:SHOWN]):
            pictures["partial"] = built
        return pictures
