"""The two stages of Distilled Decoding 2: the autoregressive diffusion model of a teacher, and its one-step generator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conf.duration import Duration
from ..conf.stages import DD2Run, DiffusionRun
from ..data.stream import to_uint8
from ..errors import UserError
from ..models.build import build, load_model, locate_model, model_node, weights_hash
from ..models.distill import dd2
from ..models.distill.adapt import VectorEmbedding, fit_embedding
from ..models.distill.ar_diffusion import ARDiffusion
from ..models.distill.codebook import codebook_of, decode_vectors, nearest
from ..models.distill.flow_map import TokenMap
from ..models.distill.one_step import OneStepGenerator
from ..models.distill.trajectory import distributions, follow
from ..models.generators.next_token import NextToken
from ..models.open import OpenedGenerator
from ..models.samplers.decode import choices_for
from .clock import Clock
from .network import Trainable
from .pairs import BAKED_IN
from .stage import Batch, Networks


class _Taught:
    """What both stages know: a teacher, its tokenizer, its guided and truncated distributions."""

    def __init__(self, config: DiffusionRun | DD2Run, opened: OpenedGenerator) -> None:
        self.teacher, self.tokenizer = opened.generator, opened.tokenizer
        self.codebook = codebook_of(self.tokenizer)
        self.baked_in: dict[str, Any] = config.sampling.model_dump(include=set(BAKED_IN))
        self.choices = choices_for(self.teacher, **self.baked_in)
        kept = config.sampling.top_k
        self.support = kept if 0 < kept < self.teacher.vocab_size else None
        self.facts = {**opened.facts, "teacher": {"path": config.model, "hash": weights_hash(self.teacher)}}
        self.frozen: list[nn.Module] = [self.tokenizer.requires_grad_(False).eval(), self.teacher.requires_grad_(False).eval()]

    def logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """What each token would be drawn from given codes `[B, N]` before it, `[B, N, V]`."""
        return distributions(self.teacher, codes, condition, self.choices)

    def likelihood(self, codes: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Of samples: nats per token under the teacher, and how many codes they use; the former alone can be gamed."""
        used = torch.bincount(codes.flatten(), minlength=self.teacher.vocab_size) > 0
        return {"teacher_nll": self.teacher.token_nll(codes, condition).mean(), "distinct_codes": used.sum().float()}


def diffusion_node(node: Mapping[str, Any], teacher: nn.Module, embed_dim: int, config: DiffusionRun) -> dict[str, Any]:
    """The node of the diffusion model of a teacher; a next-token one learns to read vectors."""
    if isinstance(teacher, NextToken):
        continuous = "tokar.models.distill.adapt.continuous"
        node = {"_target_": continuous, "teacher": dict(node), "embed_dim": embed_dim, "hidden": config.hidden}
    head = {"embed_dim": embed_dim, "width": config.width, "depth": config.depth}
    return {"_target_": "tokar.models.distill.ar_diffusion.ARDiffusion", "teacher": dict(node), **head}


