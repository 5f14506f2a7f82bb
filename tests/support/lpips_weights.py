"""Random LPIPS weights in the published layout: VGG16's `features.N.*` and the linear heads."""

import torch
from torch import Tensor

CONVOLUTIONS = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256), 17: (512, 256),
    19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
STAGE_ENDS = (2, 7, 14, 21, 28)


def random_lpips() -> dict[str, Tensor]:
    """Tensors by published name."""
    torch.manual_seed(0)
    state = {}
    for index, (wide, narrow) in CONVOLUTIONS.items():
        state[f"features.{index}.weight"] = torch.randn(wide, narrow, 3, 3) * (2 / (9 * narrow)) ** 0.5
        state[f"features.{index}.bias"] = torch.randn(wide) * 0.1
    for stage, index in enumerate(STAGE_ENDS):
        state[f"lin{stage}.model.1.weight"] = torch.rand(1, CONVOLUTIONS[index][0], 1, 1)
    return state
