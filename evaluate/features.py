"""Named feature networks: each owns its resize and normalisation and states them, with the hash of its weights.

Shapes: `B` batch, `D` feature width, `K` classes. Images are uint8 `[B, H, W, 3]`: what a file would hold, so that numbers of
samples in memory and of samples from disk agree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, nearest
from ..models.build import load_model, load_strict, locate_model, weights_hash
from ..models.classifier import Classifier
from .inception import INPUT_SIZE, POOL_DIM, FIDInception
from .protocol import file_hash

KNOWN_INCEPTION = "6726825d"  # first digits of the SHA-256, part of the published file's name by torch.hub's convention
DINO_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """What a feature network says about images.

    Args:
        pooled: `[B, D]` float32.
        logits: `[B, K]`, or `None` for a network without classes.
    """

    pooled: Tensor
    logits: Tensor | None


class FeatureNet(nn.Module, ABC):
    """A frozen network from uint8 images to features."""

    name: str
    dim: int

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Name, input size, resize, normalisation and the SHA-256 of the weights: equal only if the features are."""

    @abstractmethod
    def extract(self, pixels: Tensor) -> Features:
        """Features of float pixels `[B, 3, H, W]` in [0, 255], not yet resized."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images `[B, H, W, 3]`.

        Raises:
            UserError: another type or shape: rounding is part of the protocol and not done here.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(
                f"features want uint8 [B, H, W, 3], got {images.dtype} {tuple(images.shape)}", fix="round the images first"
            )
        device = next(self.parameters()).device
        pooled, logits = self.extract(images.to(device).permute(0, 3, 1, 2).contiguous().float())
        return Features(pooled.float(), None if logits is None else logits.float())


class InceptionFeatures(FeatureNet):
    """Inception-v3 of 2015: the 2048 means before the classifier, and the logits of the Inception score (no bias).

    Args:
        weights: `.pth` or `.safetensors` file in the layout of pytorch-fid's `pt_inception-2015-12-05`.
    """

    name, dim = "inception", POOL_DIM

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.sha256 = file_hash(weights)
        with torch.device("meta"):
            self.network = FIDInception()
        state = _read_state(weights)
        own = self.network.state_dict()
        # Counters of batch norm are absent from old files and never used in eval mode.
        state |= {key: torch.tensor(0) for key in own if key.endswith("num_batches_tracked")}
        load_strict(self.network, state, where=weights)
        self.eval().requires_grad_(False)

    def protocol(self) -> dict[str, Any]:
        """See `FeatureNet.protocol`."""
        known = self.sha256.startswith(KNOWN_INCEPTION)
        return {
            "name": self.name,
            "layer": "pool3",
            "dim": self.dim,
            "input_size": INPUT_SIZE,
            "resize": "bilinear, align_corners=False, no antialias, float",
            "normalisation": "x / 127.5 - 1",
            "weights": f"pt_inception-2015-12-05-{KNOWN_INCEPTION}" if known else "unrecognised",
            "weights_sha256": self.sha256,
        }

    def extract(self, pixels: Tensor) -> Features:
        """See `FeatureNet.extract`."""
        resized = F.interpolate(pixels, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
        pooled, _ = self.network(resized / 127.5 - 1)
        return Features(pooled, F.linear(pooled, self.network.fc.weight))


class DinoFeatures(FeatureNet):
    """DINOv2's class token after the last norm, as in FD-DINOv2 (Stein et al., 2023).

    Args:
        folder: a model folder of transformers (`config.json` and `model.safetensors`) on disk.
    """

    name = "dinov2"
    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise UserError("the dinov2 features need transformers", fix="pip install 'tokar[teachers]'") from error
        self.sha256 = file_hash(folder / "model.safetensors")
        try:
            self.network = Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                "no readable DINOv2 model", where=folder, fix="save one with Dinov2Model.save_pretrained"
            ) from error
        self.dim = int(self.network.config.hidden_size)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def protocol(self) -> dict[str, Any]:
        """See `FeatureNet.protocol`."""
        return {
            "name": self.name,
            "layer": "class token after the last norm",
            "dim": self.dim,
            "input_size": DINO_SIZE,
            "resize": "bicubic, antialias, float, clamped to [0, 255]",
            "normalisation": "ImageNet mean and standard deviation",
            "weights_sha256": self.sha256,
        }

    def extract(self, pixels: Tensor) -> Features:
        """See `FeatureNet.extract`."""
        resized = F.interpolate(pixels, (DINO_SIZE, DINO_SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        hidden = self.network(pixel_values=(resized / 255 - self.mean) / self.std).last_hidden_state
        return Features(hidden[:, 0], None)


class ClassifierFeatures(FeatureNet):
    """The penultimate layer of a classifier that `tokar train classifier` fitted.

    Args:
        folder: a model folder (`config.json` and weights).
    """

    name = "classifier"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        network = load_model(folder)
        if not isinstance(network, Classifier):
            raise UserError(
                f"holds a {type(network).__name__}, no classifier", where=folder, fix="train one: tokar train classifier"
            )
        self.folder, self.network, self.dim = folder, network, network.feature_dim
        self.sha256 = weights_hash(network)
        self.eval().requires_grad_(False)

    def protocol(self) -> dict[str, Any]:
        """See `FeatureNet.protocol`."""
        return {
            "name": self.name,
            "layer": "penultimate",
            "dim": self.dim,
            "input_size": self.network.image_size,
            "resize": "none",
            "normalisation": "x / 127.5 - 1",
            "weights_sha256": self.sha256,
        }

    def extract(self, pixels: Tensor) -> Features:
        """See `FeatureNet.extract`.

        Raises:
            UserError: the images have another size than the classifier was trained on.
        """
        size = self.network.image_size
        if pixels.shape[-2:] != (size, size):
            height, width = pixels.shape[-2:]
            what = f"the classifier judges {size}x{size} images, got {height}x{width}"
            raise UserError(what, where=self.folder, fix="train one on this image size")
        pooled = self.network.features(pixels / 127.5 - 1)
        return Features(pooled, self.network.classify(pooled))


FEATURE_NETS: dict[str, type[InceptionFeatures] | type[DinoFeatures] | type[ClassifierFeatures]] = {
    "inception": InceptionFeatures,
    "dinov2": DinoFeatures,
    "classifier": ClassifierFeatures,
}


def features_place(name: str, path: str | None) -> Path | None:
    """Where the weights of a feature network lie; a classifier may be named by its run."""
    if path is None:
        return None
    return locate_model(Path(path)) if name == "classifier" else Path(path)


def load_features(name: str, path: Path | None, device: str | torch.device = "cpu") -> FeatureNet:
    """A feature network by name.

    Args:
        name: `inception`, `dinov2` or `classifier`.
        path: its weights; nothing is ever downloaded.
        device: where it runs.

    Raises:
        UserError: an unknown name, no path, or weights that do not fit.
    """
    if name not in FEATURE_NETS:
        raise UserError(f"no features named {name!r}", fix=nearest(name, FEATURE_NETS))
    if path is None:
        raise UserError(f"the {name} features need weights", where="features.path", fix="give the path of the weights on disk")
    return FEATURE_NETS[name](Path(path)).to(device)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError("no readable weights", where=path, fix="download or copy the file again") from error
    if not isinstance(state, dict):
        raise UserError(
            "holds no state dict", where=path, fix="give the file of pytorch-fid, pt_inception-2015-12-05-6726825d.pth"
        )
    return dict(state)
