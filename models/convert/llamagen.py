"""LlamaGen's VQ tokenizers (VQ-16, VQ-8, any width): `VQModel` of its public repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import cnn
from .family import Family, Node, Shapes, State


class LlamaGenVQ(Family):
    """`VQModel`: our `VQGAN` of `ConvEncoder`, `ConvDecoder` and `VectorQuantizer`."""

    name = "llamagen_vq"

    def recognise(self, shapes: Shapes) -> bool:
        """By the block names, the codebook, and the absence of GigaTok's transformers."""
        return cnn.recognise(shapes) and not cnn.any_starts(shapes, ("s2to1encoder.", "s2dencoder.", "decoder.adaptive."))

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Every size is read from the shapes; the config adds l2 normalisation, β, dropout and `image_size`."""
        return {
            "_target_": f"{cnn.MODELS}.vqgan.VQGAN",
            "encoder": {"_target_": f"{cnn.MODELS}.conv.ConvEncoder", **cnn.read_half(shapes, "encoder", config)},
            "decoder": {"_target_": f"{cnn.MODELS}.conv.ConvDecoder", **cnn.read_half(shapes, "decoder", config)},
            "quantizer": cnn.read_quantizer(shapes, config),
            "image_size": config.get("image_size", 256),
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, join q, k, v, drop the usage window, add our count of unused steps."""
        return cnn.to_ours(state), [name for name in state if name == cnn.USED]

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back, part q, k, v, add an empty usage window."""
        return cnn.to_theirs(state)

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`quant [B, D, h, w]`, `indices [B, N]` and `reconstruction [B, 3, H, W]` of `image`."""
        output = models["state"](inputs["image"])
        return {"quant": output.z_quantized, "indices": output.codes, "reconstruction": output.reconstruction}
