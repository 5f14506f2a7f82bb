"""Losses of tokenizer training: reconstruction, adversarial and its regularisation, adaptive weight, perceptual.

Shapes: `B` batch, `C` channels, `H`, `W` height and width, `K` classes. Images are in [-1, 1]; logits have any shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import Fraction, PositiveInt
from ..build import load_strict
from ..convert.checkpoint import read_checkpoint, unwrap
from ..ranks import mean_over_ranks
from .frozen import IMAGENET, UsesFrozen, load_frozen

Adversarial = Literal["hinge", "non_saturating"]


def reconstruction_loss(reconstruction: Tensor, image: Tensor, kind: Literal["l1", "l2"] = "l2") -> Tensor:
    """Mean absolute (`l1`) or mean squared (`l2`) error over all pixels and channels."""
    return {"l1": F.l1_loss, "l2": F.mse_loss}[kind](reconstruction, image)


def discriminator_loss(real: Tensor, fake: Tensor, kind: Adversarial = "hinge") -> Tensor:
    """What the discriminator minimises; give it fakes without gradient to the generator.

    Args:
        real: logits of images.
        fake: logits of reconstructions.
        kind: `hinge`: ½·(mean relu(1 − real) + mean relu(1 + fake)); `non_saturating`: ½·(mean softplus(−real) +
            mean softplus(fake)), the binary cross-entropy with labels 1 and 0.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: Adversarial = "hinge") -> Tensor:
    """What the generator minimises: −mean fake (`hinge`), or mean softplus(−fake) (`non_saturating`)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(fidelity_norm: Tensor, adversarial_norm: Tensor, limit: float = 1e4) -> Tensor:
    """VQ-GAN's weight of the adversarial loss: ‖∇ fidelity‖ / (‖∇ adversarial‖ + 1e-4), at most `limit`, no gradient.

    Args:
        fidelity_norm: norm of the gradient of reconstruction plus perceptual loss at the last layer's weight.
        adversarial_norm: the same of the generator's adversarial loss.
        limit: 1e4 in taming-transformers.
    """
    return (fidelity_norm / (adversarial_norm + 1e-4)).clamp(0.0, limit).detach()


def warm_up(step: int, start: int, length: int) -> float:
    """Factor of a weight that rises linearly from 0 at `start` to 1 after `length` steps, and stays; 0 before."""
    return float(step >= start) if length <= 0 else min(max((step - start) / length, 0.0), 1.0)


def r1_penalty(logits: Tensor, image: Tensor) -> Tensor:
    """Mean over images of ‖∇_x D(x)‖² on real images (Mescheder et al. 2018, without their γ/2), with gradient.

    Args:
        logits: `[B]` or `[B, …]`, of `image`; D(x) is the mean over an image's logits, as in the adversarial losses.
        image: `[B, …]`, requires gradients. Fused attention has no second derivative: where the discriminator attends
            (`DinoDiscriminator`), judge it within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """
    # The sum gives every image its own gradient in one backward where images are judged alone (all but batch norm).
    judged = logits.float().reshape(len(image), -1).mean(1).sum()
    (gradient,) = torch.autograd.grad(judged, image, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al. 2021): logits keep near the moving average of the other kind's.

    mean relu(real − ᾱ_fake)² + mean relu(ᾱ_real − fake)², the averages ᾱ over all ranks and updated first, from 0, as in
    the authors' code and Open-MAGVIT2's. They belong to the state of training: save them with the discriminator.

    Args:
        decay: of the averages.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: Fraction = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty of logits of images and of reconstructions; only while training it moves the averages."""
        real, fake = real.float(), fake.float()
        if self.training:
            self.real.lerp_(mean_over_ranks(real.detach().mean()), 1 - self.decay)
            self.fake.lerp_(mean_over_ranks(fake.detach().mean()), 1 - self.decay)
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()


