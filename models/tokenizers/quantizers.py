"""Vector quantization: the interface, and the nearest-neighbour codebook of the VQ-GAN family.

Shapes: `B` batch, `D` code width, `V` codebook, `R` rows: all positions of a batch, flattened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ranges import NonNegativeFloat, NonNegativeInt, PositiveInt

# Scores [rows, V] held at once. On a CPU the search is three times faster (V 16384) when they stay in its cache (1 MiB).
_CHUNK_CPU, _CHUNK = 1 << 18, 1 << 24
_ENTROPY_TEMPERATURE = 0.01
_LOG_GUARD = 1e-5


class Quantized(NamedTuple):
    """What a quantizer returns: the latent `[B, D, *]`, the codes `[B, *]`, and its losses by name, already weighted."""

    latent: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Maps each position of a latent to one of `codebook_size` codes of width `dim`."""

    codebook_size: int
    dim: int

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantize `[B, D, *]`, any number of trailing dimensions; gradients reach `z` through the latent."""

    @abstractmethod
    def embed(self, indices: Tensor) -> Tensor:
        """The code vectors `[B, D, *]` of indices `[B, *]`: exactly the latent that `forward` gave with them."""


class VectorQuantizer(Quantizer):
    """Nearest neighbour in a learned codebook, with straight-through gradients (VQ-VAE; l2-normalised as in ViT-VQGAN).

    Losses: `codebook` = mean((q − sg z)²), `commitment` = β·mean((sg q − z)²), and only if weighted `entropy` =
    w·(mean_i H(p_i) − H(mean_i p_i)) with p = softmax(−distance/0.01). All in float32, whatever the autocast.

    Args:
        codebook_size: number of codes `V`.
        dim: width of a code `D`.
        beta: weight of the commitment loss.
        l2_normalize: compare and return unit vectors.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        restart_after: a code that no training step has used for so many steps is moved onto a vector of the current
            batch; 0: never. The draw follows torch's RNG and the counts are a buffer, so a resumed run repeats it; with
            several ranks the counts are shared and rank 0's vectors are taken. The codebook must not be sharded.
    """

    steps_unused: Tensor

    def __init__(
        self,
        codebook_size: PositiveInt = 16384,
        dim: PositiveInt = 8,
        beta: NonNegativeFloat = 0.25,
        l2_normalize: bool = True,
        entropy_weight: NonNegativeFloat = 0.0,
        restart_after: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.beta = codebook_size, dim, beta
        self.l2_normalize, self.entropy_weight, self.restart_after = l2_normalize, entropy_weight, restart_after
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        if l2_normalize:
            with torch.no_grad():
                self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        self.register_buffer("steps_unused", torch.zeros(codebook_size, dtype=torch.int64))

    def codes(self) -> Tensor:
        """The codebook `[V, D]` in float32, normalised if so configured."""
        return self._normalize(self.codebook.float())

    def embed(self, indices: Tensor) -> Tensor:
        """The code vectors `[B, D, *]` in float32 of indices `[B, *]`."""
        rows = F.embedding(indices, self.codebook).float()
        return self._normalize(rows).movedim(-1, 1)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize `[B, D, *]`; the latent is float32."""
        with torch.autocast(z.device.type, enabled=False):
            z = self._normalize(z.float().movedim(1, -1))
            rows = z.reshape(-1, self.dim)
            if self.training and self.restart_after:
                self._restart(rows.detach())
            codes = self.codes()
            flat = nearest_code(rows.detach(), codes.detach())
            if self.training and self.restart_after:
                self._count(flat)
            indices = flat.view(z.shape[:-1])
            q = F.embedding(indices, codes)
            losses = {
                "codebook": F.mse_loss(q, z.detach()),
                "commitment": self.beta * F.mse_loss(z, q.detach()),
            }
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * entropy_loss(rows, codes)
            # z − sg z is exactly zero, so the value is the code itself and the gradient is the identity.
            latent = q.detach() + (z - z.detach())
        return Quantized(latent.movedim(-1, 1), indices, losses)

    def _normalize(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.l2_normalize else rows

    @torch.no_grad()
    def _restart(self, rows: Tensor) -> None:
        # Before the codebook is used: changing it after would break the backward pass. Every step draws the same
        # amount of randomness, dead codes or not, and nothing is read back from the device.
        order = torch.randperm(rows.shape[0], device=rows.device)
        candidates = rows[order[torch.arange(self.codebook_size, device=rows.device) % rows.shape[0]]]
        if _several_ranks():
            dist.broadcast(candidates, src=0)
        dead = self.steps_unused >= self.restart_after
        self.codebook.copy_(torch.where(dead[:, None], candidates.to(self.codebook), self.codebook))
        self.steps_unused.masked_fill_(dead, 0)

    @torch.no_grad()
    def _count(self, used: Tensor) -> None:
        hit = torch.zeros_like(self.steps_unused).index_fill_(0, used, 1)
        if _several_ranks():
            dist.all_reduce(hit, dist.ReduceOp.MAX)
        self.steps_unused.add_(1).mul_(1 - hit)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.library.custom_op("tokar::nearest_code", mutates_args=())
def nearest_code(rows: Tensor, codes: Tensor, chunk: int | None = None) -> Tensor:
    """Index `[R]` of the code with the smallest squared distance to each row, compared in full float32.

    Args:
        rows: `[R, D]`.
        codes: `[V, D]`.
        chunk: rows compared at once; by default as many as keep the scores below 64 MiB (1 MiB on a CPU).
    """
    # argmin |z − e|² = argmax (z·e − |e|²/2): one matrix product that adds the bias on the way.
    bias = -0.5 * codes.square().sum(-1)
    parts = rows.split(chunk or max(1, (_CHUNK if rows.is_cuda else _CHUNK_CPU) // codes.shape[0]))
    with _full_float32():
        return torch.cat([torch.addmm(bias, part, codes.t()).argmax(-1) for part in parts])


@nearest_code.register_fake
def _(rows: Tensor, codes: Tensor, chunk: int | None = None) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 inside: its 10-bit mantissa would make the codes of an image depend on a speed switch.

    This is why the search is an operator of its own: `torch.compile` calls it as it stands.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def entropy_loss(rows: Tensor, codes: Tensor, chunk: int | None = None) -> Tensor:
    """Mean entropy of the soft assignments minus the entropy of their mean: low when each is sure and all are used.

    Args:
        rows: `[R, D]`; gradients reach both.
        codes: `[V, D]`.
        chunk: rows at once; each chunk is recomputed in the backward pass, so no `[R, V]` is ever held.
    """

    def sums(part: Tensor) -> tuple[Tensor, Tensor]:
        distance = part.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * part @ codes.t()
        log_p = F.log_softmax(-distance / _ENTROPY_TEMPERATURE, dim=-1)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(0)

    parts = rows.split(chunk or max(1, _CHUNK // codes.shape[0]))
    each = [_recomputed(sums, part) for part in parts] if len(parts) > 1 else [sums(rows)]
    sample_entropy = torch.stack([entropy for entropy, _ in each]).sum() / rows.shape[0]
    mean_p = torch.stack([total for _, total in each]).sum(0) / rows.shape[0]
    return sample_entropy + (mean_p * (mean_p + _LOG_GUARD).log()).sum()


def _recomputed(function: Callable[[Tensor], tuple[Tensor, Tensor]], part: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = checkpoint(function, part, use_reentrant=False)
    return result
