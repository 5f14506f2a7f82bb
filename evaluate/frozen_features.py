"""Features of networks of transformers: DINOv2 and CLIP, read from folders on disk.

Shapes: `B` batch, `D` feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..models.text import load_tokenizer
from ..models.tokenizers.frozen import CLIP, IMAGENET, Statistics
from .feature_net import FeatureNet, Features
from .protocol import file_hash

SIZE = 224


class FrozenFeatures(FeatureNet):
    """A network of transformers.

    Args:
        folder: its folder on disk (`config.json` and `model.safetensors`).

    Raises:
        UserError: transformers is not installed, or there is no such network.
    """

    kind: str
    layer: str
    statistics: Statistics
    resizing: str

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"the {self.name} features need transformers", fix="pip install 'tokar[teachers]'") from error
        self.sha256 = file_hash(folder / "model.safetensors")
        try:
            network = getattr(transformers, self.kind)
            self.network = network.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no readable {self.kind}", where=folder, fix=f"save one with {self.kind}.save_pretrained"
            ) from error
        self.eval().requires_grad_(False)

    def protocol(self) -> dict[str, Any]:
        """See `FeatureNet.protocol`."""
        return {
            "name": self.name,
            "layer": self.layer,
            "dim": self.dim,
            "input_size": SIZE,
            "resize": self.resizing,
            "normalisation": f"mean {self.statistics[0]}, standard deviation {self.statistics[1]}",
            "weights_sha256": self.sha256,
        }

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 255] in the network's own units."""
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in self.statistics)
        return (pixels / 255 - mean) / std


class DinoFeatures(FrozenFeatures):
    """DINOv2's class token after the last norm, as in FD-DINOv2 (Stein et al., 2023); `folder` holds a `Dinov2Model`."""

    name, distance, kind, layer = "dinov2", "fd_dinov2", "Dinov2Model", "class token after the last norm"
    statistics, resizing = IMAGENET, "bicubic, antialias, float, clamped to [0, 255]"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.dim = int(self.network.config.hidden_size)

    def extract(self, pixels: Tensor) -> Features:
        """See `FeatureNet.extract`."""
        resized = F.interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        return Features(self.network(pixel_values=self.normalise(resized)).last_hidden_state[:, 0])


class ClipFeatures(FrozenFeatures):
    """CLIP's projected features of images and of their captions; `folder` holds a `CLIPModel` and its text tokenizer."""

    name, distance, kind, layer = "clip", "fd_clip", "CLIPModel", "projection"
    statistics, resizing = CLIP, "bicubic of the shorter side, antialias, float, clamped to [0, 255], middle square"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.dim = int(self.network.config.projection_dim)
        self.words = load_tokenizer(str(folder))

    def extract(self, pixels: Tensor) -> Features:
        """See `FeatureNet.extract`."""
        height, width = pixels.shape[-2:]
        sides = [max(SIZE, round(SIZE * side / min(height, width))) for side in (height, width)]
        resized = F.interpolate(pixels, sides, mode="bicubic", antialias=True).clamp(0, 255)
        top, left = ((side - SIZE) // 2 for side in sides)
        square = resized[..., top : top + SIZE, left : left + SIZE]
        return Features(self.network.get_image_features(pixel_values=self.normalise(square)).pooler_output)

    @torch.no_grad()
    def captions(self, texts: Sequence[str]) -> Tensor:
        """Features `[B, D]` of captions, cut at the length that the network reads."""
        longest = int(self.network.config.text_config.max_position_embeddings)
        words = self.words(list(texts), max_length=longest, truncation=True, padding=True, return_tensors="pt")
        device = next(self.parameters()).device
        ids, mask = words["input_ids"].to(device), words["attention_mask"].to(device)
        return self.network.get_text_features(input_ids=ids, attention_mask=mask).pooler_output.float()
