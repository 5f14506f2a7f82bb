"""How well a tokenizer gives images back: PSNR, SSIM, Fréchet distance, and how much of its codebook it uses.

Shapes: `B` batch, `N` tokens, `V` codes. Images are uint8 `[B, H, W, 3]` unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.stream import to_image, to_uint8
from ..errors import UserError
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.layout import TokenLayout
from .features import FeatureNet
from .frechet import GaussianStatistics, frechet_distance
from .protocol import Result
from .ranks import merge_ranks

DATA_RANGE = 255.0
PSNR_CAP = 100.0  # dB; an image given back exactly would otherwise make the mean infinite
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB, at most 100.

    Args:
        image: `[B, 3, H, W]` in [0, 255], float or uint8.
        reconstruction: the same shape.

    Returns:
        `[B]` float64: 10 log10(255² / mean squared error).
    """
    error = (image.double() - reconstruction.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(DATA_RANGE**2 / error)).clamp(max=PSNR_CAP)


def ssim(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al., 2004): Gaussian window of 11 pixels, sigma 1.5, K = (0.01, 0.03).

    Windows that leave the image are not counted; channels are averaged.

    Args:
        image: `[B, 3, H, W]` in [0, 255] (the data range is 255), float or uint8.
        reconstruction: the same shape.

    Returns:
        `[B]` float64.

    Raises:
        UserError: an image smaller than the window.
    """
    if min(image.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM needs images of {SSIM_WINDOW} pixels, got {tuple(image.shape[-2:])}", fix="use larger images")
    x, y = image.float() / DATA_RANGE, reconstruction.float() / DATA_RANGE
    mean_x, mean_y, square_x, square_y, product = _blur(torch.cat([x, y, x * x, y * y, x * y], 1)).chunk(5, 1)
    variance_x, variance_y = (square_x - mean_x**2).clamp(min=0), (square_y - mean_y**2).clamp(min=0)
    covariance = product - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).double().mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, device=x.device, dtype=x.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    window = (window / window.sum()).expand(x.shape[1], 1, 1, -1)
    rows = F.conv2d(x, window, groups=x.shape[1])
    return F.conv2d(rows, window.transpose(2, 3), groups=x.shape[1])


class CodebookUsage:
    """Histogram of codes over a set, one per stream of the layout.

    Streams of one vocabulary are also pooled: a shared codebook is used by all its scales together.

    Args:
        layout: of the tokenizer.
    """

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout
        self.counts = [torch.zeros(stream.vocab_size, dtype=torch.int64) for stream in layout.streams]

    def update(self, codes: Tensor) -> None:
        """Count codes `[B, N]` in layout order."""
        parts = codes.cpu().split([stream.n_tokens for stream in self.layout.streams], dim=1)
        for count, part in zip(self.counts, parts, strict=True):
            count += torch.bincount(part.flatten(), minlength=len(count))

    def merge(self, other: CodebookUsage) -> None:
        """Add the counts of another part."""
        for count, part in zip(self.counts, other.counts, strict=True):
            count += part

    def numbers(self) -> dict[str, float]:
        """`codebook_usage` (fraction of codes seen) and `codebook_perplexity`, overall and, with several streams, for each."""
        shared = len({stream.vocab_size for stream in self.layout.streams}) == 1
        pooled = torch.stack(self.counts).sum(0) if shared else torch.cat(self.counts)
        numbers = _usage("codebook", pooled)
        if len(self.counts) > 1:
            for stream, count in zip(self.layout.streams, self.counts, strict=True):
                numbers |= _usage(f"codebook/{stream.name}", count)
        return numbers


def usage_and_perplexity(counts: Tensor) -> tuple[float, float]:
    """Share of the codes that are used, and exp(-Σ p log p), of how often each code was used `[V]`."""
    p = counts.double() / counts.sum().clamp(min=1)
    perplexity = torch.exp(-torch.special.xlogy(p, p).sum())
    return (counts > 0).double().mean().item(), perplexity.item()


def _usage(name: str, counts: Tensor) -> dict[str, float]:
    usage, perplexity = usage_and_perplexity(counts)
    return {f"{name}_usage": usage, f"{name}_perplexity": perplexity}


class ReconstructionScore:
    """Running sums of everything measured between images and their reconstructions.

    Args:
        layout: of the tokenizer, for codebook usage.
        network: features for the Fréchet distance, or `None`.
        perceptual: distance `[B]` of two float images in [-1, 1] (LPIPS), or `None`.
    """

    def __init__(
        self,
        layout: TokenLayout,
        network: FeatureNet | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.network, self.perceptual = network, perceptual
        self.usage = CodebookUsage(layout)
        self.count = 0
        self.sums = dict.fromkeys(("psnr", "ssim", "mse", *(["lpips"] if perceptual else [])), 0.0)
        device = next(network.parameters()).device if network else "cpu"
        self.statistics = [GaussianStatistics(network.dim, device) for _ in range(2)] if network else []

    def update(self, image: Tensor, reconstruction: Tensor, codes: Tensor, *, rounded: bool = True) -> None:
        """Add a batch.

        Args:
            image: uint8 `[B, H, W, 3]`.
            reconstruction: float `[B, 3, H, W]`, as the decoder wrote it.
            codes: `[B, N]`.
            rounded: measure PSNR and SSIM on the reconstruction rounded to uint8, as a file would hold it.
        """
        pixels = to_uint8(reconstruction)
        target = image.to(reconstruction.device)
        written = pixels.permute(0, 3, 1, 2) if rounded else ((reconstruction + 1) * 127.5).clamp(0, DATA_RANGE)
        original = target.permute(0, 3, 1, 2)
        self.count += len(image)
        self.sums["psnr"] += psnr(original, written).sum().item()
        self.sums["ssim"] += ssim(original, written).sum().item()
        self.sums["mse"] += (original.double() - written.double()).square().mean((1, 2, 3)).sum().item()
        if self.perceptual:
            self.sums["lpips"] += self.perceptual(to_image(target), to_image(pixels)).double().sum().item()
        self.usage.update(codes)
        if self.network:
            for statistics, side in zip(self.statistics, (target, pixels), strict=True):
                statistics.update(self.network(side).pooled)

    def empty(self) -> Self:
        """A fresh score of the same kind."""
        return type(self)(self.usage.layout, self.network, self.perceptual)

    def merge(self, other: Self) -> None:
        """Add another part of the same set."""
        self.count += other.count
        self.sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        self.usage.merge(other.usage)
        for mine, theirs in zip(self.statistics, other.statistics, strict=True):
            mine.merge(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        statistics = [part.state_dict() for part in self.statistics]
        return {"count": self.count, "sums": dict(self.sums), "usage": list(self.usage.counts), "statistics": statistics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.count, self.sums = int(state["count"]), dict(state["sums"])
        self.usage.counts = [counts.clone() for counts in state["usage"]]
        for part, values in zip(self.statistics, state["statistics"], strict=True):
            part.load_state_dict(values)

    def numbers(self) -> dict[str, float]:
        """The metrics by name.

        Raises:
            UserError: no image came.
        """
        if not self.count:
            raise UserError("no images to measure", fix="give a split that has some")
        numbers = {name: total / self.count for name, total in self.sums.items()} | self.usage.numbers()
        if self.network and self.count > 1:
            originals, written = (part.gaussian() for part in self.statistics)
            numbers[f"fd_{self.network.name}"] = frechet_distance(originals, written)
        return numbers


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    network: FeatureNet | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    rounded: bool = True,
    data: Mapping[str, Any] | None = None,
    subject: Mapping[str, Any] | None = None,
    across_ranks: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Result:
    """Encode and decode every image and compare with the original.

    Args:
        tokenizer: runs in eval mode on its own device; its mode is put back.
        batches: mappings with `image` uint8 `[B, H, W, 3]`.
        network: features for the Fréchet distance between the images and their own reconstructions (not the training set).
        perceptual: LPIPS-like distance `[B]` of two images in [-1, 1].
        rounded: round reconstructions to uint8 before PSNR and SSIM.
        data: names the images (dataset, split, crop, content hash), for the protocol.
        subject: names the tokenizer (run, checkpoint, weight hash).
        across_ranks: every rank of the process group calls this with its part of the images, and gets the whole result.
        on_batch: told the number of images after each batch, for a progress bar.
    """
    score = ReconstructionScore(tokenizer.layout, network, perceptual)
    device, was_training = next(tokenizer.parameters()).device, tokenizer.training
    tokenizer.eval()
    try:
        for batch in batches:
            codes = tokenizer.encode(to_image(batch["image"].to(device))).codes
            score.update(batch["image"], tokenizer.decode(codes), codes, rounded=rounded)
            if on_batch:
                on_batch(len(codes))
    finally:
        tokenizer.train(was_training)
    if across_ranks:
        score = merge_ranks(score)
    return Result("reconstruction", score.numbers(), protocol_of(score, rounded, data or {}), dict(subject or {}))


def protocol_of(score: ReconstructionScore, rounded: bool, data: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two scores comparable: the images, the rounding, and how each metric is taken."""
    protocol: dict[str, Any] = {
        "data": dict(data),
        "count": score.count,
        "reconstruction": "uint8, clamp(round_half_up((x + 1) * 127.5), 0, 255)" if rounded else "float, clamped to [0, 255]",
        "psnr": f"mean over images, data range {DATA_RANGE:g}, capped at {PSNR_CAP:g} dB",
        "ssim": f"mean over images and channels, data range {DATA_RANGE:g}, window {SSIM_WINDOW}, sigma {SSIM_SIGMA}, valid",
    }
    if score.network:
        protocol |= {"features": score.network.protocol(), "reference": "the same images, uint8"}
    if score.perceptual:
        describe = getattr(score.perceptual, "protocol", None)
        protocol["lpips"] = describe() if describe else type(score.perceptual).__name__
    return protocol
