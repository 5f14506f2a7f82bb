"""The tokenizer stage: reconstruction, perceptual, adversarial and quantizer losses; two networks, two optimizers.

Shapes: images `[B, 3, H, W]` in [-1, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.grad import conv2d_weight

from ..conf.stages import TokenizerLosses, TokenizerParts
from ..data.stream import to_image, to_uint8
from ..errors import UserError
from ..evaluate.images import Picture
from ..evaluate.prefixes import build_up
from ..evaluate.reconstruction import psnr, ssim
from ..models.build import build
from ..models.ranks import ranks, sum_over_ranks
from ..models.tokenizers.base import Tokenizer, TokenizerOutput
from ..models.tokenizers.discriminators import LeCamDiscriminator
from ..models.tokenizers.losses import (
    LPIPS,
    ConvNextPerceptual,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    reconstruction_loss,
    warm_up,
)
from ..models.tokenizers.teachers import Teacher, semantic_loss
from .clock import Clock
from .network import Network, Trainable
from .stage import Batch, Networks

SHOWN = 6
"""Images that are shown building up."""


class TokenizerStage:
    """VQ-GAN training (Esser et al. 2021; LlamaGen's settings by config).

    The tokenizer minimises fid + λ_a·u·w·adv + the quantizer's losses, with fid = λ_r·rec + λ_p·LPIPS + λ_c·ConvNeXt, u the
    warm-up, and w 1 or the adaptive weight ‖∇_L fid‖ / (‖∇_L adv‖ + 1e-4) over the last layer L, clamped to [0, 1e4].
    The discriminator rests before `adversarial_start`; R1 and LeCam are added to its loss. Until `auxiliary_end` the
    tokenizer's early losses count too: the image losses of a second reconstruction that bypasses the quantizer, and its
    feature loss (GigaTok). With `semantic`, the projected features follow a frozen teacher's: λ_s·(1 - cos).
    """

    def __init__(self, config: TokenizerParts) -> None:
        self.losses = config.losses
        self.tokenizer: Tokenizer = build(config.tokenizer)
        facts = {"layout": self.tokenizer.layout.to_dict()}
        self.trainables = {"tokenizer": Trainable(self.tokenizer, config.tokenizer, config.optim, facts=facts)}
        if config.discriminator is not None:
            node = adversary_node(config.discriminator, config.losses)
            self.trainables["discriminator"] = Trainable(
                build(node), node, config.discriminator_optim, ema=False, twice=config.losses.r1_weight > 0
            )
        self.perceptual = perceptual_losses(config.losses)
        self.semantic = config.semantic
        self.teacher: Teacher | None = build(config.semantic.teacher) if config.semantic is not None else None
        self.frozen: list[nn.Module] = [module for module, _ in self.perceptual.values()]
        if self.teacher is not None:
            self.frozen.append(self.teacher)
        self.last_layer = LastLayer(self.tokenizer.last_layer()) if config.losses.adaptive else None

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch for both networks."""
        image = to_image(batch["image"])
        early = clock.step < clock.steps(self.losses.auxiliary_end)
        output, reconstruction = _forward(networks["tokenizer"], image, early)
        own = output.losses | self._side_losses(output, image)
        adversary = networks.get("discriminator")
        if adversary is None or clock.step < clock.steps(self.losses.adversarial_start):
            losses = self._fidelity(reconstruction, image) | own
            networks["tokenizer"].backward(total(losses))
            return {"loss": total(losses), **losses, **self._histograms(output)}
        losses, observed = self._generator_step(networks, image, reconstruction, own, clock)
        observed |= self._discriminator_step(adversary, image, reconstruction.detach().float(), clock)
        return {"loss": total(losses), **losses, **observed, **self._histograms(output)}

    def rehearse(self, image: Tensor) -> None:
        """Whatever a step puts images through, without gradients.

        Args:
            image: `[B, 3, H, W]`.

        Raises:
            UserError: parts that do not fit each other or the image.
        """
        output: TokenizerOutput = self.tokenizer(image, auxiliary=True)
        assert output.reconstruction is not None
        self._fidelity(output.reconstruction, image)
        self._side_losses(output, image)
        if "discriminator" in self.trainables:
            self.trainables["discriminator"].module(output.reconstruction)

    def _fidelity(self, reconstruction: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Weighted losses that compare the reconstruction with the image."""
        distance = reconstruction_loss(reconstruction.float(), image, self.losses.reconstruction)
        losses = {"reconstruction": self.losses.reconstruction_weight * distance}
        for name, (measure, weight) in self.perceptual.items():
            losses[name] = weight * measure(reconstruction.float(), image).mean()
        return losses

    def _side_losses(self, output: TokenizerOutput, image: Tensor) -> dict[str, Tensor]:
        """Losses beside the reconstruction's and the quantizer's own, weighted."""
        losses = {}
        if output.shortcut is not None:
            losses = {f"shortcut_{name}": loss for name, loss in self._fidelity(output.shortcut, image).items()}
        if self.semantic is not None and self.teacher is not None:
            if output.semantic is None:
                raise UserError(
                    "this tokenizer has no semantic features",
                    where="semantic",
                    fix="give it a semantic head, or set semantic=null",
                )
            losses["semantic"] = self.semantic.weight * semantic_loss(output.semantic, self.teacher(image))
        return losses

    def _generator_step(
        self, networks: Networks, image: Tensor, reconstruction: Tensor, own: dict[str, Tensor], clock: Clock
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The cut-graph step, right under every strategy: no backward passes through two networks.

        The image losses are differentiated down to the reconstruction only, with the discriminator as a plain, frozen
        module; the tokenizer's backward then starts from a surrogate that has that very gradient.
        """
        leaf = reconstruction.detach().float().requires_grad_(True)
        losses = self._fidelity(leaf, image)
        (fidelity,) = torch.autograd.grad(total(losses), leaf)
        adversary = networks["discriminator"].module.requires_grad_(False)
        judged = generator_loss(adversary(leaf), self.losses.adversarial_generator or self.losses.adversarial)
        adversary.requires_grad_(True)
        (adversarial,) = torch.autograd.grad(judged, leaf)
        weight: float | Tensor = self._adversarial_weight(clock)
        observed: dict[str, Tensor] = {}
        if self.last_layer is not None:
            observed["adaptive_weight"] = adaptive_weight(self.last_layer.norm(fidelity), self.last_layer.norm(adversarial))
            weight = weight * observed["adaptive_weight"]
        losses["adversarial"] = weight * judged.detach()
        surrogate = (reconstruction.float() * (fidelity + weight * adversarial)).sum()
        networks["tokenizer"].backward(total({"surrogate": surrogate} | own))  # `own` is empty for quantizers without a loss
        return losses | own, observed

    def _adversarial_weight(self, clock: Clock) -> float:
        """λ_a, risen as far as its warm-up says."""
        start, length = (clock.steps(of) for of in (self.losses.adversarial_start, self.losses.adversarial_warmup))
        return self.losses.adversarial_weight * warm_up(clock.step, start, length)

    def _discriminator_step(self, adversary: Network, image: Tensor, reconstruction: Tensor, clock: Clock) -> dict[str, Tensor]:
        real, fake = adversary(image), adversary(reconstruction)
        losses = {"discriminator": discriminator_loss(real, fake, self.losses.adversarial)}
        if isinstance(adversary.module, LeCamDiscriminator):
            losses["lecam"] = self.losses.lecam_weight * adversary.module.lecam(real, fake)
        if self.losses.r1_weight and clock.step % self.losses.r1_every == 0:
            weight = self.losses.r1_weight * self.losses.r1_every
            losses["r1"] = weight * gradient_penalty(adversary.module, image)
        adversary.backward(total(losses))
        return {**losses, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def _histograms(self, output: TokenizerOutput) -> dict[str, Tensor]:
        """How often each code was used: `codes`, or `codes_<stream>` where the layout has several streams.

        Scales share one codebook: there is both, and `codes` is their sum.
        """
        streams = self.tokenizer.layout.streams
        parts = output.codes.split([stream.n_tokens for stream in streams], dim=1)
        found = {
            f"codes_{stream.name}": torch.bincount(part.flatten(), minlength=stream.vocab_size)
            for stream, part in zip(streams, parts, strict=True)
        }
        if len(streams) == 1:
            return {"codes": next(iter(found.values()))}
        shared = all(stream.scale is not None for stream in streams)
        return found | ({"codes": torch.stack(list(found.values())).sum(0)} if shared else {})

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """PSNR (dB) and SSIM of reconstructions rounded to uint8, and the codes used."""
        output, reconstruction = _forward(networks["tokenizer"], to_image(batch["image"]))
        image, rounded = (pixels.permute(0, 3, 1, 2).float() for pixels in (batch["image"], to_uint8(reconstruction)))
        return {"psnr": psnr(image, rounded).mean(), "ssim": ssim(image, rounded).mean(), **self._histograms(output)}

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor | Picture]:
        """Images and their reconstructions, alternating, and how the first build up where prefixes can be decoded."""
        images = batch["image"]
        output, reconstruction = _forward(networks["tokenizer"], to_image(images))
        pairs = torch.stack([images, to_uint8(reconstruction)], dim=1)
        pictures: dict[str, Tensor | Picture] = {"reconstruction": pairs.flatten(0, 1)}
        if built := build_up(self.tokenizer, output.codes[:SHOWN]):
            pictures["partial"] = built
        return pictures


def adversary_node(discriminator: dict[str, Any], losses: TokenizerLosses) -> dict[str, Any]:
    """The discriminator's config node, with LeCam's averages around it where LeCam is used."""
    if not losses.lecam_weight:
        return discriminator
    name = f"{LeCamDiscriminator.__module__}.{LeCamDiscriminator.__name__}"
    return {"_target_": name, "discriminator": discriminator, "decay": losses.lecam_decay}


def perceptual_losses(losses: TokenizerLosses) -> dict[str, tuple[nn.Module, float]]:
    """The perceptual distances in use, frozen, each with its weight."""
    found: dict[str, tuple[nn.Module, float]] = {}
    if losses.perceptual_weight:
        found["perceptual"] = LPIPS(losses.lpips_weights), losses.perceptual_weight
    if losses.convnext_weight:
        found["convnext"] = ConvNextPerceptual(str(losses.convnext_path)), losses.convnext_weight
    return found


def gradient_penalty(discriminator: nn.Module, image: Tensor) -> Tensor:
    """R1 of the plain module, in full precision: wrappers, fused attention and compiled graphs have no second derivative."""
    leaf = image.detach().requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        return r1_penalty(discriminator(leaf), leaf)


class LastLayer:
    """Gradient norms over the weight of the last convolution, without a backward through the network.

    Args:
        layer: a convolution whose output is the reconstruction; its input is kept at every forward.
    """

    def __init__(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(f"the last layer is a {type(layer).__name__}, not a Conv2d; set losses.adaptive=false")
        self.layer, self.input = layer, torch.empty(0)
        self.shape = layer.weight.shape  # now: a strategy may take the weight apart
        layer.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.input = inputs[0].detach()

    def norm(self, gradient: Tensor) -> Tensor:
        """‖∂loss/∂weight‖ for `gradient` = ∂loss/∂output, of the whole batch: ranks hold equal parts of it."""
        layer = self.layer
        kept = self.input.float()
        weight_gradient = conv2d_weight(kept, self.shape, gradient, layer.stride, layer.padding, layer.dilation, layer.groups)
        return (sum_over_ranks(weight_gradient) / ranks()).norm()


def _forward(tokenizer: Network, image: Tensor, auxiliary: bool = False) -> tuple[TokenizerOutput, Tensor]:
    """The tokenizer's output and its reconstruction."""
    output: TokenizerOutput = tokenizer(image, auxiliary)
    assert output.reconstruction is not None
    return output, output.reconstruction


def total(losses: dict[str, Tensor]) -> Tensor:
    """Sum of named losses."""
    return torch.stack([loss.float() for loss in losses.values()]).sum()
