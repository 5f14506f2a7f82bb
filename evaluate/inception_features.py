"""Features of the Inception-v3 of 2015, resized and scaled in the two ways that published distances were made with.

Shapes: `B` batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..models.build import load_strict
from .feature_net import FeatureNet, Features
from .inception import INPUT_SIZE, POOL_DIM, SPATIAL_DIM, FIDInception
from .protocol import file_hash

PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of pt_inception-2015-12-05-6726825d.pth, which pytorch-fid and torch-fidelity both use."""


class InceptionFeatures(FeatureNet):
    """The 2048 means before the classifier, the logits of the Inception score (no bias), and spatial features.

    Resized and scaled as pytorch-fid does.

    Args:
        weights: `.pth` or `.safetensors` file in the layout of pytorch-fid's `pt_inception-2015-12-05`.
        sha256: of that file; `None`: the published one.

    Raises:
        UserError: another file, or one that does not fit.
    """

    name, dim, spatial_dim, distance = "inception", POOL_DIM, SPATIAL_DIM, "fd_inception"
    resizing, scaling = "bilinear, half-pixel centres, no antialias, float", "x / 127.5 - 1"

    def __init__(self, weights: Path, sha256: str | None = None) -> None:
        super().__init__()
        self.sha256 = file_hash(weights)
        if self.sha256 != (sha256 or PUBLISHED):
            wanted = "the published file" if sha256 is None else "the file that features.sha256 names"
            fix = f"give pt_inception-2015-12-05-{PUBLISHED[:8]}.pth, or say features.sha256={self.sha256}"
            raise UserError(f"is not {wanted}", where=weights, fix=fix)
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
        return {
            "name": self.name,
            "layer": "pool3",
            "dim": self.dim,
            "input_size": INPUT_SIZE,
            "resize": self.resizing,
            "normalisation": self.scaling,
            "weights": "pt_inception-2015-12-05" if self.sha256 == PUBLISHED else "not the published file",
            "weights_sha256": self.sha256,
        }

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [0, 255] to the network's input `[B, 3, 299, 299]`."""
        resized = F.interpolate(pixels, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
        return resized / 127.5 - 1

    def extract(self, pixels: Tensor) -> Features:
        """See `FeatureNet.extract`."""
        pooled, _, spatial = self.network(self.prepare(pixels))
        return Features(pooled, F.linear(pooled, self.network.fc.weight), spatial)


class TensorFlowInceptionFeatures(InceptionFeatures):
    """The same network, resized and scaled as the graph of the usual ImageNet evaluator does (torch-fidelity too)."""

    name = "inception_tf1"
    resizing, scaling = "bilinear, TensorFlow 1 (pixel i at i * size / 299), no antialias, float", "(x - 128) / 128"

    def prepare(self, pixels: Tensor) -> Tensor:
        """See `InceptionFeatures.prepare`."""
        return (resize_tf1(pixels, INPUT_SIZE) - 128) / 128


def resize_tf1(pixels: Tensor, size: int) -> Tensor:
    """Bilinear resize `[B, C, H, W]` to `[B, C, size, size]` as TensorFlow 1 does without `align_corners`.

    Output pixel i lies at i · H / size of the input, corner to corner and not centre to centre: the picture shifts by up to
    half a pixel, and every published distance of that graph contains the shift.
    """
    for axis in (2, 3):
        length = pixels.shape[axis]
        position = torch.arange(size, device=pixels.device, dtype=torch.float32) * (length / size)
        low = position.floor().long()
        weight = (position - low).view(-1, *[1] * (3 - axis))
        first, second = (pixels.index_select(axis, part.clamp(max=length - 1)) for part in (low, low + 1))
        pixels = first + (second - first) * weight
    return pixels


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError("no readable weights", where=path, fix="download or copy the file again") from error
    if not isinstance(state, dict):
        raise UserError("holds no state dict", where=path, fix=f"give pt_inception-2015-12-05-{PUBLISHED[:8]}.pth")
    return dict(state)
