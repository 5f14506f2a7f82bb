"""From logits to codes: temperature, top-k, top-p, then one draw by inverse CDF.

Shapes: `B` batch, `U` tokens picked at once, `N` tokens of an image, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, sample_ids: Sequence[int], n_tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """One number in [0, 1) for every token of every sample: `[B, N]` float32.

    Sample `i` gets the same numbers in any batch, on any device: they are a pure function of (seed, sample id, token).
    float32 is meant: times the float64 total of a distribution, such a number always stays below that total.

    Args:
        seed: of the whole request, not negative.
        sample_ids: id of each sample, not negative.
        n_tokens: `N`.
        device: where they go.
    """
    streams = [np.random.Generator(np.random.Philox(key=[seed, index])) for index in sample_ids]
    return torch.from_numpy(np.stack([stream.random(n_tokens, dtype=np.float32) for stream in streams])).to(device)


class Numbers:
    """The random numbers of some samples: each has its own, whatever the batch.

    Args:
        seed: see `uniforms`.
        sample_ids: see `uniforms`.
        n_tokens: see `uniforms`.
        device: where they go.
    """

    def __init__(self, seed: int, sample_ids: Sequence[int], n_tokens: int, device: torch.device) -> None:
        self._tokens = uniforms(seed, sample_ids, n_tokens, device)
        # Another part of the counter's range than that of `uniforms`.
        self._streams = [np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, 1])) for index in sample_ids]

    def of_tokens(self, columns: slice | list[int]) -> Tensor:
        """One for each of these tokens, `[B, U]`: where each is drawn once."""
        return self._tokens[:, columns]

    def take(self, *shape: int) -> Tensor:
        """The next ones of every sample, `[B, *shape]`: where each token may be drawn several times."""
        drawn = np.stack([stream.random(shape, dtype=np.float32) for stream in self._streams])
        return torch.from_numpy(drawn).to(self._tokens.device)


def restrict(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits `[..., V]` in which the tokens that may not be drawn are -inf, as LlamaGen does; in one pass over them.

    Args:
        logits: already divided by the temperature.
        top_k: keep the k largest (and any equal to the k-th); 0 keeps all.
        top_p: of these k the most likely up to and including the first at which their total passes `top_p` (and any equal to
            it); 1 keeps all.
    """
    truncated = 0 < top_k < logits.shape[-1]
    if not truncated and top_p >= 1.0:
        return logits
    ordered = logits.topk(top_k, dim=-1).values if truncated else logits.sort(dim=-1, descending=True).values
    if top_p < 1.0:
        probability = ordered.softmax(dim=-1)
        # The last that is kept is the last before which they have not yet passed top_p; the first always is.
        kept = (probability.cumsum(dim=-1) - probability <= top_p).sum(dim=-1, keepdim=True).clamp_min(1)
        least = ordered.gather(-1, kept - 1)
    else:
        least = ordered[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution of `softmax(logits)` first passes `uniform`.

    Args:
        logits: `[B, U, V]` float32.
        uniform: `[B, U]` in [0, 1).

    Returns:
        Codes `[B, U]` int64; a token of probability 0 is never drawn.
    """
    total = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniform.double()[..., None] * total[..., -1:]
    index = torch.searchsorted(total, target, right=True)[..., 0]
    return index.clamp_(max=logits.shape[-1] - 1)  # NaN logits land past the end; the caller reports those


def pick(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, greedy: bool = False
) -> Tensor:
    """Codes `[B, U]` int64 from logits `[B, U, V]`: temperature, top-k, top-p, draw; or the arg-max when greedy.

    Args:
        logits: guided already.
        uniform: `[B, U]`, one number for each draw.
        temperature: divides the logits; positive.
        top_k: see `restrict`.
        top_p: see `restrict`.
        greedy: take the most likely token; the other choices then do not matter.
    """
    if greedy:
        return logits.argmax(dim=-1)
    return draw(temper(logits, temperature, top_k, top_p), uniform)


def temper(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Float32 logits whose softmax is what is drawn from: see `pick`."""
    return restrict(logits.float() if temperature == 1.0 else logits.float() / temperature, top_k, top_p)
