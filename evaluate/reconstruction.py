"""How well a tokenizer gives images back: PSNR, SSIM, Fréchet distance, and how much of its codebook it uses.

Shapes: `B` batch, `N` tokens, `V` codes. Images are uint8 `[B, H, W, 3]` unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.stream import to_image, to_uint8
from ..errors import UserError
from ..models.build import weights_hash
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.layout import TokenLayout
from .measures import Batch
from .protocol import Result
from .ranks import Pace, Source, accumulate
from .score import SampleScore

DATA_RANGE = 255.0
PSNR_CAP = 100.0  # dB; an image given back exactly would otherwise make the mean infinite
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
ROUNDING = "uint8, clamp(round_half_up((x + 1) * 127.5), 0, 255)"
"""What becomes of a decoder's floats before anything is measured."""


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
        sides: empty measures of features, of the reconstructions and of the images, their reference.
        perceptual: distance `[B]` of two float images in [-1, 1] (LPIPS), or `None`.
    """

    def __init__(
        self,
        layout: TokenLayout,
        sides: Callable[[], tuple[SampleScore, SampleScore]] | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.perceptual = perceptual
        self.usage = CodebookUsage(layout)
        self.count = 0
        self.sums = dict.fromkeys(("psnr", "ssim", "mse", *(["lpips"] if perceptual else [])), 0.0)
        self.sides = sides() if sides else ()

    def update(self, batch: Batch, reconstruction: Tensor, codes: Tensor, *, rounded: bool = True) -> None:
        """Add a batch.

        Args:
            batch: `image` uint8 `[B, H, W, 3]`, perhaps `label` and `index` `[B]`.
            reconstruction: float `[B, 3, H, W]`, as the decoder wrote it.
            codes: `[B, N]`.
            rounded: measure PSNR and SSIM on the reconstruction rounded to uint8, as a file would hold it.
        """
        pixels = to_uint8(reconstruction)
        target = batch["image"].to(reconstruction.device)
        written = pixels.permute(0, 3, 1, 2) if rounded else ((reconstruction + 1) * 127.5).clamp(0, DATA_RANGE)
        original = target.permute(0, 3, 1, 2)
        self.count += len(target)
        self.sums["psnr"] += psnr(original, written).sum().item()
        self.sums["ssim"] += ssim(original, written).sum().item()
        self.sums["mse"] += (original.double() - written.double()).square().mean((1, 2, 3)).sum().item()
        if self.perceptual:
            self.sums["lpips"] += self.perceptual(to_image(target), to_image(pixels)).double().sum().item()
        self.usage.update(codes)
        for side, images in zip(self.sides, (pixels, target), strict=False):
            side.update({**batch, "image": images})

    def state_dict(self) -> dict[str, Any]:
        """See `ranks.Score`."""
        sides = [side.state_dict() for side in self.sides]
        return {"count": self.count, "sums": dict(self.sums), "usage": list(self.usage.counts), "sides": sides}

    def merge(self, state: Mapping[str, Any]) -> None:
        """See `ranks.Score`."""
        self.count += int(state["count"])
        self.sums = {name: value + state["sums"][name] for name, value in self.sums.items()}
        for mine, theirs in zip(self.usage.counts, state["usage"], strict=True):
            mine += theirs
        for side, values in zip(self.sides, state["sides"], strict=True):
            side.merge(values)

    def numbers(self) -> dict[str, float]:
        """The metrics by name.

        Raises:
            UserError: no image came.
        """
        if not self.count:
            raise UserError("no images to measure", fix="give a split that has some")
        numbers = {name: total / self.count for name, total in self.sums.items()} | self.usage.numbers()
        if self.sides and self.count > 1:
            reconstructions, originals = self.sides
            numbers |= reconstructions.numbers(originals)
        return numbers


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    source: Source,
    count: int,
    pace: Pace,
    *,
    sides: Callable[[], tuple[SampleScore, SampleScore]] | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    rounded: bool = True,
    data: Mapping[str, Any] | None = None,
    subject: Mapping[str, Any] | None = None,
) -> Result:
    """Encode and decode every image and compare with the original.

    Args:
        tokenizer: runs in eval mode on its own device; its mode is put back.
        source: of the images, see `ranks.accumulate`; every rank calls this and gets the whole result.
        count: number of images.
        pace: see `ranks.Pace`.
        sides: empty measures of features between the images and their own reconstructions (not the training set).
        perceptual: LPIPS-like distance `[B]` of two images in [-1, 1].
        rounded: round reconstructions to uint8 before PSNR and SSIM.
        data: names the images (dataset, split, crop, content hash), for the protocol.
        subject: names the tokenizer (run, checkpoint, weight hash).
    """
    device, was_training = next(tokenizer.parameters()).device, tokenizer.training

    def make() -> ReconstructionScore:
        return ReconstructionScore(tokenizer.layout, sides, perceptual)

    def step(score: ReconstructionScore, batch: Batch) -> None:
        codes = tokenizer.encode(to_image(batch["image"].to(device))).codes
        score.update(batch, tokenizer.decode(codes), codes, rounded=rounded)

    tokenizer.eval()
    try:
        score = accumulate(make, source, count, step, pace)
    finally:
        tokenizer.train(was_training)
    return Result("reconstruction", score.numbers(), protocol_of(score, rounded, data or {}), dict(subject or {}))


def protocol_of(score: ReconstructionScore, rounded: bool, data: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two scores comparable: the images, the rounding, and how each metric is taken."""
    protocol: dict[str, Any] = {
        "data": dict(data),
        "count": score.count,
        "reconstruction": ROUNDING if rounded else "float, clamped to [0, 255]",
        "psnr": f"mean over images, data range {DATA_RANGE:g}, capped at {PSNR_CAP:g} dB",
        "ssim": f"mean over images and channels, data range {DATA_RANGE:g}, window {SSIM_WINDOW}, sigma {SSIM_SIGMA}, valid",
    }
    if score.sides:
        protocol |= {**score.sides[0].protocol(), "reference": "the same images, uint8"}
    if score.perceptual:
        known = {"weights_sha256": weights_hash(score.perceptual)} if isinstance(score.perceptual, nn.Module) else {}
        protocol["lpips"] = {"name": type(score.perceptual).__name__, "images": "in [-1, 1], rounded to bytes before", **known}
    return protocol
