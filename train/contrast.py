"""The generator stage with condition contrastive alignment: a trained generator learns to do without guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conf.stages import Contrast, GeneratorRun
from ..errors import UserError
from ..models.build import check_shapes, shapes_of
from ..models.distill.cca import contrastive_loss
from ..models.generators.base import Generator
from ..models.open import open_model
from ..models.tokenizers.base import Tokenizer
from .clock import Clock
from .generator import DROPOUT_SALT, GeneratorStage
from .randomness import sample_uniform
from .stage import Batch, Networks

OTHER_SALT = 3


class ContrastStage(GeneratorStage):
    """Begins with the weights of the reference, and is compared with it.

    The class that an image is not of is drawn anew for each sample, of all classes alike; the paper takes that of the next
    sample in the batch, which depends on how the batch is cut up.

    Args:
        config: of the run, with `contrast`.
        node: see `GeneratorStage`.
        tokenizer: see `GeneratorStage`.
        facts: see `GeneratorStage`.

    Raises:
        UserError: a reference of other codes or another shape, or a generator that has no exact likelihood given a class.
    """

    def __init__(self, config: GeneratorRun, node: dict[str, Any], tokenizer: Tokenizer | None, facts: dict[str, Any]) -> None:
        super().__init__(config, node, tokenizer, facts)
        assert config.contrast is not None
        self.contrast: Contrast = config.contrast
        if not self.generator.exact or self.generator.text is not None:
            what = "bounds its likelihood" if not self.generator.exact else "draws texts"
            raise UserError(
                f"a {type(self.generator).__name__} that {what}",
                where="contrast",
                fix="take a next-token or next-scale one of classes",
            )
        self.reference = open_reference("contrast.reference", self.contrast.reference, facts)
        weights = self.reference.state_dict()
        family = type(self.generator).__name__
        check_shapes(shapes_of(self.generator.state_dict()), shapes_of(weights), family, where="contrast.reference")
        self.generator.load_state_dict(weights)
        if tokenizer is not None:
            self.reference.bind(tokenizer)
        self.frozen.append(self.reference.requires_grad_(False).train())  # dropout stays on

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """One micro-batch."""
        place = (self.config.seed, batch["epoch"], batch["index"])
        label, null = batch["label"], self.generator.null(batch["label"])
        dropped = sample_uniform(*place, DROPOUT_SALT) < self.config.class_dropout
        other = (sample_uniform(*place, OTHER_SALT) * self.generator.num_classes).long()
        losses = contrastive_loss(
            lambda codes, condition: networks["generator"](codes, condition, None, True)["nll"], self.reference.token_nll,
            self._codes(batch), torch.where(dropped, null, label), torch.where(dropped, null, other),
            beta=self.contrast.beta, weight=self.contrast.weight,
        )  # fmt: skip
        networks["generator"].backward(losses["loss"])
        return losses


def open_reference(where: str, place: str, facts: dict[str, Any]) -> Generator:
    """The generator that a run, a checkpoint or an exported model holds.

    Args:
        where: the config key that names it.
        place: where it lies.
        facts: of the generator that is to begin with it.

    Raises:
        UserError: no generator, or one of other codes or classes.
    """
    model, theirs, _ = open_model(Path(place))
    if not isinstance(model, Generator):
        raise UserError(f"holds a {type(model).__name__}, not a generator", where=place, fix="point at a generator run")
    for name, ours in (("tokenizer", (facts["tokenizer"] or {}).get("hash")), ("classes", facts["classes"])):
        found = (theirs.get(name) or {}).get("hash") if name == "tokenizer" else theirs.get(name)
        if None not in (ours, found) and ours != found:
            raise UserError(
                f"speaks of another {name} than the codes",
                where=f"{where}={place}",
                fix="give the generator of these codes",
            )
    return model
