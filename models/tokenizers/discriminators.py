"""Discriminators for the adversarial loss of tokenizers.

Shapes: `B` batch, `H`, `W` height and width, `h`, `w` the grid of patches judged, `T` tokens, `C` their width, `K` heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ...errors import UserError
from ...ranges import Fraction, NonNegativeInt, PositiveInt
from ..ranks import ranks, total_over_ranks
from .frozen import IMAGENET, UsesFrozen, load_frozen
from .losses import LeCam

_KERNEL = 4


class PatchGAN(nn.Module):
    """The 70x70 patch discriminator of pix2pix: judges overlapping patches, one logit each.

    With the defaults 2.77 M parameters and 30x30 logits at 256 pixels, as LlamaGen and GigaTok use it.

    Args:
        width: channels of the first layer; doubled by each layer up to eight times.
        layers: strided layers; fewer for small images, as each halves the resolution.
        in_channels: of the image.
    """

    def __init__(self, width: PositiveInt = 64, layers: PositiveInt = 3, in_channels: PositiveInt = 3) -> None:
        super().__init__()
        self.layers = layers
        modules: list[nn.Module] = [nn.Conv2d(in_channels, width, _KERNEL, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, layers + 1):
            stride = 2 if index < layers else 1
            wider = width * min(2**index, 8)
            modules.append(nn.Conv2d(channels, wider, _KERNEL, stride=stride, padding=1, bias=False))
            modules += [BatchNorm(wider), nn.LeakyReLU(0.2)]
            channels = wider
        modules.append(nn.Conv2d(channels, 1, _KERNEL, padding=1))
        self.main = nn.Sequential(*modules)
        self.apply(_init)

    def forward(self, image: Tensor) -> Tensor:
        """Logits `[B, 1, h, w]` of images `[B, 3, H, W]`; high means real.

        Raises:
            UserError: the image is too small for the number of layers.
        """
        # Two more layers with stride 1 each take a pixel away after the halvings.
        smallest = 3 * 2**self.layers
        if min(image.shape[-2:]) < smallest:
            raise UserError(
                f"PatchGAN with {self.layers} layers needs images of {smallest} pixels, not {min(image.shape[-2:])}",
                fix="give it fewer layers",
            )
        return self.main(image)


def _init(module: nn.Module) -> None:
    """pix2pix: convolutions N(0, 0.02), batch norm scales N(1, 0.02), offsets 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics while training are those of the batch over all ranks, so that they depend on no strategy.

    torch's SyncBatchNorm needs GPUs, and has no second derivative.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        if not self.training or ranks() == 1:
            return super().forward(x)
        wide = x.float()
        count = total_over_ranks(wide.new_tensor(float(x.numel() // x.shape[1])))
        mean = total_over_ranks(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = total_over_ranks(centred.square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum or 0.0)
        self.running_var.lerp_(variance, self.momentum or 0.0)
        self.num_batches_tracked.add_(1)


class DinoDiscriminator(UsesFrozen):
    """Projected discriminator over a frozen DINO (StyleGAN-T's heads; VAR's and GigaTok's choice of layers).

    Each head judges the patch tokens after one block, the class token added to every one. Only the heads are trained and
    saved; gradients pass through the frozen network to the image.

    Args:
        path: a folder on disk or a hub id of a ViT or DINOv2 of transformers; the published one is facebook/dino-vits16.
        size: side in pixels that it sees, a multiple of its patch: larger images are cropped at random or (half of the time,
            and out of training) averaged down, smaller ones enlarged.
        layers: number of blocks before each head; 0 is the embedding.
        kernel: odd, of the residual convolution along the tokens.
        virtual_batch: largest number of images that batch statistics are taken of.
        augment: applied to what is judged, such as `DiffAug`.

    Raises:
        ValueError: an even kernel, a layer that the network lacks, or a size between patches.
    """

    def __init__(
        self,
        path: str,
        size: PositiveInt = 224,
        layers: Sequence[NonNegativeInt] = (0, 3, 6, 9, 12),
        kernel: PositiveInt = 9,
        virtual_batch: PositiveInt = 8,
        augment: nn.Module | None = None,
    ) -> None:
        network = load_frozen(path, {"vit": "ViTModel", "dinov2": "Dinov2Model"}, "DINO")
        super().__init__(network, IMAGENET)
        depth, width, patch = (getattr(network.config, key) for key in ("num_hidden_layers", "hidden_size", "patch_size"))
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} is even; make it odd")
        if not layers or max(layers) > depth:
            raise ValueError(f"layers {list(layers)} of a network with {depth} blocks; choose some from 0 to {depth}")
        if size % patch:
            raise ValueError(f"size {size} is no multiple of the patch {patch}; use {max(size // patch, 1) * patch}")
        self.size, self.layers, self.augment = size, tuple(layers), augment
        self.heads = nn.ModuleList(
            nn.Sequential(
                _head_block(width, 1, virtual_batch),
                _Residual(_head_block(width, kernel, virtual_batch)),
                spectral_norm(nn.Conv1d(width, 1, 1)),
            )
            for _ in layers
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits `[B, K*T]` of images `[B, 3, H, W]` in [-1, 1]; high means real."""
        if self.augment is not None:
            image = self.augment(image)
        pixels = self.normalise(self._fit(image))
        hidden = self.frozen(pixel_values=pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        tokens = [(hidden[layer][:, 1:] + hidden[layer][:, :1]).mT for layer in self.layers]
        return torch.cat([head(each).flatten(1) for head, each in zip(self.heads, tokens, strict=True)], dim=1)

    def _fit(self, image: Tensor) -> Tensor:
        """Images of the size the frozen network sees."""
        height, width = image.shape[-2:]
        spare = (height - self.size, width - self.size)
        if self.training and min(spare) > 0 and torch.rand(()) < 0.5:
            top, left = (int(torch.randint(room + 1, ())) for room in spare)
            return image[..., top : top + self.size, left : left + self.size]
        if spare == (0, 0):
            return image
        return F.interpolate(image, (self.size, self.size), mode="area" if spare[0] > 0 else "bicubic")


class LeCamDiscriminator(nn.Module):
    """A discriminator with LeCam's averages of its logits beside it, so that what belongs together is saved together.

    Args:
        discriminator: images to logits.
        decay: of the averages.
    """

    def __init__(self, discriminator: nn.Module, decay: Fraction = 0.999) -> None:
        super().__init__()
        self.discriminator, self.lecam = discriminator, LeCam(decay)

    def forward(self, image: Tensor) -> Tensor:
        """The discriminator's logits of images `[B, 3, H, W]`."""
        return self.discriminator(image)


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most `virtual_batch` images and all tokens; nothing is kept from batch to batch.

    Groups differ by one image at most, so every batch size works, and equals StyleGAN-T's where all are equal.

    Args:
        width: `C`.
        virtual_batch: largest number of images in a group.
        eps: added to the variance.
    """

    def __init__(self, width: PositiveInt, virtual_batch: PositiveInt = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.virtual_batch, self.eps = virtual_batch, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T]` to the same shape, float32 inside."""
        groups = -(-x.shape[0] // self.virtual_batch)
        parts = x.float().tensor_split(groups)
        normal = [F.batch_norm(part, None, None, self.weight.float(), self.bias.float(), True, 0.0, self.eps) for part in parts]
        return torch.cat(normal).to(x.dtype)


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + x) / 2**0.5


def _head_block(width: int, kernel: int, virtual_batch: int) -> nn.Sequential:
    convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(convolution), LocalBatchNorm(width, virtual_batch), nn.LeakyReLU(0.2))
