"""Quantizers: from latents to codes and back, all behind one interface (base.py).

| | codebook | gradient to the latent |
|---|---|---|
| `VectorQuantizer` | learned by gradient | straight-through or rotated |
| `EMAVectorQuantizer` | a moving average of the latents | straight-through or rotated |
| `ClusteringVectorQuantizer` | learned by gradient, idle codes drawn to latents | straight-through or rotated |
| `SimVQ` | a frozen one, seen through a learned matrix | straight-through or rotated |
| `IBQ` | learned, every code at every step | through the soft assignment |
| `FSQ`, `LFQ`, `BSQ` | none: a grid, the corners of a cube, those on the sphere | straight-through |
| `ResidualQuantizer`, `ProductQuantizer` | those of their parts, which are any of these | the parts' mean; each part's own |
"""

from .base import CodeStream, PointwiseQuantizer, Quantized, Quantizer
from .compose import ProductQuantizer, ResidualQuantizer
from .entropy import entropy_loss
from .fsq import FSQ
from .ibq import IBQ
from .lfq import BSQ, LFQ
from .search import nearest_code
from .simvq import SimVQ
from .vq import ClusteringVectorQuantizer, EMAVectorQuantizer, VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "ClusteringVectorQuantizer",
    "CodeStream",
    "EMAVectorQuantizer",
    "PointwiseQuantizer",
    "ProductQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQ",
    "VectorQuantizer",
    "entropy_loss",
    "nearest_code",
]
