"""The cost of a step, read off tensors without values, against torch's own counter and against what real tensors hold."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tokar.conf.compose import compose
from tokar.train.clock import Clock
from tokar.train.cost import Twin, counted_flops
from tokar.train.generator import GeneratorStage
from tokar.train.network import Trainable
from tokar.train.profiler import allocated_peak
from tokar.train.stages import fill
from tokar.train.tokenizer import TokenizerStage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CLOCK = Clock(10, 0, 100, 4, 40)
CODES = {name: ((4, *more), torch.int64) for name, more in (("codes", (64,)), ("label", ()), ("index", ()), ("epoch", ()))}


class Plain:
    """A network of a stage without any strategy."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss):
        loss.backward()


def toy(width: int, frozen: int = 0):
    """A stage of linear layers whose cost can be told by hand; `frozen` rows more of a teacher that the loss looks at."""
    network, teacher = nn.Linear(8, width, bias=False), nn.Linear(width, frozen or 1, bias=False).requires_grad_(False)

    def step(self, batch, clock, networks):
        out = networks["net"](batch["x"])
        loss = (self.frozen[0](out) if frozen else out).square().mean()
        networks["net"].backward(loss)
        return {"loss": loss}

    stage = type("Toy", (), {"step": step})()
    stage.trainables = {"net": Trainable(network, {}, None)}
    stage.frozen = [teacher] if frozen else []
    return stage


def test_flops_by_hand():
    cost = Twin(toy(16), "fp32").cost({"x": ((4, 8), torch.float32)}, CLOCK)
    assert (cost.flops, cost.frozen_flops) == (2 * (2 * 4 * 8 * 16), 0)  # forward, and the weight's gradient


def test_a_frozen_networks_flops_stand_apart():
    cost = Twin(toy(16, frozen=32), "fp32").cost({"x": ((4, 8), torch.float32)}, CLOCK)
    assert cost.flops == 2 * (2 * 4 * 8 * 16)
    assert cost.frozen_flops == 2 * (2 * 4 * 16 * 32)  # forward, and the gradient that passes through it


def test_micro_batches_add_up():
    twin = Twin(toy(16), "fp32")
    assert twin.cost({"x": ((4, 8), torch.float32)}, CLOCK, accumulate=3).flops == 3 * 2 * (2 * 4 * 8 * 16)


def test_memory_by_hand():
    cost = Twin(toy(1024), "fp32").cost({"x": ((4, 8), torch.float32)}, CLOCK)
    assert max(finished for _, finished in cost.moments) == 8 * 1024
    before = max(held for held, finished in cost.moments if not finished)
    out, square, gradient = 4 * 4 * 1024, 4 * 4 * 1024, 4 * 8 * 1024
    assert out + square <= before <= 2 * (out + square) + gradient + 4096
    last = next(held for held, finished in cost.moments if finished)
    assert cost.peak(lambda count: 0) == before
    assert cost.peak(lambda count: 100 * count) == last + 100 * 8 * 1024


def generator_stage(*more: str) -> GeneratorStage:
    sizes = ["generator=llamagen_small", "generator.dim=64", "generator.layers=3", "generator.heads=2", "codes.path=x", *more]
    config = compose("generator", ["loop.duration=10", *sizes]).typed
    node = fill(config.generator, {"num_classes": 10, "vocab_size": 128, "grid": [8, 8]})
    torch.manual_seed(0)
    return GeneratorStage(config, node, None, {})


def adversarial_stage() -> TokenizerStage:
    small = [
        "tokenizer.encoder.width=32",
        "tokenizer.encoder.multipliers=[1,1]",
        "tokenizer.decoder.blocks=1",
        "losses.r1_weight=1",
    ]
    config = compose("tokenizer", ["experiment=digits_vqgan", "losses.adversarial_start=0", "losses.r1_every=5", *small]).typed
    torch.manual_seed(0)
    return TokenizerStage(config)


@pytest.mark.parametrize("make", [generator_stage, adversarial_stage])
def test_flops_are_those_of_torchs_counter_on_a_real_step(make):
    stage = make()
    side = getattr(getattr(stage, "tokenizer", None), "layout", SimpleNamespace(image_size=(0,))).image_size[0]
    shapes = {"image": ((2, side, side, 3), torch.uint8)} if side else CODES
    cost = Twin(stage, "fp32").cost(shapes, CLOCK)
    batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    networks = {name: Plain(item.module) for name, item in stage.trainables.items()}
    # the matrix form of attention: torch's counter does not know the fused one of a CPU
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        _untracked(FlopCounterMode(display=False)) as counter,
    ):
        stage.step(batch, CLOCK, networks)
    assert cost.flops == counter.get_total_flops() > 0


def _untracked(counter):
    """torch's counter without its names of modules, which cannot live with `torch.autograd.grad`."""
    counter.mod_tracker = type("None", (), {"parents": {"Global"}, "__enter__": lambda s: s, "__exit__": lambda s, *a: None})()
    return counter


def test_the_stage_stays_as_it_is():
    stage = generator_stage()
    before = copy.deepcopy(stage.generator.state_dict())
    Twin(stage, "bf16").cost(CODES, CLOCK)
    for name, value in stage.generator.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(type(parameter.data) is torch.Tensor and parameter.grad is None for parameter in stage.generator.parameters())


def test_a_stage_on_the_meta_device_costs_the_same():
    with torch.device("meta"):
        empty = generator_stage()
    assert Twin(empty, "fp32").cost(CODES, CLOCK) == Twin(generator_stage(), "fp32").cost(CODES, CLOCK)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_a_step_is_what_real_tensors_hold(precision):
    stage = generator_stage("generator.dim=256")
    dtype = torch.bfloat16 if precision == "bf16" else None
    expected = Twin(stage, precision).cost(CODES, CLOCK).peak(lambda count: 4 * count)

    class Cast(Plain):
        def __call__(self, *inputs):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                return self.module(*inputs)

    batch = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in CODES.items()}
    networks = {name: Cast(item.module) for name, item in stage.trainables.items()}
    _, held = allocated_peak(lambda: stage.step(batch, CLOCK, networks))
    assert held == pytest.approx(expected, rel=0.05)


def test_flops_are_counted_alike_with_and_without_inference_mode():
    linear, x, heads = nn.Linear(8, 16), torch.randn(4, 8), torch.randn(1, 2, 4, 8)

    def forward():
        linear(x)
        nn.functional.scaled_dot_product_attention(heads, heads, heads)

    expected = 2 * 4 * 8 * 16 + 2 * 2 * (2 * 4 * 4 * 8)
    assert counted_flops(forward) == expected
    assert counted_flops(torch.inference_mode()(forward)) == expected
    assert counted_flops(lambda: linear(x).sum().backward()) == 2 * (2 * 4 * 8 * 16)  # the input asks for no gradient
