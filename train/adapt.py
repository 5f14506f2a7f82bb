"""The generator stage with another input layer: a trained next-token generator learns to read vectors (DD2's teachers)."""

from __future__ import annotations

from typing import Any

from ..conf.stages import GeneratorRun
from ..errors import UserError
from ..models.build import check_shapes, shapes_of
from ..models.distill.adapt import continuous_node, inherit, reads_codes_alone
from ..models.distill.codebook import codebook_of
from ..models.tokenizers.base import Tokenizer
from .contrast import open_reference
from .generator import GeneratorStage

TABLE = "tokens."


class AdaptStage(GeneratorStage):
    """Begins with the weights of the reference, a layer fitted to its table of codes in the table's place.

    Args:
        config: of the run, with `adapt`.
        node: see `GeneratorStage`.
        tokenizer: whose code vectors are read; not `None`.
        facts: see `GeneratorStage`.

    Raises:
        UserError: no tokenizer here, or a reference of other codes or another shape, or one that has no table of codes.
    """

    def __init__(self, config: GeneratorRun, node: dict[str, Any], tokenizer: Tokenizer | None, facts: dict[str, Any]) -> None:
        assert config.adapt is not None
        if tokenizer is None:
            raise UserError("the vectors to be read are the tokenizer's, which is not here",
                            where="codes.tokenizer", fix="give the run of the tokenizer that made the codes")  # fmt: skip
        reference = open_reference("adapt.reference", config.adapt.reference, facts)
        if not reads_codes_alone(reference):
            raise UserError(f"holds a {type(reference).__name__} that has no table of codes",
                            where="adapt.reference", fix="take a next-token generator as it was trained")  # fmt: skip
        codebook = codebook_of(tokenizer)
        super().__init__(config, continuous_node(node, codebook.shape[1], config.adapt.hidden), tokenizer, facts)
        ours, theirs = (
            {name: shape for name, shape in shapes_of(model.state_dict()).items() if not name.startswith(TABLE)}
            for model in (self.generator, reference)
        )
        check_shapes(ours, theirs, type(self.generator).__name__, where="adapt.reference")
        inherit(self.generator, reference, codebook, config.adapt.fit_steps)
