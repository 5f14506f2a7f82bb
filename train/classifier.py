"""The classifier stage: a small network on the same data, the embedded judge of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conf.stages import ClassifierRun
from ..data.stream import to_image
from ..models.build import build
from .clock import Clock
from .network import Trainable
from .randomness import sample_uniform
from .stage import Batch, Networks

SHIFT_SALT = 2


class ClassifierStage:
    """Cross-entropy of the class, images shifted at random by up to `shift` pixels (borders repeat)."""

    def __init__(self, config: ClassifierRun, node: dict[str, Any], facts: dict[str, Any]) -> None:
        self.config = config
        self.trainables = {"classifier": Trainable(build(node), node, config.optim, facts=facts)}
        self.frozen: list[nn.Module] = []

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch."""
        logits = networks["classifier"](self._shifted(batch))
        loss = F.cross_entropy(logits.float(), batch["label"], label_smoothing=self.config.label_smoothing)
        networks["classifier"].backward(loss)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).float().mean()}

    def _shifted(self, batch: Batch) -> Tensor:
        image, shift = to_image(batch["image"]), self.config.shift
        if shift == 0:
            return image
        height, width = image.shape[-2:]
        padded = F.pad(image, (shift,) * 4, mode="replicate")
        down, right = (
            (sample_uniform(self.config.seed, batch["epoch"], batch["index"], SHIFT_SALT + axis) * (2 * shift + 1)).long()
            for axis in (0, 1)
        )
        rows = down[:, None] + torch.arange(height, device=image.device)
        columns = right[:, None] + torch.arange(width, device=image.device)
        samples = torch.arange(len(image), device=image.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Loss and accuracy on held-out images."""
        logits = networks["classifier"](to_image(batch["image"]))
        accuracy = (logits.argmax(-1) == batch["label"]).float().mean()
        return {"loss": F.cross_entropy(logits.float(), batch["label"]), "accuracy": accuracy}

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Nothing to draw."""
        return {}
