"""Frozen text encoders of transformers: captions and prompts to the features that a generator begins with.

Shapes: `B` texts, `P` slots of a text, `W` width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .generators.conditions import pack_text
from .tokenizers.frozen import load_frozen

_KINDS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}


class TextEncoder:
    """T5 (FLAN-T5 too) or the text half of CLIP: the last hidden states, without those of the padding.

    Texts are taken as they are; LlamaGen cleans its captions of links, markup and the like before.

    Args:
        path: a folder on disk, with its tokenizer, or a hub id, such as google/flan-t5-xl or openai/clip-vit-large-patch14.
        tokens: slots `P`; longer texts are cut.

    Raises:
        UserError: no text encoder there, or one of shorter texts.
    """

    def __init__(self, path: str, tokens: int = 120) -> None:
        self._network = load_frozen(path, _KINDS, "T5 or CLIP").eval().requires_grad_(False)
        self._tokenizer = load_tokenizer(path)
        self.path, self.tokens = path, tokens
        config = self._network.config
        self.features: int = getattr(config, "d_model", None) or config.hidden_size
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and tokens > longest:
            raise UserError(f"reads {longest} tokens, not {tokens}", where=path, fix=f"set text.tokens={longest}")

    def to(self, device: torch.device) -> TextEncoder:
        """Move the network."""
        self._network.to(device)
        return self

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader of the features must know."""
        return {"path": self.path, "tokens": self.tokens, "features": self.features}

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Conditions `[B, P, W + 1]`, float32: features at the right end of their slots, and which slots hold one."""
        device = next(self._network.parameters()).device
        words = self._tokenizer(list(texts), max_length=self.tokens, truncation=True, padding=True, return_tensors="pt")
        ids, mask = words["input_ids"].to(device), words["attention_mask"].to(device)
        hidden = self._network(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return pack_text(hidden, mask.sum(1), self.tokens)


def load_tokenizer(path: str) -> Any:
    """What cuts texts into tokens, of a folder or hub id of transformers.

    Raises:
        UserError: there is none.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
        raise UserError("no readable tokenizer of texts there", where=path, fix="give a folder that holds it too") from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer
