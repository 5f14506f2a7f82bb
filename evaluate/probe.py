"""The linear probe: how much of an image's class one linear layer reads off frozen features (He et al. 2022; GigaTok).

Shapes: `M` images, `B` of one batch, `D` width of the features, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conf.schema import Probe
from ..conf.spine import Data
from ..data.shards import ImageDataset
from ..data.stream import Stream, to_image
from ..errors import UserError
from .lars import LARS
from .probe_features import Extract
from .protocol import Result
from .reference import augmented_split, facts_of, plain_split

BATCH_OF_LR = 256
EPS, INIT_STD = 1e-6, 0.01
Labelled = tuple[Tensor, Tensor]
"""Features `[M, D]` float32 and classes `[M]`, on the CPU."""
Advance = Callable[[int], None]


def linear_probe(
    extract: Extract,
    data: Data,
    settings: Probe,
    *,
    what: Mapping[str, Any],
    device: torch.device,
    split: str | None = None,
    count: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    subject: Mapping[str, Any] | None = None,
    on_image: Advance | None = None,
) -> Result:
    """Train a linear classifier on features of the training images, and judge it on those of the validation images.

    Args:
        extract: images `[B, 3, H, W]` in [-1, 1] on `device` to features `[B, D]`; frozen.
        data: labelled images; training images are cropped and mirrored as it says.
        settings: of the probe.
        what: names the features, for the protocol.
        device: where features are made and the layer is trained.
        split: judged on; `None`: the validation split.
        count: images of each split, the first so many; `None`: all.
        batch_size: images at once through the network.
        seed: of the order, the augmentation and the layer.
        subject: names the network.
        on_image: told the number of images after each batch, for a progress bar; see `images_seen`.

    Raises:
        UserError: images without classes, or fewer than two of them.
    """
    train, judged = augmented_split(data, data.train_split), plain_split(data, split or data.val_split)
    classes = _classes(train, judged)
    reader = Reader(extract, device, batch_size, seed, count, on_image or (lambda n: None))
    views = views_of(data, settings)

    @lru_cache(maxsize=views if views < settings.epochs else 1)
    def view(number: int) -> Labelled:
        return reader.read(train, number)

    head = fit_head(lambda epoch: view(epoch % views), classes, settings, seed=seed, device=device)
    numbers = {f"train_{name}": value for name, value in judge_head(head, view((settings.epochs - 1) % views)).items()}
    numbers = judge_head(head, reader.read(judged, 0)) | numbers
    protocol = {
        "data": facts_of(data, split or data.val_split, judged, _limit(judged, count)),
        "train": facts_of(data, data.train_split, train, _limit(train, count)),
        "count": _limit(judged, count),
        "features": dict(what),
        **_protocol(data, settings, views),
    }
    width = head[1].in_features
    return Result("linear_probe", numbers, protocol, {**(subject or {}), "width": width, "probe_seed": seed})


def views_of(data: Data, settings: Probe) -> int:
    """Views of each training image: one where training images are not augmented."""
    if data.crop != "random" and not data.flip:
        return 1
    return min(settings.views or settings.epochs, settings.epochs)


def images_seen(data: Data, settings: Probe, split: str | None = None, count: int | None = None) -> int:
    """Images that go through the network in all, for a progress bar."""
    train, judged = plain_split(data, data.train_split), plain_split(data, split or data.val_split)
    return views_of(data, settings) * _limit(train, count) + _limit(judged, count)


def _limit(images: ImageDataset, count: int | None) -> int:
    return min(count or len(images), len(images))


def _classes(train: ImageDataset, judged: ImageDataset) -> int:
    if len(train.classes) < 2 or not judged.classes:
        place = train.folder if len(train.classes) < 2 else judged.folder
        raise UserError("a probe needs images of two classes or more", where=place, fix="prepare them from folders of classes")
    if int(judged.labels.max()) >= len(train.classes):
        raise UserError("has a class that the training images lack", where=judged.folder, fix="prepare both from one source")
    return len(train.classes)


@dataclass(frozen=True)
class Reader:
    """Reads features off images: see the arguments of `linear_probe`."""

    extract: Extract
    device: torch.device
    batch_size: int
    seed: int
    count: int | None
    on_image: Advance

    @torch.no_grad()
    def read(self, images: ImageDataset, view: int) -> Labelled:
        """Features of one view (the augmentation of epoch `view`) of the first `count` images, in order."""
        total = _limit(images, self.count)
        stream = Stream(images, batch_size=min(self.batch_size, total), seed=self.seed, shuffle=False)
        steps = islice(stream.batches(view * len(images)), math.ceil(total / stream.batch_size))
        features, labels = [], []
        for number, (batch,) in enumerate(steps):
            wanted = slice(total - number * stream.batch_size)  # the last batch reaches into the next epoch
            features.append(self.extract(to_image(batch["image"][wanted].to(self.device))).float().cpu())
            labels.append(batch["label"][wanted])
            self.on_image(len(labels[-1]))
        return torch.cat(features), torch.cat(labels)


def fit_head(
    view: Callable[[int], Labelled], classes: int, settings: Probe, *, seed: int, device: torch.device
) -> nn.Sequential:
    """Batch norm without affine part and one linear layer, trained by LARS under a warmed-up cosine.

    Args:
        view: features and classes of an epoch.
        classes: `K`.
        settings: of the probe; the last, smaller batch of an epoch is left out.
        seed: of the first weights and of the order of every epoch.
        device: where it is trained.
    """
    random = torch.Generator().manual_seed(seed)
    head = _head(view(0)[0].shape[1], classes, random).to(device)
    optimizer = LARS(head.parameters(), lr=0.0)
    for epoch in range(settings.epochs):
        features, labels = (part.to(device) for part in view(epoch))
        size = min(settings.batch_size, len(labels))
        order = torch.randperm(len(labels), generator=random)
        chosen = order[: len(order) // size * size].view(-1, size)
        for step, rows in enumerate(chosen.to(device)):
            optimizer.param_groups[0]["lr"] = rate(settings, epoch + step / len(chosen))
            optimizer.zero_grad()
            F.cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
    return head.eval()


def _head(width: int, classes: int, random: torch.Generator) -> nn.Sequential:
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=INIT_STD, generator=random)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=EPS), linear)


def rate(settings: Probe, epoch: float) -> float:
    """Learning rate at a fraction of an epoch: linear warm-up to `lr · batch / 256`, then half a cosine to 0."""
    peak = settings.lr * settings.batch_size / BATCH_OF_LR
    warmup = min(settings.warmup_epochs, settings.epochs)
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, settings.epochs - warmup)))


@torch.no_grad()
def judge_head(head: nn.Sequential, labelled: Labelled) -> dict[str, float]:
    """`accuracy`, `cross_entropy` in nats and, with ten classes or more, `top5_accuracy`."""
    device = next(head.parameters()).device
    logits, labels = head(labelled[0].to(device)), labelled[1].to(device)
    right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    numbers = {"accuracy": right[:, 0].double().mean().item(), "cross_entropy": F.cross_entropy(logits, labels).item()}
    return numbers | ({"top5_accuracy": right.any(1).double().mean().item()} if logits.shape[1] >= 10 else {})


def _protocol(data: Data, settings: Probe, views: int) -> dict[str, Any]:
    return {
        "head": f"batch norm without affine part, eps {EPS:g}; linear, truncated normal {INIT_STD:g}",
        "optimizer": "LARS, momentum 0.9, trust 0.001, no weight decay",
        "lr": f"{settings.lr:g} * {settings.batch_size} / {BATCH_OF_LR}, warm-up, half a cosine to 0",
        "epochs": settings.epochs,
        "warmup_epochs": settings.warmup_epochs,
        "batch_size": settings.batch_size,
        "augmentation": {"crop": data.crop, "flip": data.flip, "views": views},
        "judged": "after the last epoch, one view, not augmented",
    }
