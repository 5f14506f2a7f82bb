"""Feature networks by name, and that of tokar's own classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, nearest
from ..models.build import load_model, locate_model, weights_hash
from ..models.classifier import Classifier
from .feature_net import FeatureNet, Features
from .frozen_features import ClipFeatures, DinoFeatures
from .inception_features import InceptionFeatures, TensorFlowInceptionFeatures


class ClassifierFeatures(FeatureNet):
    """The penultimate layer of a classifier that `tokar train classifier` fitted.

    Args:
        folder: a model folder (`config.json` and weights).
    """

    name, distance = "classifier", "fd_classifier"

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


FEATURE_NETS: dict[str, type[FeatureNet]] = {
    net.name: net for net in (ClassifierFeatures, InceptionFeatures, TensorFlowInceptionFeatures, DinoFeatures, ClipFeatures)
}


def features_place(name: str, path: str | None) -> Path | None:
    """Where the weights of a feature network lie; a classifier may be named by its run."""
    if path is None:
        return None
    return locate_model(Path(path)) if name == "classifier" else Path(path)


def load_features(name: str, path: Path | None, device: str | torch.device = "cpu", *, sha256: str | None = None) -> FeatureNet:
    """A feature network by name.

    Args:
        name: of `FEATURE_NETS`.
        path: its weights; nothing is ever downloaded.
        device: where it runs.
        sha256: of Inception's weights, where they are not the published ones.

    Raises:
        UserError: an unknown name, no path, or weights that do not fit.
    """
    if name not in FEATURE_NETS:
        raise UserError(f"no features named {name!r}", fix=nearest(name, FEATURE_NETS))
    if path is None:
        raise UserError(f"the {name} features need weights", where="features.path", fix="give the path of the weights on disk")
    net = FEATURE_NETS[name]
    if issubclass(net, InceptionFeatures):
        return net(path, sha256).to(device)
    if sha256 is not None:
        raise UserError(f"is of Inception's weights, not for {name}", where="features.sha256", fix="leave it out")
    return net(path).to(device)  # type: ignore[call-arg]
