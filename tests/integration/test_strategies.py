"""Every strategy trains like one process with the same global batch, and goes on from what any other one saved.

Real ranks over gloo. The tokenizer has its discriminator, the adaptive weight, R1 and batch norm; the generator accumulates.
Tolerances are relative, of every number in metrics.jsonl: sums over ranks are made in another order, and six steps of Adam
amplify it.
"""

import json
import random

import pytest
import torch
from tokar.models.weights import WeightFiles

STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp"],
    "zero1": ["strategy=zero1"],
    "zero2": ["strategy=zero2"],
    "zero3": ["strategy=zero3", "strategy.persistent=0"],
}
TOKENIZER = [
    "train", "tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=32",
    "tokenizer.quantizer.restart_after=3", "discriminator.width=8", "discriminator.layers=2", "losses.adversarial_start=1",
    "losses.adaptive=true", "losses.r1_weight=0.05", "losses.r1_every=2", "losses.lecam_weight=0.1", "optim.clip=0.1",
]  # fmt: skip
GENERATOR = [
    "train", "generator", "generator.dim=32", "generator.layers=2", "generator.heads=2", "generator.multiple_of=32",
    "generator.token_dropout=0", "generator.resid_dropout=0", "generator.ffn_dropout=0", "class_dropout=0.3", "optim.lr=1e-3",
    "optim.clip=0.5", "loop.accumulate=2", "loop.sample_every=3",
]  # fmt: skip
FP32, HALF = 5e-4, 5e-2


def spine(digits, *more):
    return [
        f"data.path={digits}", "data.image_size=16", "loop.duration=6", "loop.batch_size=12", "loop.log_every=1",
        "loop.eval_samples=24", "loop.save_every=3", "loop.keep=9", "schedule=cosine", "strategy.threads=1",
        "strategy.accelerator=cpu", "paths.runs=.", "name=run", *more,
    ]  # fmt: skip


