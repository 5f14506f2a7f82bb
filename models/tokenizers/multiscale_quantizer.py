"""VAR's multi-scale residual quantizer (Tian et al. 2024): coarse grids first, each coding what the ones before left over.

Shapes: `B` batch, `D` code width, `V` codebook, `S` scales, `h`, `w` the finest grid, `n` tokens of one scale,
`N` tokens of all scales. `f` is the latent, f̂ (`f_hat`) its reconstruction from the scales seen so far, both `[B, D, h, w]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from ..ranks import sum_over_ranks
from .quantizers import Quantized, nearest_code
from .quantizers.base import straight_through
from .quantizers.codebook import draw

Grid = tuple[int, int]


def grids_of(scales: Sequence[int | Sequence[int]]) -> tuple[Grid, ...]:
    """Rows and columns of each scale; a plain number is the side of a square.

    Raises:
        ValueError: no scales, a scale that is no pair, or one finer than the last.
    """
    grids = tuple((scale, scale) if isinstance(scale, int) else tuple(scale) for scale in scales)
    if not grids or any(len(grid) != 2 for grid in grids):
        raise ValueError(f"scales {list(scales)} are not grids; give sides, or [rows, columns], coarse first")
    last = grids[-1]
    if any(rows > last[0] or columns > last[1] for rows, columns in grids):
        raise ValueError(f"scales {list(scales)} do not end with the finest; put the grid of the latent last")
    return tuple((rows, columns) for rows, columns in grids)


def phi_of_scale(scales: int, count: int) -> tuple[int, ...]:
    """Which of `count` φ convolutions each scale uses: the one whose tick is nearest to k/(S−1).

    Ticks are linspace(1/(3K), 1 − 1/(3K), K) for K = 4 and with 2K otherwise. Two of VAR's ten scales are ties up to
    float64 rounding, so it is computed in numpy, in this order; the result is 0 0 1 1 1 2 2 3 3 3.
    """
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    places = [k / (scales - 1) if scales > 1 else 0.0 for k in range(scales)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)


def to_grid(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens `[B, n, D]` in raster order as a map `[B, D, rows, columns]`."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(grid_map: Tensor) -> Tensor:
    """The inverse of `to_grid`."""
    return grid_map.flatten(2).transpose(1, 2)


def shrink(grid_map: Tensor, grid: Grid) -> Tensor:
    """Area-downsample a map `[B, D, h, w]` to `[B, D, *grid]`."""
    return grid_map if grid_map.shape[-2:] == grid else F.interpolate(grid_map, grid, mode="area")


def enlarge(grid_map: Tensor, grid: Grid) -> Tensor:
    """Bicubically upsample a map to `[B, D, *grid]`."""
    return grid_map if grid_map.shape[-2:] == grid else F.interpolate(grid_map, grid, mode="bicubic")


class MultiScaleQuantizer(nn.Module):
    """One codebook for a pyramid of grids: f̂ₖ = f̂ₖ₋₁ + φ(up(E[codesₖ])), codesₖ = nearest(area(f − f̂ₖ₋₁)).

    φ(h) = (1 − α)·h + α·conv3x3(h). Losses, from the cumulative reconstruction after every scale:
    `codebook` = mean_k mse(f̂ₖ, sg f) and `commitment` = β·mean_k mse(sg f̂ₖ, f). All in float32, whatever the autocast.

    Args:
        codebook_size: number of codes `V`, shared by all scales.
        dim: width of a code `D`.
        scales: side of each grid, or [rows, columns], coarse first; the last is the grid of the latent.
        beta: weight of the commitment loss.
        normalize_search: compare unit vectors (the codes that are summed stay as they are; VAR's `using_znorm`).
        share_phi: number of φ convolutions, dealt out over the scales by `phi_of_scale`; 0: one for each scale.
        phi_ratio: α; at 0 there are no convolutions.
        restart_after: a code that no scale of any training step has used for so many steps is moved onto a residual of the
            current batch, drawn evenly from all scales, so that the coarse ones, with few tokens, get their share; 0: never.
            Seeded by torch's RNG; several ranks share the counts, and each gives its part of the residuals.
        scale_dropout: probability that a training image loses its finest scales; its losses are the mean over those kept.
        keep_scales: at least so many scales are kept; how many is drawn evenly.

    Raises:
        ValueError: the scales are no grids that end with the finest, or `scale_dropout` has nothing to drop.
    """

    steps_unused: Tensor

    def __init__(
        self,
        codebook_size: PositiveInt = 4096,
        dim: PositiveInt = 32,
        scales: Sequence[PositiveInt | Sequence[PositiveInt]] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        beta: NonNegativeFloat = 0.25,
        normalize_search: bool = False,
        share_phi: NonNegativeInt = 4,
        phi_ratio: Fraction = 0.5,
        restart_after: NonNegativeInt = 0,
        scale_dropout: Fraction = 0.0,
        keep_scales: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.grids = grids_of(scales)
        if scale_dropout and keep_scales >= len(self.grids):
            raise ValueError(f"keep_scales {keep_scales} leaves none of {len(self.grids)} scales to drop; make it smaller")
        self.codebook_size, self.dim, self.beta = codebook_size, dim, beta
        self.normalize_search, self.phi_ratio, self.restart_after = normalize_search, phi_ratio, restart_after
        self.scale_dropout, self.keep_scales = scale_dropout, keep_scales
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        count = share_phi or len(self.grids)
        self.phi_index = phi_of_scale(len(self.grids), count)
        phis = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(count if phi_ratio else 0))
        # Two names, because published weights tell shared from separate convolutions by theirs.
        self.shared_phis, self.scale_phis = (phis, nn.ModuleList()) if share_phi else (nn.ModuleList(), phis)
        self.register_buffer("steps_unused", torch.zeros(len(self.grids), codebook_size, dtype=torch.int64))

    @property
    def sizes(self) -> list[int]:
        """Tokens of each scale."""
        return [rows * columns for rows, columns in self.grids]

    def start(self, batch: int) -> Tensor:
        """f̂ before any scale: zeros `[B, D, h, w]`."""
        return torch.zeros(batch, self.dim, *self.grids[-1], device=self.codebook.device)

    def add_scale(self, f_hat: Tensor, k: int, values: Tensor) -> Tensor:
        """f̂ with scale `k` added, a new tensor.

        Args:
            f_hat: `[B, D, h, w]`.
            k: index of the scale.
            values: codes `[B, n]` (integer), or vectors `[B, n, D]` in their place: mixtures of codes, noise.
        """
        vectors = values if values.is_floating_point() else F.embedding(values, self.codebook)
        return f_hat + self._lift(k, vectors.float())

    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """What a generator sees of f̂, after scale `k`, when it predicts scale `k + 1`: `[B, n, D]` on that scale's grid."""
        return to_tokens(shrink(f_hat, self.grids[k + 1]))

    def forward(self, f: Tensor) -> Quantized:
        """Quantize `[B, D, h, w]`: latent f̂ with straight-through gradient, codes `[B, N]` coarse first, losses."""
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            codes, residuals = self._search(f.detach())
            if self.training and self.restart_after:
                self._restart(codes, residuals)  # before the codebook enters the graph
            kept = self._draw_kept(len(f), f.device)
            f_hat, codebook, commitment = self.start(len(f)), [], []
            for k, part in enumerate(codes):
                f_hat = torch.where(kept[k].view(-1, 1, 1, 1), self.add_scale(f_hat, k, part), f_hat)
                codebook.append((f_hat - f.detach()).square().mean((1, 2, 3)))
                commitment.append((f - f_hat.detach()).square().mean((1, 2, 3)))
            weights = kept / kept.sum(0)  # of the scales of each image: the mean over those it keeps
            losses = {
                "codebook": (weights * torch.stack(codebook)).sum(0).mean(),
                "commitment": self.beta * (weights * torch.stack(commitment)).sum(0).mean(),
            }
        return Quantized(straight_through(f_hat, f), torch.cat(codes, 1), losses)

    def _lift(self, k: int, vectors: Tensor) -> Tensor:
        """φ(up(vectors)): what vectors `[B, n, D]` of scale `k` add to f̂."""
        h = enlarge(to_grid(vectors, self.grids[k]).contiguous(), self.grids[-1])
        if not self.phi_ratio:
            return h
        phi = (self.shared_phis if len(self.shared_phis) else self.scale_phis)[self.phi_index[k]]
        assert isinstance(phi, nn.Conv2d)
        assert phi.bias is not None
        with torch.autocast(h.device.type, enabled=False):
            convolved = F.conv2d(h, phi.weight.float(), phi.bias.float(), padding=1)
        return h * (1 - self.phi_ratio) + convolved * self.phi_ratio

    @torch.no_grad()
    def _search(self, f: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Codes `[B, n]` of every scale, and the residuals `[B, n, D]` that they stand for."""
        codes, residuals, rest = [], [], f
        codebook = self._comparable(self.codebook.float())
        for k, grid in enumerate(self.grids):
            rows = to_tokens(shrink(rest, grid))
            found = nearest_code(self._comparable(rows).reshape(-1, self.dim), codebook).view(rows.shape[:2])
            rest = rest - self._lift(k, F.embedding(found, self.codebook).float())
            codes.append(found)
            residuals.append(rows)
        return codes, residuals

    def _comparable(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.normalize_search else rows

    def _draw_kept(self, batch: int, device: torch.device) -> Tensor:
        """Which scales each image keeps: booleans `[S, B]`."""
        scales = len(self.grids)
        count = torch.full((batch,), scales, device=device)
        if self.training and self.scale_dropout:
            fewer = torch.randint(self.keep_scales, scales, (batch,), device=device)
            count = torch.where(torch.rand(batch, device=device) < self.scale_dropout, fewer, count)
        return torch.arange(scales, device=device)[:, None] < count

    @torch.no_grad()
    def _restart(self, codes: Sequence[Tensor], residuals: Sequence[Tensor]) -> None:
        """Count what was used, then move codes that are dead on every scale."""
        hit = torch.zeros_like(self.steps_unused)
        for row, part in zip(hit, codes, strict=True):
            row.index_fill_(0, part.flatten(), 1)
        candidates = _draw_evenly(residuals, self.codebook_size)
        self.steps_unused.add_(1).mul_(sum_over_ranks(hit) == 0)
        dead = self.steps_unused.amin(0) >= self.restart_after
        self.codebook.copy_(torch.where(dead[:, None], candidates.to(self.codebook), self.codebook))
        self.steps_unused.masked_fill_(dead, 0)


def _draw_evenly(parts: Sequence[Tensor], count: int) -> Tensor:
    """Rows `[count, D]` of `[B, n, D]` parts over all ranks, from each part in turn: as many of a short one as of a long."""
    share = -(-count // len(parts))
    return torch.stack([draw(part.flatten(0, 1), share) for part in parts], dim=1).flatten(0, 1)[:count]