# VGG16: channels of the five stages, and the index of each convolution in torchvision's `features`.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_FEATURES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet statistics for inputs in [-1, 1]
_NAMES = {
    f"stages.{stage}.{2 * place + (stage > 0)}.{kind}": (index, kind)
    for stage, indices in enumerate(_FEATURES)
    for place, index in enumerate(indices)
    for kind in ("weight", "bias")
} | {f"heads.{stage}": (stage, "head") for stage in range(len(_FEATURES))}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_VGG_KEY = re.compile(r"(?:^|\.)(?:features|net\.slice\d)\.(\d+)\.(weight|bias)$")
_HEAD_KEY = re.compile(r"(?:^|\.)lins?\.?(\d)\.model\.[01]\.weight$")


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, version 0.1, VGG16): frozen, always in eval mode, no dropout.

    Between unit-normalised features after each VGG stage: `Σ_stage mean_hw Σ_c w_c·(f(x) − f(y))²`.

    Args:
        weights: a file, or a folder of files, that hold VGG16 (`features.N.*` or `net.sliceK.N.*`) and the linear heads
            (`linK.model.1.weight`), as safetensors or torch files. There is no download.

    Raises:
        UserError: no path, nothing there, or tensors are missing.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        widths_in = (3, *(stage[-1] for stage in _STAGES[:-1]))
        self.stages = nn.ModuleList(_vgg_stage(width, stage) for width, stage in zip(widths_in, _STAGES, strict=True))
        self.heads = nn.ParameterList(torch.zeros(stage[-1]) for stage in _STAGES)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        load_strict(self, read_lpips_weights(weights), where=weights)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode: it is a measure, not a part that learns."""
        return super().train(False)

    def features(self, image: Tensor) -> list[Tensor]:
        """Unit-normalised features `[B, C, H, W]` after each of the five stages."""
        x = (image - self.shift) / self.scale
        maps = []
        for stage in self.stages:
            x = stage(x)
            # vector_norm has gradient 0 where all channels are 0; sqrt(sum of squares) would give NaN.
            maps.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Distance `[B]` of images in [-1, 1]; pass the one that needs gradients first, no gradient reaches the second."""
        with torch.no_grad():
            targets = self.features(reference)
        pairs = zip(self.features(image), targets, self.heads, strict=True)
        # einsum over channels, then the mean over places: no weighted copy of the feature map is made.
        return sum(
            (torch.einsum("bchw,c->bhw", (a - b).square(), w).mean((1, 2)) for a, b, w in pairs), start=image.new_zeros(())
        )


class ConvNextPerceptual(UsesFrozen):
    """Distance of a frozen ImageNet classifier's logits, mean (ℓ(x) − ℓ(y))² over classes, as TiTok and MaskBit use it.

    Images are resampled bilinearly with antialias; published are ConvNeXt-S and 224 pixels.

    Args:
        path: a folder on disk or a hub id of a ConvNeXt of transformers, such as facebook/convnext-small-224.
        size: side in pixels that it sees.
    """

    def __init__(self, path: str, size: PositiveInt = 224) -> None:
        kinds = {"convnext": "ConvNextForImageClassification", "convnextv2": "ConvNextV2ForImageClassification"}
        super().__init__(load_frozen(path, kinds, "ConvNeXt"), IMAGENET)
        self.size = size

    def logits(self, image: Tensor) -> Tensor:
        """Logits `[B, K]` of images of any size."""
        resized = F.interpolate(image.float(), (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        return self.frozen(pixel_values=self.normalise(resized)).logits.float()

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Distance `[B]` of images in [-1, 1]; pass the one that needs gradients first, no gradient reaches the second."""
        with torch.no_grad():
            target = self.logits(reference)
        return (self.logits(image) - target).square().mean(1)


def _vgg_stage(width_in: int, widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = [] if width_in == 3 else [nn.MaxPool2d(2)]
    for width in widths:
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
        width_in = width
    return nn.Sequential(*layers)


def read_lpips_weights(weights: str | None) -> dict[str, Tensor]:
    """The state dict of `LPIPS` from published files (see the class).

    Raises:
        UserError: no path, nothing there, or tensors are missing.
    """
    fix = "give lpips_weights a file or folder with VGG16 and the LPIPS heads, or set the perceptual weight to 0"
    if not weights:
        raise UserError("LPIPS needs weights and none are given", fix=fix)
    path = Path(weights)
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError("no LPIPS weights there", where=path, fix=fix)
    found: dict[tuple[int, str], Tensor] = {}
    for file in files:
        found |= _facts(unwrap(read_checkpoint(file), where=file)[0])
    missing = [name for name, fact in _NAMES.items() if fact not in found]
    if missing:
        raise UserError(f"lacks {len(missing)} of the {len(_NAMES)} tensors of LPIPS", where=path, fix=fix)
    return {name: found[fact].float().flatten() if fact[1] == "head" else found[fact].float() for name, fact in _NAMES.items()}


def _facts(state: Mapping[str, Tensor]) -> dict[tuple[int, str], Tensor]:
    """Tensors by (index in torchvision's features, weight | bias) or (stage, head); others are left out."""
    found: dict[tuple[int, str], Tensor] = {}
    for name, value in state.items():
        if match := _VGG_KEY.search(name):
            found[int(match[1]), match[2]] = value
        elif match := _HEAD_KEY.search(name):
            found[int(match[1]), "head"] = value
    return found
