"""Peak arithmetic of devices: published for GPUs, measured for what the table lacks."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A GPU as its vendor describes it.

    Args:
        half: TFLOP/s of dense bf16 or fp16 products (no sparsity), summed in fp32.
        single: of fp32 products as torch makes them at precision "high" (TF32 where there is one).
        gib: memory.
        link: GB/s from one GPU to the others of its node, one direction (NVLink, else PCIe).
        source: where the numbers stand.
    """

    half: float
    single: float
    gib: float
    link: float
    source: str


DEVICES: dict[str, Device] = {
    "b200": Device(2250, 1100, 180, 900, "NVIDIA HGX B200 datasheet, for one GPU: half of the sparse figures"),
    "h200": Device(989.4, 494.7, 141, 450, "NVIDIA H200 datasheet, SXM: half of the sparse figures"),
    "h100": Device(989.4, 494.7, 80, 450, "NVIDIA H100 datasheet, SXM5: half of the sparse figures"),
    "h100 pcie": Device(756, 378, 80, 64, "NVIDIA H100 datasheet, PCIe: half of the sparse figures"),
    "a100": Device(312, 156, 80, 300, "NVIDIA A100 80GB datasheet, SXM"),
    "a100 40gb": Device(312, 156, 40, 300, "NVIDIA A100 40GB datasheet, SXM"),
    "l40s": Device(362, 183, 48, 32, "NVIDIA L40S datasheet: half of the sparse figures"),
    "l4": Device(121, 60, 24, 32, "NVIDIA L4 datasheet: half of the sparse figures"),
    "a10": Device(125, 62.5, 24, 32, "NVIDIA A10 datasheet"),
    "v100": Device(125, 15.7, 32, 150, "NVIDIA V100 datasheet, SXM2; fp16, it has no bf16 and no TF32"),
    "t4": Device(65, 8.1, 16, 16, "NVIDIA T4 datasheet; fp16, it has no bf16 and no TF32"),
}
"""By name; `link` of NVLink is half of the datasheet's figure, which adds both directions."""

SIDE, TRIES = 512, 8


def known(name: str) -> Device | None:
    """The table's row for a name as users or drivers write it, e.g. `NVIDIA A100-SXM4-40GB`; `None`: there is none."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    rows = [row for row in DEVICES if set(row.split()) <= words]
    return DEVICES[max(rows, key=len)] if rows else None


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of matrix products at best: of the table for a known GPU, else measured."""
    row = known(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if row is not None:
        return 1e12 * (row.single if precision == "fp32" else row.half)
    return measured_flops(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products of square matrices; what other processes do meanwhile lowers it."""
    side = SIDE * (8 if device.type == "cuda" else 1)
    left, right = (torch.full((side, side), 0.5, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(TRIES):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
