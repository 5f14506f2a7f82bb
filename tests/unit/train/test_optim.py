"""Which parameters of VAR are decayed, and that the decay moves."""

import torch
from tokar.conf.spine import Optim
from tokar.models.generators.next_scale import NextScale
from tokar.train.optim import make_optimizer
from torch import nn

ALIKE = ("start", "positions", "levels.weight", "offset", "temperature", "qv_bias")


def groups(module: nn.Module, **changes: object) -> tuple[set[str], set[str]]:
    """Names of the parameters that are decayed, and of the others."""
    optimizer = make_optimizer(Optim(lr=1e-3, weight_decay=0.1, **changes), module, module.named_parameters())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {True: set(), False: set()}
    for group in optimizer.param_groups:
        found[group["weight_decay"] > 0] |= {names[id(parameter)] for parameter in group["params"]}
    return found[True], found[False]


def test_vars_tables_of_places_gates_and_temperatures_are_not_decayed() -> None:
    for shared in (False, True):
        with torch.device("meta"):
            module = NextScale(16, 5, [(1, 1), (2, 2)], embed_dim=4, dim=32, layers=1, heads=2, shared_modulation=shared)
        decayed, others = groups(module)
        assert {"classes.weight", "embed.weight", "head.weight", "transformer.blocks.0.mlp.up.weight"} <= decayed
        assert not [name for name in decayed if name.endswith(("bias", *ALIKE))]
        assert {"start", "positions", "levels.weight", "transformer.blocks.0.attention.temperature"} <= others
        assert ("transformer.blocks.0.offset" in others) == shared


def test_all_are_decayed_where_asked() -> None:
    decayed, others = groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), decay_vectors=True)
    assert len(decayed) == 4
    assert not others