class DiffusionStage:
    """The teacher's sequences are noised, and the model regresses the teacher's exact velocity at them (GTS).

    Args:
        config: of the run.
        opened: the teacher, whose weights it begins with.
    """

    def __init__(self, config: DiffusionRun, opened: OpenedGenerator) -> None:
        self.config, self.taught = config, _Taught(config, opened)
        codebook = self.taught.codebook
        node = diffusion_node(opened.node, opened.generator, codebook.shape[1], config)
        self.model: ARDiffusion = build(node)
        self._begin(opened.generator, codebook)
        self.model.bind(opened.tokenizer)
        self.trainables = {"model": Trainable(self.model, node, config.optim, facts=self.taught.facts)}
        self.frozen = self.taught.frozen

    def _begin(self, teacher: nn.Module, codebook: Tensor) -> None:
        own = self.model.backbone.state_dict()
        shared = {name: value for name, value in teacher.state_dict().items() if name in own}
        self.model.backbone.load_state_dict({**own, **shared})
        tokens = getattr(self.model.backbone, "tokens", None)
        if isinstance(tokens, VectorEmbedding) and isinstance(teacher, NextToken):
            fit_embedding(tokens, teacher.tokens.weight.detach(), codebook, self.config.fit_steps)

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch."""
        loss = self._loss(batch, networks)
        networks["model"].backward(loss)
        return {"loss": loss}

    def _loss(self, batch: Batch, networks: Networks) -> Tensor:
        codes, labels = self._codes(batch), batch["label"]
        codebook = self.taught.codebook.to(codes.device)
        score = dd2.TeacherScore(self.taught.logits(codes, labels), codebook, self.taught.support, self.config.chunk)
        tau, noise = dd2.draw_levels(self.config.draws, F.embedding(codes, codebook))
        return dd2.ground_truth_score_loss(networks["model"], codes, labels, score, codebook, tau, noise)

    def _codes(self, batch: Batch) -> Tensor:
        if "codes" in batch:
            return batch["codes"].long()
        token_map = TokenMap(self.taught.codebook.to(batch["noise"].device))
        return follow(self.taught.teacher, batch["label"], batch["noise"], token_map, **self.taught.baked_in).clone()

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """The loss, and of its own samples the teacher's likelihood."""
        samples = self.model.sample(batch["noise"], batch["label"], self._book(batch), self.config.steps)
        return {"loss": self._loss(batch, networks), **self.taught.likelihood(samples, batch["label"])}

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Samples, token by token."""
        samples = self.model.sample(batch["noise"], batch["label"], self._book(batch), self.config.steps)
        return {"samples": to_uint8(self.taught.tokenizer.decode(samples))}

    def _book(self, batch: Batch) -> Tensor:
        return self.taught.codebook.to(batch["noise"].device)


class DD2Stage:
    """Conditional score distillation: the fake score network at every step, the generator at every `fake_updates`-th.

    Args:
        config: of the run.
        opened: the teacher.
    """

    def __init__(self, config: DD2Run, opened: OpenedGenerator) -> None:
        self.config, self.taught = config, _Taught(config, opened)
        begun = locate_model(Path(config.align or config.diffusion))
        follows = locate_model(Path(config.align), "fake") if config.align else begun
        self.generator, node = self._read(begun, OneStepGenerator, opened)
        self.fake, fake_node = self._read(follows, ARDiffusion, opened)
        self.trainables = {
            "generator": Trainable(self.generator, node, config.optim, facts=self.taught.facts),
            "fake": Trainable(self.fake, fake_node, config.fake_optim, ema=False),
        }
        self.frozen = self.taught.frozen

    def _read(self, folder: Path, role: type[ARDiffusion], opened: OpenedGenerator) -> tuple[ARDiffusion, dict[str, Any]]:
        """A network in its role with the weights of a folder, and its node."""
        weights = load_model(folder)
        if not isinstance(weights, ARDiffusion):
            raise UserError(
                f"holds a {type(weights).__name__}, not a diffusion model",
                where=folder,
                fix="point at a run of train diffusion",
            )
        node = {**model_node(folder), "_target_": f"{role.__module__}.{role.__name__}"}
        model: ARDiffusion = build(node)
        model.load_state_dict(weights.state_dict())
        model.bind(opened.tokenizer)
        return model.train(), node

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch: of the fake score network, and when its turn has come of the generator."""
        labels, book = batch["label"], self.taught.codebook.to(batch["noise"].device)
        with torch.no_grad():
            x = networks["generator"](batch["noise"], labels)
        tau, noise = dd2.draw_levels(self.config.draws, x)
        loss = dd2.fake_score_loss(networks["fake"], x, dd2.prefix_of(x, book, True), labels, tau, noise)
        networks["fake"].backward(loss)
        metrics = {"loss": loss, "code_distance": (x - F.embedding(nearest(x, book), book)).norm(dim=-1).mean()}
        if self._generators_turn(clock):
            metrics["generator_loss"] = self._train_generator(labels, book, networks)
        return metrics

    def _generators_turn(self, clock: Clock) -> bool:
        rested = clock.step >= Duration.parse(self.config.generator_rests).steps(clock.batch_size, clock.dataset_size)
        return rested and (clock.step + 1) % self.config.fake_updates == 0

    def _train_generator(self, labels: Tensor, book: Tensor, networks: Networks) -> Tensor:
        start = torch.randn(len(labels), self.taught.teacher.plan.n_tokens, book.shape[1], device=labels.device)
        x = networks["generator"](start, labels)
        tau, noise = dd2.draw_levels(self.config.draws, x)
        gradients = [(weight, weight.requires_grad) for weight in self.fake.parameters()]
        self.fake.requires_grad_(False)  # its gradient of this step is kept: it has its own loss
        loss = dd2.generator_loss(
            x, self.fake, lambda prefix: self.taught.logits(nearest(prefix, book), labels), book, labels, tau, noise,
            form=self.config.form, alpha=self.config.alpha, snap=True, support=self.taught.support, chunk=self.config.chunk,
        )  # fmt: skip
        networks["generator"].backward(loss)
        for weight, trained in gradients:
            weight.requires_grad_(trained)
        return loss

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Of one step: how far from codes it lands, and the teacher's likelihood of the nearest ones."""
        book = self.taught.codebook.to(batch["noise"].device)
        x = self.generator.generate(batch["noise"], batch["label"])
        codes = nearest(x, book)
        distance = (x - F.embedding(codes, book)).norm(dim=-1).mean()
        return {"code_distance": distance, **self.taught.likelihood(codes, batch["label"])}

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """One step, as it lands and as its nearest codes."""
        x = self.generator.generate(batch["noise"], batch["label"])
        codes = nearest(x, self.taught.codebook.to(x.device))
        pictures = {"one_step": decode_vectors(self.taught.tokenizer, x), "snapped": self.taught.tokenizer.decode(codes)}
        return {name: to_uint8(images) for name, images in pictures.items()}