def metrics(run):
    """Numbers of each step."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], {}).update(record)
    return found


def worst(alone, shared):
    """Largest relative difference of the steps that both have, and where it is."""
    pairs = [
        (abs(alone[step][name] - value) / max(abs(alone[step][name]), 1e-2), name, step)
        for step, values in shared.items()
        for name, value in values.items()
    ]
    return max(pairs)


class Runs:
    """Runs of one stage under each strategy, trained when they are first asked for."""

    def __init__(self, folder, start_ranks, arguments):
        self.folder, self.start_ranks, self.arguments = folder, start_ranks, arguments

    def run(self, name, world, *more):
        place = self.folder / name
        if not place.exists():
            place.mkdir()
            ranks = self.start_ranks(place, world, *self.arguments, *more, f"strategy.devices={world}")
            assert ranks.wait() == [0] * world, ranks.output
        return place / "run"

    def under(self, strategy):
        return self.run("single", 1) if strategy == "single" else self.run(strategy, 2, *STRATEGIES[strategy])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, start_ranks, digits):
    return Runs(tmp_path_factory.mktemp("tokenizers"), start_ranks, [*TOKENIZER, *spine(digits)])


@pytest.fixture(scope="module")
def generators(tmp_path_factory, start_ranks, digits, tokenizers):
    arguments = [*GENERATOR, f"codes.tokenizer={tokenizers.under('single')}", *spine(digits)]
    return Runs(tmp_path_factory.mktemp("generators"), start_ranks, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_like_one_process(tokenizers, generators, strategy):
    for runs in (tokenizers, generators):
        alone, shared = runs.under("single"), runs.under(strategy)
        numbers = metrics(shared)
        assert list(numbers) == list(metrics(alone))
        assert worst(metrics(alone), numbers)[0] < FP32, worst(metrics(alone), numbers)
        for stem in ("model", "ema", "optim"):
            for network in sorted(path.parent.name for path in alone.glob("checkpoints/step-00000006/*/config.json")):
                places = [run / "checkpoints/step-00000006" / network for run in (alone, shared)]
                if WeightFiles.exist(places[0], stem):
                    one, other = (WeightFiles(place, stem).all() for place in places)
                    assert one.keys() == other.keys()
                    # Adam turns a rounding difference in a gradient of nearly zero into a whole step of the rate
                    assert max((one[name].float() - other[name].float()).abs().max() for name in one) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "resumed", "world"),
    [
        ("zero2", "single", 1), ("zero3", "fsdp", 3), ("fsdp", "zero1", 3), ("ddp", "zero3", 3), ("single", "zero2", 3),
        ("zero1", "ddp", 3),
    ],
)  # fmt: skip
def test_another_strategy_and_number_of_ranks_go_on_from_a_checkpoint(tokenizers, saved, resumed, world):
    source = tokenizers.under(saved) / "checkpoints" / "step-00000003"
    more = STRATEGIES.get(resumed, [])
    run = tokenizers.run(f"{saved}-{resumed}-{world}", world, *more, f"resume_from={source}")
    straight, numbers = metrics(tokenizers.under("single")), metrics(run)
    assert list(numbers) == [4, 5, 6]
    assert worst(straight, numbers)[0] < FP32, worst(straight, numbers)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_the_same_ranks_go_on_bitwise(tokenizers, strategy):
    straight = tokenizers.under(strategy)
    source = straight / "checkpoints" / "step-00000003"
    again = tokenizers.run(f"{strategy}-again", 2, *STRATEGIES[strategy], f"resume_from={source}")
    numbers = metrics(again)
    assert {step: values for step, values in metrics(straight).items() if step > 3} == numbers
    last = "checkpoints/step-00000006"
    for path in sorted((straight / last).rglob("*.safetensors")):
        assert path.read_bytes() == (again / last / path.relative_to(straight / last)).read_bytes(), path.name


@pytest.mark.slow
def test_ranks_killed_while_a_checkpoint_is_being_written_lose_nothing_but_the_steps_since_the_last(tokenizers, tmp_path):
    straight, run, moments = tokenizers.under("zero2"), tmp_path / "run", random.Random(0)
    arguments = [*tokenizers.arguments, *STRATEGIES["zero2"], "strategy.devices=2", "loop.save_every=1"]
    for goal in (1, 3, 4):
        ranks = tokenizers.start_ranks(tmp_path, 2, *arguments)
        hit = ranks.commands[0].kill_when(
            lambda goal=goal: any((run / "checkpoints").glob(f".step-{goal:08d}")), moments, within=0.02
        )
        ranks.kill()
        assert hit, ranks.output
        done = sorted(path.parent.name for path in run.glob("checkpoints/step-*/COMPLETE"))
        assert f"step-{goal - 1:08d}" in done or goal == 1
    ranks = tokenizers.start_ranks(tmp_path, 2, *arguments)
    assert ranks.wait() == [0, 0], ranks.output
    assert metrics(run) == metrics(straight)
    last = "checkpoints/step-00000006"
    for path in sorted((straight / last).rglob("*.safetensors")):
        assert path.read_bytes() == (run / last / path.relative_to(straight / last)).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_bf16_stays_near_fp32(generators, strategy):
    run = generators.run(f"{strategy}-bf16", 2, *STRATEGIES[strategy], "strategy.precision=bf16")
    assert worst(metrics(generators.under("single")), metrics(run))[0] < HALF


@pytest.mark.slow
def test_consolidated_weights_are_the_parts_put_together(tokenizers, tmp_path):
    from tokar.models.build import export_model, load_model

    source = tokenizers.under("zero3") / "checkpoints" / "step-00000006"
    export_model(source, tmp_path / "out", ema=False)
    model = load_model(tmp_path / "out")
    parts = WeightFiles(source / "tokenizer", "model")
    assert len(parts.paths) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, parts.read(name)), name


DOUBTFUL = {
    "strategy=zero3 strategy.precision=fp16 strategy.compile=true": "needs a GPU",
    "strategy=zero2 strategy.offload=optimizer strategy.accelerator=auto": "strategy.offload: needs a GPU",
    "strategy=fsdp strategy.channels_last=true": "flat shards of fsdp have no memory format",
    "strategy=ddp strategy.offload=optimizer": "strategy.offload: ddp cannot",
    "strategy.devices=2": "single uses one device, not 2",
    "strategy=ddp strategy.backend=nccl": "nccl joins GPUs only",
    "strategy.attention=flash": "flash computes in half precision",
    "strategy.attention=flash strategy.precision=bf16": "flash cannot be used: it needs a GPU",
    "strategy.attention=flex": "flex cannot train on a CPU",
    "strategy=zero2 strategy.compile=true strategy.recompute=selective": "selective does not see",
    "strategy=ddp strategy.devices=13 loop.accumulate=1": "12 samples cannot fill 13 micro-batches",
    "strategy=zero4": "zero4",
    "strategy=zero3 strategy.recompute=full strategy.precision=bf16": "runs",
    "strategy=fsdp strategy.recompute=selective strategy.reshard=false": "runs",
    "strategy=zero1 strategy.recompute=selective strategy.bucket_mib=1": "runs",
    "strategy=fsdp strategy.compile=true strategy.recompute=full": "runs",
    "strategy=ddp loop.accumulate=3 strategy.recompute=full optim.clip=0": "runs",
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", DOUBTFUL)
def test_a_doubtful_combination_runs_or_says_why_not_in_one_line(generators, tmp_path, settings):
    named = settings.split()
    devices = [] if "strategy.devices" in settings else ["strategy.devices=1"]
    ranks = generators.start_ranks(tmp_path, 1, *generators.arguments, "loop.duration=2", *devices, *named)
    code, said = ranks.wait()[0], ranks.output
    if DOUBTFUL[settings] == "runs":
        assert code == 0, said
    else:
        lines = [line for line in said.splitlines() if line.startswith("tokar:")]
        assert code == 2, said
        assert len(lines) == 1, said
        assert DOUBTFUL[settings] in lines[0]
        assert not (tmp_path / "run" / "checkpoints").exists()
