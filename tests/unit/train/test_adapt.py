"""A next-token teacher that learns to read vectors: where it begins, what its diffusion model takes over, who is refused."""

import pytest
import torch
from tiny_tokenizers import tiny
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.models.build import build, save_model
from tokar.models.distill.codebook import codebook_of
from tokar.models.open import OpenedGenerator
from tokar.train.adapt import AdaptStage
from tokar.train.dd2 import DiffusionStage

SIZES = {"vocab_size": 16, "num_classes": 3, "grid": [4, 4], "dim": 16, "heads": 2, "layers": 1, "multiple_of": 16}
FACTS = {"tokenizer": {"hash": "of these codes"}, "classes": ["a", "b", "c"]}


@pytest.fixture
def adapt(tmp_path):
    """`adapt(facts)` is the stage with a trained generator of `SIZES` as its reference."""
    node = {"_target_": "tokar.models.generators.next_token.NextToken", **SIZES, "token_dropout": 0.3}
    reference = build(node)
    torch.nn.init.normal_(reference.head.weight)
    save_model(tmp_path / "reference", node, reference.state_dict(), FACTS)
    tokenizer = tiny("vqgan")

    def make(node=node, facts=FACTS, place="reference", tokenizer=tokenizer):
        words = ["experiment=digits_llamagen", "codes.path=x", f"+adapt.reference={tmp_path / place}", "+adapt.hidden=64"]
        return AdaptStage(compose("generator", words).typed, node, tokenizer, facts)

    make.reference, make.tokenizer = reference, tokenizer
    return make


def test_it_begins_as_the_reference(adapt, tmp_path):
    """Its answers to codes are nearly the reference's, to vectors of codes its own; its diffusion model reads as it does."""
    stage = adapt()
    model, reference = stage.generator.eval(), adapt.reference.eval()
    codes, labels = torch.randint(16, (2, 16)), torch.tensor([0, 2])
    with torch.no_grad():
        answer, expected = model.logits(codes, labels), reference.logits(codes, labels)
        assert (answer - expected).norm() < 0.1 * expected.norm()
        vectors = codebook_of(adapt.tokenizer)[codes]
        assert torch.equal(model.features(vectors, labels), model.features(codes, labels))
    node = stage.trainables["generator"].node
    opened = OpenedGenerator(model, adapt.tokenizer, FACTS, node)
    config = compose("diffusion", ["experiment=diffusion_digits", "model=x", "pairs=null"]).typed
    backbone = DiffusionStage(config, opened).model.backbone
    assert backbone.token_dropout == 0
    with torch.no_grad():
        assert torch.equal(backbone.eval().features(vectors, labels), model.features(vectors, labels))
    save_model(tmp_path / "adapted", node, model.state_dict(), FACTS)
    with pytest.raises(UserError, match="has no table of codes; take a next-token generator"):
        adapt(place="adapted")


def test_who_is_refused(adapt):
    with pytest.raises(UserError, match="speaks of another tokenizer than the codes"):
        adapt(facts={**FACTS, "tokenizer": {"hash": "of others"}})
    with pytest.raises(UserError, match=r"adapt\.reference"):
        adapt(node={"_target_": "tokar.models.generators.next_token.NextToken", **SIZES, "dim": 32})
    with pytest.raises(UserError, match="vectors to be read are the tokenizer's"):
        adapt(tokenizer=None)
    with pytest.raises(UserError, match="another fine-tuning than contrast"):
        compose(
            "generator", ["experiment=digits_llamagen", "+adapt.reference=x", "+contrast.reference=x", "+contrast.weight=1"]
        )
