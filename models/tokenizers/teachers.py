"""Teachers of semantic regularization: frozen networks whose patch features a tokenizer's projected features follow.

Shapes: `B` batch, `H`, `W` height and width, `h`, `w` rows and columns of the teacher's grid, `T = h*w` tokens, `C` width.
Images are `[B, 3, H, W]` in [-1, 1]; each teacher owns its resampling and its normalisation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from ...ranges import PositiveInt
from ..build import load_model, locate_model
from ..classifier import Classifier
from .frozen import CLIP, IMAGENET, SYMMETRIC, Statistics, UsesFrozen, load_frozen


class Teacher(UsesFrozen, ABC):
    """A frozen network from images to patch features: never saved, never optimised, no gradient through it.

    Args:
        network: frozen in place.
        statistics: mean and standard deviation of its input, of pixels in [0, 1].
        dim: `C`, width of its features.
        size: side in pixels that images are resampled to.
        grid: rows and columns of its features.
    """

    def __init__(self, network: nn.Module, statistics: Statistics, dim: int, size: int, grid: tuple[int, int]) -> None:
        super().__init__(network, statistics)
        self.dim, self.size, self.grid = dim, size, grid

    @abstractmethod
    def tokens(self, pixels: Tensor) -> Tensor:
        """Patch features `[B, T, C]` of resampled, normalised pixels `[B, 3, size, size]`."""

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Patch features `[B, T, C]` in raster order, float32, of images of any size in [-1, 1].

        Resampling is bicubic without antialias, as GigaTok's.
        """
        pixels = self.normalise(image)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", align_corners=False)
        return self.tokens(pixels).float()

    def forward(self, image: Tensor) -> Tensor:
        """See `features`."""
        return self.features(image)


class DinoV2Teacher(Teacher):
    """DINOv2 (Oquab et al. 2023), with or without registers: patch tokens after the last norm.

    At 224 pixels and patches of 14: 16x16 tokens, of width 384 (S), 768 (B, GigaTok's teacher) or 1024 (L). Position
    embeddings are interpolated to the grid.

    Args:
        path: a folder on disk or a hub id, such as facebook/dinov2-base or facebook/dinov2-with-registers-base.
        size: side in pixels that images are resampled to, a multiple of the patch.
    """

    def __init__(self, path: str, size: PositiveInt = 224) -> None:
        kinds = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
        network = load_frozen(path, kinds, "DINOv2")
        grid = _grid(size, network.config.patch_size)
        super().__init__(network, IMAGENET, network.config.hidden_size, size, grid)
        self.leading = 1 + getattr(network.config, "num_register_tokens", 0)

    def tokens(self, pixels: Tensor) -> Tensor:
        """See `Teacher.tokens`; the class token and the registers, which come first, are left out."""
        return self.frozen(pixel_values=pixels).last_hidden_state[:, self.leading :]


class Siglip2Teacher(Teacher):
    """SigLIP and SigLIP 2 of fixed resolution (Tschannen et al. 2025): patch tokens after the last norm.

    Args:
        path: a folder on disk or a hub id, such as google/siglip2-base-patch16-256; NaFlex models are refused.
        size: side in pixels that images are resampled to, a multiple of the patch; `None`: the model's own.
    """

    def __init__(self, path: str, size: PositiveInt | None = None) -> None:
        kinds = {"siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel"}
        network = load_frozen(path, kinds, "SigLIP of fixed resolution")
        size = size or network.config.image_size
        grid = _grid(size, network.config.patch_size)
        super().__init__(network, SYMMETRIC, network.config.hidden_size, size, grid)

    def tokens(self, pixels: Tensor) -> Tensor:
        """See `Teacher.tokens`; there is no class token."""
        return self.frozen(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state


class ClipTeacher(Teacher):
    """The image half of CLIP (Radford et al. 2021; OpenCLIP's in this layout too): patch tokens after the last norm.

    Args:
        path: a folder on disk or a hub id, such as openai/clip-vit-large-patch14.
        size: side in pixels that images are resampled to, a multiple of the patch; `None`: the model's own.
    """

    def __init__(self, path: str, size: PositiveInt | None = None) -> None:
        kinds = {"clip": "CLIPVisionModel", "clip_vision_model": "CLIPVisionModel"}
        network = load_frozen(path, kinds, "CLIP")
        size = size or network.config.image_size
        grid = _grid(size, network.config.patch_size)
        super().__init__(network, CLIP, network.config.hidden_size, size, grid)

    def tokens(self, pixels: Tensor) -> Tensor:
        """See `Teacher.tokens`; transformers applies the last norm to the class token only."""
        hidden = self.frozen(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return self.frozen.post_layernorm(hidden[:, 1:])


class ClassifierTeacher(Teacher):
    """tokar's own classifier: the map before its mean over the grid, 4x4 tokens at 32 pixels.

    Args:
        path: a run, a checkpoint or an exported model of `tokar train classifier`.
    """

    def __init__(self, path: str) -> None:
        folder = locate_model(Path(path))
        with torch.device("cpu"):
            network = load_model(folder)
        if not isinstance(network, Classifier):
            raise UserError(
                f"holds a {type(network).__name__}, no classifier", where=path, fix="train one: tokar train classifier"
            )
        side = network.image_size
        for _ in network.blocks:
            side = (side + 1) // 2
        super().__init__(network, SYMMETRIC, network.feature_dim, network.image_size, (side, side))

    def tokens(self, pixels: Tensor) -> Tensor:
        """See `Teacher.tokens`."""
        return self.frozen.blocks(pixels).flatten(2).mT


def _grid(size: int, patch: int) -> tuple[int, int]:
    if size % patch:
        raise ValueError(f"size {size} is no multiple of the teacher's patch {patch}; use {max(size // patch, 1) * patch}")
    return (size // patch, size // patch)


def semantic_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Mean over batch and tokens of 1 − cos(projected, teacher), in float32.

    GigaTok minimises −cos: the same gradient, a value less by 1. Where the token counts differ and both are squares, the
    teacher's grid is resampled (bilinear, antialiased) to the tokenizer's.

    Args:
        projected: `[B, T, C]`, the tokenizer's features at the teacher's width.
        features: `[B, T', C]` of the teacher; no gradient reaches them.

    Raises:
        UserError: the widths differ, or the token counts differ and are not both squares.
    """
    width, target = projected.shape[-1], features.shape[-1]
    if width != target:
        what = f"the tokenizer projects to width {width}, the teacher's features have width {target}"
        raise UserError(what, where="tokenizer.semantic.dim", fix=f"set tokenizer.semantic.dim={target}")
    followed = resample_tokens(features.detach().float(), projected.shape[1])
    return 1 - F.cosine_similarity(projected.float(), followed, dim=-1).mean()


def resample_tokens(features: Tensor, count: int) -> Tensor:
    """Tokens `[B, T', C]` of a square grid on the square grid of `count` tokens.

    Raises:
        UserError: the counts differ and are not both squares.
    """
    given = features.shape[1]
    if given == count:
        return features
    rows, wanted = isqrt(given), isqrt(count)
    if rows**2 != given or wanted**2 != count:
        raise UserError(
            f"the tokenizer has {count} semantic features, the teacher {given}: no square grids to resample between",
            where="semantic.teacher",
            fix="choose a teacher or a teacher size with as many tokens",
        )
    grid = features.mT.unflatten(2, (rows, rows))
    return F.interpolate(grid, (wanted, wanted), mode="bilinear", align_corners=False, antialias=True).flatten(2).mT
