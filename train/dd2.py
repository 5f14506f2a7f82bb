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
from ..models.build import build, load_model, locate_model, model_facts, model_node, weights_hash
from ..models.distill import dd2
from ..models.distill.adapt import continuous_node, inherit, reads_codes_alone
from ..models.distill.ar_diffusion import ARDiffusion, euler_counts
from ..models.distill.codebook import codebook_of, decode_vectors, nearest
from ..models.distill.flow_map import TokenMap
from ..models.distill.one_step import OneStepGenerator
from ..models.distill.students import without_dropout
from ..models.distill.trajectory import distributions, follow
from ..models.open import OpenedGenerator
from ..models.samplers.decode import choices_for
from .clock import Clock
from .network import Trainable
from .pairs import BAKED_IN
from .randomness import sample_normals, sample_uniforms
from .stage import Batch, Networks

LEVEL_SALT, GENERATOR_SALT, START_SALT, FAKE_SALT = 1, 3, 5, 6
"""The first two draw noise levels and, under the next number, noise; the others where the generator begins."""


class _Taught:
    """What both stages know: a teacher, its tokenizer, its guided and truncated distributions."""

    def __init__(self, config: DiffusionRun | DD2Run, opened: OpenedGenerator) -> None:
        self.seed, self.draws, self.level_power = config.seed, config.draws, config.level_power
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

    def codes(self, batch: Batch) -> Tensor:
        """Of pairs `[B, N]`; where they have none yet the teacher makes them of their noise."""
        if "codes" in batch:
            return batch["codes"].long()
        token_map = TokenMap(self.codebook.to(batch["noise"].device))
        return follow(self.teacher, batch["label"], batch["noise"], token_map, **self.baked_in).clone()

    def levels(self, batch: Batch, salt: int) -> tuple[Tensor, Tensor]:
        """Noise levels `[M, B, N]` and noise `[M, B, N, D]` for each token; of a sample the same on any number of ranks."""
        count, (tokens, width) = self.draws, batch["noise"].shape[1:]
        place = (self.seed, batch["epoch"], batch["index"])
        uniform = sample_uniforms(*place, salt, count * tokens).unflatten(1, (count, tokens))
        normal = sample_normals(*place, salt + 1, count * tokens * width).unflatten(1, (count, tokens, width))
        return dd2.levels(uniform, self.level_power).transpose(0, 1), normal.transpose(0, 1)

    def likelihood(self, codes: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Of samples: nats per token under the teacher, and how often they use each code; the former alone can be gamed."""
        used = torch.bincount(codes.flatten(), minlength=self.teacher.vocab_size)
        return {"teacher_nll": self.teacher.token_nll(codes, condition).mean(), "codes": used}


def diffusion_node(node: Mapping[str, Any], teacher: nn.Module, embed_dim: int, config: DiffusionRun) -> dict[str, Any]:
    """The node of the diffusion model of a teacher; a next-token one of codes learns to read vectors."""
    node = without_dropout(node)
    if reads_codes_alone(teacher):
        node = continuous_node(node, embed_dim, config.hidden)
    head = {"embed_dim": embed_dim, "width": config.width, "depth": config.depth}
    return {"_target_": "tokar.models.distill.ar_diffusion.ARDiffusion", "teacher": node, **head}


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
        inherit(self.model.backbone, opened.generator, codebook, config.fit_steps)
        self.model.bind(opened.tokenizer)
        euler_counts(config.steps, self.model.plan, "steps")  # else a mistake would stop the run at its first picture
        self.model.backbone.requires_grad_(not config.head_only)
        self.trainables = {"model": Trainable(self.model, node, config.optim, facts=self.taught.facts)}
        self.frozen = self.taught.frozen

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch."""
        loss = self._loss(batch, networks)
        networks["model"].backward(loss)
        return {"loss": loss}

    def _loss(self, batch: Batch, networks: Networks) -> Tensor:
        codes, labels = self.taught.codes(batch), batch["label"]
        codebook = self.taught.codebook.to(codes.device)
        score = dd2.TeacherScore(self.taught.logits(codes, labels), codebook, self.taught.support, self.config.chunk)
        tau, noise = self.taught.levels(batch, LEVEL_SALT)
        return dd2.ground_truth_score_loss(networks["model"], codes, labels, score, codebook, tau, noise)

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """The loss, and of its own samples the teacher's likelihood."""
        with networks["model"].gathered():
            samples = self._samples(batch)
        return {"loss": self._loss(batch, networks), **self.taught.likelihood(samples, batch["label"])}

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Samples, token by token."""
        return {"samples": to_uint8(self.taught.tokenizer.decode(self._samples(batch)))}

    def _samples(self, batch: Batch) -> Tensor:
        codebook = self.taught.codebook.to(batch["noise"].device)
        return self.model.sample(batch["noise"], batch["label"], codebook, self.config.steps)


class DD2Stage:
    """Conditional score distillation: the fake score network at every step, the generator at every `fake_updates`-th.

    The generator may also learn by regression, to the tokens that the teacher makes of the same noise: beside the scores, or
    alone, as where it begins.

    Args:
        config: of the run.
        opened: the teacher.

    Raises:
        UserError: what it begins with is of another kind or teacher.
    """

    def __init__(self, config: DD2Run, opened: OpenedGenerator) -> None:
        self.config, self.taught = config, _Taught(config, opened)
        begun = locate_model(Path(config.after or config.diffusion))
        follows = locate_model(Path(config.after), "fake") if config.after else begun
        self.generator, node = self._read(begun, OneStepGenerator, opened)
        self.fake, fake_node = self._read(follows, ARDiffusion, opened)
        self.trainables = {
            "generator": Trainable(self.generator, node, config.optim, facts=self.taught.facts),
            "fake": Trainable(self.fake, fake_node, config.fake_optim, ema=False, facts=self.taught.facts),
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
        if (model_facts(folder).get("teacher") or {}).get("hash") != self.taught.facts["teacher"]["hash"]:
            raise UserError(
                "was made from another teacher", where=folder, fix="give the teacher it was made from, or train one of this"
            )
        node = {**model_node(folder), "_target_": f"{role.__module__}.{role.__name__}"}
        model: ARDiffusion = build(node)
        model.load_state_dict(weights.state_dict())
        model.bind(opened.tokenizer)
        return model.train(), node

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch: of the fake score network, and when its turn has come of the generator."""
        book = self.taught.codebook.to(batch["noise"].device)
        metrics = self._train_fake(batch, book, networks) if self.config.score_weight else {}
        if self._generators_turn(clock):
            metrics |= self._train_generator(batch, book, networks)
        return metrics

    def _train_fake(self, batch: Batch, book: Tensor, networks: Networks) -> dict[str, Tensor]:
        labels, (tau, noise) = batch["label"], self.taught.levels(batch, LEVEL_SALT)
        with torch.no_grad():
            x = networks["generator"](self._noise(batch, FAKE_SALT), labels)
        loss = dd2.fake_score_loss(networks["fake"], x, dd2.prefix_of(x, book, True), labels, tau, noise)
        networks["fake"].backward(loss)
        return {"loss": loss, "code_distance": (x - F.embedding(nearest(x, book), book)).norm(dim=-1).mean()}

    def _noise(self, batch: Batch, salt: int) -> Tensor:
        """Noise `[B, N, D]` that no epoch repeats, unlike that of the pairs."""
        like = batch["noise"]
        return sample_normals(self.config.seed, batch["epoch"], batch["index"], salt, like[0].numel()).view_as(like)

    def _generators_turn(self, clock: Clock) -> bool:
        if not self.config.score_weight:
            return True
        rested = clock.step >= Duration.parse(self.config.generator_rests).steps(clock.batch_size, clock.dataset_size)
        return rested and (clock.step + 1) % self.config.fake_updates == 0

    def _train_generator(self, batch: Batch, book: Tensor, networks: Networks) -> dict[str, Tensor]:
        """One pass over new noise and, for regression, that of the pairs; losses are means over their own part."""
        by_score, by_pairs = self.config.score_weight, self.config.pair_weight
        noise = [self._noise(batch, START_SALT)] * bool(by_score) + [batch["noise"]] * bool(by_pairs)
        made = networks["generator"](torch.cat(noise), batch["label"].repeat(len(noise))).chunk(len(noise))
        total, metrics = made[0].new_zeros(()), {}
        if by_score:
            surrogate, metrics["generator_loss"] = self._score_loss(made[0], batch, book, networks)
            total = total + by_score * surrogate
        if by_pairs:
            by_regression = dd2.pair_loss(made[-1], self.taught.codes(batch), book)
            metrics["pair_loss" if by_score else "loss"] = by_regression
            total = total + by_pairs * by_regression
        networks["generator"].backward(total)
        return metrics

    def _score_loss(self, x: Tensor, batch: Batch, book: Tensor, networks: Networks) -> tuple[Tensor, Tensor]:
        """A surrogate of the loss, and the loss: the cut-graph step, no backward through two networks (`TokenizerStage`).

        The loss is differentiated down to the generated tokens only, the generator's backward starts from a surrogate that has
        that very gradient; the fake score network's gradient of this step, which has its own loss, is left as it is.
        """
        labels, (tau, noise) = batch["label"], self.taught.levels(batch, GENERATOR_SALT)
        leaf = x.detach().requires_grad_()
        with networks["fake"].apart() as fake:
            loss = dd2.generator_loss(
                leaf, fake, lambda prefix: self.taught.logits(nearest(prefix, book), labels), book, labels, tau, noise,
                form=self.config.form, alpha=self.config.alpha, snap=True, support=self.taught.support, chunk=self.config.chunk,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, leaf)
        return (x * gradient).sum(), loss.detach()

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Of one step: how far from codes it lands, and the teacher's likelihood of the nearest ones."""
        book = self.taught.codebook.to(batch["noise"].device)
        x = networks["generator"](batch["noise"], batch["label"])
        codes = nearest(x, book)
        distance = (x - F.embedding(codes, book)).norm(dim=-1).mean()
        return {"code_distance": distance, **self.taught.likelihood(codes, batch["label"])}

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """One step, as it lands and as its nearest codes."""
        x = self.generator.generate(batch["noise"], batch["label"])
        codes = nearest(x, self.taught.codebook.to(x.device))
        pictures = {"one_step": decode_vectors(self.taught.tokenizer, x), "snapped": self.taught.tokenizer.decode(codes)}
        return {name: to_uint8(images) for name, images in pictures.items()}
