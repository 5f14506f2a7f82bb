"""What next-token generators and block diffusion share: the switches of LlamaGen's and GigaTok's transformer, and its start."""

from __future__ import annotations

import torch
from torch import nn

from ..layers import init_normal
from .transformer import Modulation, Transformer, TransformerConfig

QK_EPS = 1e-5  # GigaTok's, PyTorch's default


def llama_config(
    dim: int,
    layers: int,
    heads: int,
    *,
    qk_norm: bool,
    modulation: Modulation,
    multiple_of: int,
    resid_dropout: float,
    ffn_dropout: float,
    drop_path: float,
) -> TransformerConfig:
    """RMSNorm, SwiGLU, no bias; see `NextToken` for the arguments."""
    return TransformerConfig(
        dim,
        layers,
        heads,
        qk_norm="layer" if qk_norm else "none",
        qk_eps=QK_EPS,
        modulation=modulation,
        multiple_of=multiple_of,
        resid_dropout=resid_dropout,
        ffn_dropout=ffn_dropout,
        drop_path=drop_path,
    )


def init_llama(generator: nn.Module, transformer: Transformer, head: nn.Module) -> None:
    """Small normals; the head and adaptive layer norms begin as none (LlamaGen's, GigaTok's, DiT's)."""
    init_normal(generator)
    layers = [block.modulation for block in transformer.blocks]
    for zeroed in (head, *layers, transformer.shared, transformer.final):
        if isinstance(zeroed, nn.Module):
            for parameter in zeroed.parameters():
                nn.init.zeros_(parameter)


def learned_places(slots: int, dim: int) -> nn.Parameter:
    """GigaTok's table of places, one row for the class and one for each token."""
    return nn.Parameter(torch.randn(slots, dim) * dim**-0.5)
