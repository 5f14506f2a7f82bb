import pytest
import torch
from tokar.models.tokenizers.conv import ConvDecoder, ConvEncoder
from tokar.models.tokenizers.multiscale import MultiScaleVQ
from tokar.models.tokenizers.multiscale_quantizer import MultiScaleQuantizer
from tokar.models.tokenizers.quantizers.vq import VectorQuantizer
from tokar.models.tokenizers.semantic import ProjectionHead
from tokar.models.tokenizers.vqgan import VQGAN

CNN = {"width": 8, "multipliers": (1, 1), "blocks": 1, "z_channels": 8, "norm_groups": 4}
HALVES = {"encoder": ConvEncoder(**CNN), "decoder": ConvDecoder(**CNN)}


def make(kind: str, head: ProjectionHead | None):
    if kind == "vqgan":
        return VQGAN(**HALVES, quantizer=VectorQuantizer(16, 4), image_size=8, semantic=head)
    return MultiScaleVQ(**HALVES, quantizer=MultiScaleQuantizer(16, 4, (1, 2, 4)), image_size=8, semantic=head)


@pytest.mark.parametrize("kind", ["vqgan", "multiscale"])
def test_tokenizers_without_transformers_project_their_quantized_latent(kind):
    torch.manual_seed(0)
    head = ProjectionHead(4, dim=5)
    tokenizer, image = make(kind, head), torch.rand(2, 3, 8, 8)
    output = tokenizer(image)
    assert output.semantic is not None
    torch.testing.assert_close(output.semantic, head(output.z_quantized.flatten(2).transpose(1, 2)))
    assert output.semantic.shape == (2, 16, 5)
    output.semantic.sum().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert make(kind, None)(image).semantic is None


@pytest.mark.parametrize("kind", ["vqgan", "multiscale"])
def test_a_head_of_another_width_is_refused(kind):
    with pytest.raises(ValueError, match=r"semantic\.width is 6, quantizer\.dim 4"):
        make(kind, ProjectionHead(6))
