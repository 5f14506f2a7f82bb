"""Open-MAGVIT2's and IBQ's tokenizers: `VQModel` and `IBQ` of the public repository SEED-Voken."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import cnn, taming
from .family import Family, Node, Shapes, State

_CODEBOOK = "quantize.embedding.weight"
_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_AVERAGES = "model_ema."  # one for every parameter, under its name without the dots
_BEFORE_AVERAGES = {f"{_AVERAGES}decay": torch.tensor(0.999), f"{_AVERAGES}num_updates": torch.tensor(-1, dtype=torch.int32)}
_IBQ_NAMES = (*taming.NAMES, (_CODEBOOK, "quantizer.codebook"))
_MAGVIT2_NAMES = (
    ("encoder.down.#.downsample.", "encoder.levels.#.resample.conv."),  # before taming's shorter ones
    ("decoder.up.#.upsample.conv1.", "decoder.levels.#.resample.conv."),
    (".mid_block.#.", ".middle.#."),
    *taming.NAMES,
)


class SeedVokenFamily(Family):
    """What both have in common.

    Attributes:
        names: theirs and ours, see `taming.NAMES`.
    """

    names: cnn.Renames

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Every size is read from the shapes; the config adds what only training needs, and `image_size` (16x16 tokens)."""
        encoder, decoder = taming.read_half(shapes, "encoder.down"), taming.read_half(shapes, "decoder.up")
        found = {"ch": encoder["width"], "ch_mult": encoder["multipliers"], "z_channels": encoder["z_channels"]}
        cnn.check_against(config.get("ddconfig") or config, found)
        quantizer = self._quantizer(shapes, config)
        stride = 2 ** (len(encoder["multipliers"]) - 1)
        return {
            "_target_": f"{cnn.MODELS}.vqgan.VQGAN",
            "encoder": {"_target_": f"{cnn.MODELS}.conv.ConvEncoder", **encoder, **self._encoder(shapes)},
            "decoder": {**decoder, **self._decoder(shapes)},
            "quantizer": quantizer,
            "image_size": config.get("image_size", 16 * stride),
            "project": "quant_conv.weight" in shapes,
        }

    @abstractmethod
    def _encoder(self, shapes: Shapes) -> Node:
        """Arguments of the encoder beyond the sizes."""

    @abstractmethod
    def _decoder(self, shapes: Shapes) -> Node:
        """Class of the decoder, and its arguments beyond the sizes."""

    @abstractmethod
    def _quantizer(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """The node of our quantizer."""

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """The averages where there are some, as their evaluation takes them; renamed, q, k and v joined."""
        raw = {name: value for name, value in state.items() if name.startswith(_PARTS)}
        averaged = cnn.any_starts(state, (_AVERAGES,))
        # A parameter without an average stays out: the strict load names it, where its raw value would go unnoticed.
        kept = {name: state[_average(name)] for name in raw if _average(name) in state} if averaged else raw
        levels = cnn.levels(state, "decoder.up")
        ours = {taming.to_ours(name, self.names, levels): value for name, value in cnn.join_qkv(kept).items()}
        return ours, sorted({f"{name.partition('.')[0]}.*" for name in state if name not in raw and name[:10] != _AVERAGES})

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Renamed back, q, k and v apart, and every weight a second time as the average that their evaluation takes."""
        levels = cnn.levels(state, "decoder.levels")
        theirs = cnn.part_qkv({taming.to_theirs(name, self.names, levels): value for name, value in state.items()})
        averages = {_average(name): value.clone() for name, value in theirs.items()}
        return {**theirs, **_BEFORE_AVERAGES, **averages}

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`quant [B, D, h, w]`, `indices [B, N]` and `reconstruction [B, 3, H, W]` of `image`."""
        output = models["state"](inputs["image"])
        return {"quant": output.z_quantized, "indices": output.codes, "reconstruction": output.reconstruction}


class OpenMAGVIT2(SeedVokenFamily):
    """`VQModel` with `LFQ`: our `VQGAN` without projections of `ConvEncoder`, `AdaptiveDecoder` and `LFQ`."""

    name = "open_magvit2"
    names = _MAGVIT2_NAMES

    def recognise(self, shapes: Shapes) -> bool:
        """By taming's block names, the middle's own, and the adaptive norms; of images, not of video."""
        needed = {*taming.BLOCKS, "encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"}
        return needed <= set(shapes) and len(shapes[taming.BLOCKS[0]]) == 4

    def _encoder(self, shapes: Shapes) -> Node:
        kernel = taming.shape(shapes, "encoder.conv_out.weight")[-1]
        return {**_middle(shapes, "encoder"), "pad_all_sides": True, "kernel_out": kernel}

    def _decoder(self, shapes: Shapes) -> Node:
        return {"_target_": f"{cnn.MODELS}.adaptive.AdaptiveDecoder", **_middle(shapes, "decoder")}

    def _quantizer(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        bits = taming.shape(shapes, "encoder.conv_out.weight")[0]
        cnn.check_against(config, {"embed_dim": bits, "n_embed": 2**bits})
        return {"_target_": f"{cnn.MODELS}.quantizers.LFQ", "bits": bits}


class IBQTokenizer(SeedVokenFamily):
    """`IBQ`: our `VQGAN` of `ConvEncoder`, `ConvDecoder` and `IBQ`."""

    name = "ibq"
    names = _IBQ_NAMES

    def recognise(self, shapes: Shapes) -> bool:
        """By taming's block names with q, k and v apart and the codebook, with averages or four blocks on a level.

        taming's own VQ-GANs, which search by distance, have the same names, but two blocks and no averages.
        """
        needed = {*taming.BLOCKS, _CODEBOOK, "encoder.mid.attn_1.q.weight", "quant_conv.weight"}
        deep = "encoder.down.0.block.3.conv1.weight" in shapes
        return needed <= set(shapes) and (deep or cnn.any_starts(shapes, (_AVERAGES,)))

    def _encoder(self, shapes: Shapes) -> Node:
        return {}

    def _decoder(self, shapes: Shapes) -> Node:
        return {"_target_": f"{cnn.MODELS}.conv.ConvDecoder"}

    def _quantizer(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        codebook_size, dim = taming.shape(shapes, _CODEBOOK)
        cnn.check_against(config, {"n_embed": codebook_size, "embed_dim": dim})
        return {
            "_target_": f"{cnn.MODELS}.quantizers.IBQ",
            "codebook_size": codebook_size,
            "dim": dim,
            "beta": config.get("beta", 0.25),
            "temperature": config.get("entropy_temperature", 0.01),
        }


def _average(name: str) -> str:
    return _AVERAGES + name.replace(".", "")


def _middle(shapes: Shapes, half: str) -> Node:
    """The blocks in the middle of one half of Open-MAGVIT2, and whether its blocks have biases."""
    blocks = cnn.levels(shapes, f"{half}.mid_block")
    return {"middle_blocks": blocks, "bias": f"{half}.mid_block.0.conv1.bias" in shapes}
