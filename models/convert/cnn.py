"""What LlamaGen's and GigaTok's checkpoints share: the convolutional halves and the quantizer, their names and sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from .family import Node, Shapes, State

MODELS = "tokar.models.tokenizers"
Renames = Sequence[tuple[str, str]]

# Ours on the right. Only attention differs in more than its name: they keep q, k, v apart, we keep one matrix.
RENAMES: Renames = (
    (r"\.conv_blocks\.(\d+)\.res\.", r".levels.\1.blocks."),
    (r"\.conv_blocks\.(\d+)\.attn\.", r".levels.\1.attentions."),
    (r"\.conv_blocks\.(\d+)\.(?:down|up)sample\.", r".levels.\1.resample."),
    (r"\.mid\.", ".middle."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".out."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
)
RENAMES_BACK: Renames = (
    (r"\.levels\.(\d+)\.blocks\.", r".conv_blocks.\1.res."),
    (r"\.levels\.(\d+)\.attentions\.", r".conv_blocks.\1.attn."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.conv_blocks.\1.downsample."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.conv_blocks.\1.upsample."),
    (r"\.middle\.", ".mid."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"^((?:en|de)coder\..*)\.out\.", r"\1.proj_out."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
)
USED, _USED_LENGTH = "quantize.codebook_used", 65536  # their sliding window of last indices, a statistic
_UNUSED = "quantizer.steps_unused"  # our count for restarting dead codes
_CODEBOOK = "quantize.embedding.weight"


def recognise(shapes: Shapes) -> bool:
    """Whether there are both halves, a codebook and 1x1 convolutions around it."""
    needed = {f"{half}.{name}.weight" for half in ("encoder", "decoder") for name in ("conv_in", "conv_out")}
    needed |= {"encoder.conv_blocks.0.res.0.conv1.weight", _CODEBOOK}
    return needed <= set(shapes) and len(shapes.get("quant_conv.weight", ())) == 4


def to_ours(state: Mapping[str, Tensor], renames: Renames = RENAMES) -> State:
    """Rename, join q, k, v, leave out the usage window, add our count of unused steps."""
    merged = join_qkv({name: value for name, value in state.items() if name != USED})
    ours = {rename(name, renames): value for name, value in merged.items()}
    ours[_UNUSED] = torch.zeros(state[_CODEBOOK].shape[0], dtype=torch.int64)
    return ours


def to_theirs(state: Mapping[str, Tensor], renames: Renames = RENAMES_BACK) -> State:
    """Rename back, part q, k, v, add an empty usage window."""
    renamed = {rename(name, renames): value for name, value in state.items() if name != _UNUSED}
    return {USED: torch.zeros(_USED_LENGTH), **part_qkv(renamed)}


def join_qkv(state: Mapping[str, Tensor]) -> State:
    """Every `*.q`, `*.k` and `*.v` as one `*.qkv`."""
    joined = dict(state)
    for stem in [name.removesuffix("q.weight") for name in state if name.endswith(".q.weight")]:
        for kind in ("weight", "bias"):
            parts = [f"{stem}{letter}.{kind}" for letter in "qkv"]
            if all(part in joined for part in parts):  # else the strict load names what is missing
                joined[f"{stem}qkv.{kind}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


def part_qkv(state: Mapping[str, Tensor]) -> State:
    """The inverse of `join_qkv`."""
    parted: State = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".qkv.")
        if stem:
            parted |= {f"{stem}.{letter}.{kind}": part.clone() for letter, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            parted[name] = value
    return parted


def rename(name: str, table: Renames) -> str:
    """Every pattern of the table, one after another."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def swap(name: str, pairs: Renames) -> str:
    """The first of every pair replaced by the second, one pair after another; `#` stands for a number.

    What does not begin with a dot must begin the name, so a table of distinct pieces reads both ways.
    """
    for old, new in pairs:
        pattern = ("" if old.startswith(".") else "^") + re.escape(old).replace(r"\#", r"(\d+)")
        first, *rest = new.split("#")
        name = re.sub(pattern, first + "".join(rf"\g<{place}>{part}" for place, part in enumerate(rest, 1)), name)
    return name


def levels(names: Iterable[str], stem: str) -> int:
    """Number of levels below `stem`."""
    found = (re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in names)
    return 1 + max((int(level[1]) for level in found if level), default=-1)


def mirror(name: str, stem: str, count: int) -> str:
    """The level that follows `stem`, counted from the other end: some decoders count from the finest, ours as they run."""
    return re.sub(rf"^({re.escape(stem)})(\d+)", lambda found: f"{found[1]}{count - 1 - int(found[2])}", name)


def any_starts(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    """Whether any name starts with one of the prefixes."""
    return any(name.startswith(prefixes) for name in names)


def read_half(shapes: Shapes, half: str, config: Mapping[str, Any]) -> Node:
    """Constructor arguments of our `encoder` or `decoder` (`half`) from the shapes of theirs."""
    width = shapes["encoder.conv_in.weight"][0]
    widths: dict[int, int] = {}
    blocks = 0
    for name, shape in shapes.items():
        if found := re.match(rf"{half}\.conv_blocks\.(\d+)\.res\.(\d+)\.conv1\.weight", name):
            widths[int(found[1])] = shape[0]
            blocks = max(blocks, int(found[2]) + 1)
    finest_first = sorted(widths, reverse=half == "decoder")
    multipliers = [widths[level] // width for level in finest_first]
    z_channels = shapes["encoder.conv_out.weight"][0] if half == "encoder" else shapes["decoder.conv_in.weight"][1]
    check_against(config, {f"{half}_ch_mult": multipliers, "z_channels": z_channels, "ch": width})
    return {
        "width": width,
        "multipliers": multipliers,
        "blocks": blocks,
        "z_channels": z_channels,
        "attention": any_starts(shapes, (f"{half}.mid.1.q.",)),
        "dropout": config.get("dropout_p", 0.0),
    }


def read_quantizer(shapes: Shapes, config: Mapping[str, Any]) -> Node:
    """The node of our `VectorQuantizer`."""
    codebook_size, dim = shapes[_CODEBOOK]
    check_against(config, {"codebook_size": codebook_size, "codebook_embed_dim": dim})
    return {
        "_target_": f"{MODELS}.quantizers.VectorQuantizer",
        "codebook_size": codebook_size,
        "dim": dim,
        "beta": config.get("commit_loss_beta", 0.25),
        "l2_normalize": config.get("codebook_l2_norm", True),
        "entropy_weight": config.get("entropy_loss_ratio", 0.0),
        "rotate": config.get("rot", False),
    }


def check_against(config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """What the config says must be what the weights show.

    Raises:
        UserError: it is not.
    """
    for key, value in found.items():
        given = config.get(key, value)
        if (list(given) if isinstance(given, list | tuple) else given) != value:
            raise UserError(f"{key} is {given} in the config, but {value} in the weights", fix="correct the config")
