import torch
import torch.nn.functional as F
from tokar.models.tokenizers.maskgit import MaskGITBlock, MaskGITDecoder


def test_the_shortcut_reads_the_blocks_result():
    torch.manual_seed(0)
    block, x = MaskGITBlock(4, 8, 2), torch.randn(2, 4, 5, 5)
    inner = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    torch.testing.assert_close(block(x), inner + F.conv2d(inner, block.shortcut.weight))
    assert not any(name.startswith("conv") and name.endswith("bias") for name, _ in block.named_parameters())
    same = MaskGITBlock(4, 4, 2)
    assert same.shortcut is None
    torch.nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


def test_levels_run_from_the_coarsest_and_double_the_map():
    decoder = MaskGITDecoder(8, (1, 2, 4), blocks=2, z_channels=5, norm_groups=4)
    assert decoder.stride == 4
    assert decoder(torch.randn(1, 5, 3, 2)).shape == (1, 3, 12, 8)
    assert [level[0].conv1.in_channels for level in decoder.levels] == [32, 32, 16]
    assert [level[-1].conv2.out_channels for level in decoder.levels] == [32, 16, 8]


def test_published_size():
    with torch.device("meta"):
        decoder = MaskGITDecoder()
    assert round(sum(parameter.numel() for parameter in decoder.parameters()) / 1e6, 1) == 30.5
