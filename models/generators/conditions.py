"""What a next-token generator begins with: a class, or the features of a text.

Shapes: `B` batch, `P` prefix slots, `W` width of a text feature, `C` width of the generator.
A condition is one tensor, whatever it is of, so that samplers can index, join and double it: class ids `[B]`, or text
`[B, P, W + 1]`, features and in the last column what a slot is (`PADDING`, `SEEN`, `NULL`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import PositiveInt

PADDING, SEEN, NULL = 0.0, 1.0, -1.0
"""Last column of a text: no slot sees it; a feature; in the place of a feature the learned one for "no text"."""


class TextCondition(nn.Module):
    """Features of a frozen text encoder as prefix slots: `Linear(gelu(Linear(x)))` without bias (LlamaGen's captions).

    Slots without text come first (left padding), so that the last one is the end of the text. "No text" is a learned feature
    for each slot; the published models draw theirs once and never train it.

    Args:
        dim: width `C` of the generator.
        features: width `W` of the features; FLAN-T5-XL: 2048.
        tokens: slots `P`; longer texts are cut.
    """

    def __init__(self, dim: PositiveInt, features: PositiveInt = 2048, tokens: PositiveInt = 120) -> None:
        super().__init__()
        self.dim, self.features, self.tokens = dim, features, tokens
        self.up = nn.Linear(features, dim, bias=False)
        self.down = nn.Linear(dim, dim, bias=False)
        self.nothing = nn.Parameter(torch.randn(tokens, features) / features**0.5)

    def forward(self, condition: Tensor) -> Tensor:
        """Prefix `[B, P, C]` of a text `[B, P, W + 1]`."""
        features, kind = condition.to(self.up.weight.dtype).split((self.features, 1), dim=-1)
        chosen = torch.where(kind == NULL, self.nothing, features)
        return self.down(F.gelu(self.up(chosen), approximate="tanh"))

    @staticmethod
    def null(condition: Tensor) -> Tensor:
        """The same slots without their text: the padding stays where it was, as in LlamaGen's guidance."""
        kind = torch.where(condition[..., -1:] == PADDING, PADDING, NULL).to(condition.dtype)
        return torch.cat((condition[..., :-1], kind), dim=-1)

    @staticmethod
    def padding(condition: Tensor) -> Tensor:
        """Which slots are to be seen, bool `[B, P]`."""
        return condition[..., -1] != PADDING

    def check(self, condition: Tensor) -> None:
        """Make sure that these are texts of this width.

        Raises:
            UserError: class ids, or features of another encoder.
        """
        if condition.ndim != 3:
            raise UserError("class ids for a generator of texts", where="condition", fix="give prompts instead of classes")
        self.check_shape(condition.shape[1], condition.shape[2] - 1)

    def check_shape(self, tokens: int, features: int) -> None:
        """Make sure that features have the shape that this generator reads.

        Raises:
            UserError: they have not.
        """
        if (tokens, features) != (self.tokens, self.features):
            raise UserError(
                f"text features of {tokens} tokens x {features}, the generator reads {self.tokens} x {self.features}",
                where="generator.condition",
                fix=f"set generator.condition.features={features} and tokens={tokens}, or encode texts as it reads them",
            )


def pack_text(features: Tensor, counts: Tensor, tokens: int) -> Tensor:
    """Texts as one condition `[B, P, W + 1]`, at the right end of their slots.

    Args:
        features: `[B, L, W]`, of each text the first `counts` ones; more than `tokens` are cut.
        counts: `[B]` int64.
        tokens: slots `P`.
    """
    kept = counts.clamp(max=tokens)
    packed = features.new_zeros(len(features), tokens, features.shape[2] + 1)
    for row, count in enumerate(kept.tolist()):
        packed[row, tokens - count :, :-1] = features[row, :count]
        packed[row, tokens - count :, -1] = SEEN
    return packed
