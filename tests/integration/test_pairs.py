"""Pairs of a teacher: killed and resumed, by two ranks, refused when they do not fit."""

import json
import math
import random

import numpy as np
import pytest
import tokar
import torch
from PIL import Image
from tokar.data.pairs import HELD_OUT, PairDataset, pair_noise
from tokar.errors import UserError
from tokar.evaluate.protocol import Result
from tokar.models.build import save_model, weights_hash
from tokar.models.classifier import Classifier
from tokar.models.distill.codebook import codebook_of, nearest
from tokar.models.distill.dd1 import generate
from tokar.models.distill.flow_map import TokenMap
from tokar.models.distill.trajectory import follow
from tokar.models.open import open_distilled, open_generator

TOKENIZER = [
    "train", "tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=32",
    "discriminator=null", "data.image_size=16", "loop.duration=2", "loop.batch_size=8", "loop.eval_samples=8",
    "strategy.accelerator=cpu", "strategy.threads=1", "paths.runs=.", "name=tokenizer",
]  # fmt: skip
GENERATOR = [
    "train", "generator", "generator=llamagen_small", "generator.dim=32", "generator.layers=2", "generator.heads=2",
    "codes.tokenizer=tokenizer", "data.image_size=16", "loop.duration=2", "loop.batch_size=8", "loop.eval_samples=8",
    "strategy.accelerator=cpu", "strategy.threads=1", "paths.runs=.", "name=teacher",
]  # fmt: skip
PAIRS = [
    "distill", "pairs", "teacher", "count=90", "val_count=10", "shard_size=16", "batch_size=5", "solver_steps=10",
    "sampling.guidance=2", "sampling.top_k=20", "strategy.accelerator=cpu", "strategy.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(start, digits, tmp_path_factory):
    """A tokenizer, a teacher and its pairs, made in one go."""
    place = tmp_path_factory.mktemp("pairs")
    straight = [*PAIRS, "out=straight"]
    for arguments in ([*TOKENIZER, f"data.path={digits}"],
                      [*GENERATOR, f"data.path={digits}"], straight):  # fmt: skip
        command = start(place, *arguments)
        assert command.wait() == 0, command.log.read_text()
    (place / "log").write_text(command.log.read_text())
    return place


def files(place):
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_they_are_the_ends_of_trajectories(folder):
    """A pair made anew in another batch is the same, and cost and size are told."""
    said = (folder / "log").read_text()
    assert "straight/train: 90 pairs, " in said
    assert "a second on each of 1 ranks, 128 network evaluations each, " in said
    opened = open_generator(folder / "teacher", tokenizer=folder / "tokenizer")
    pairs = PairDataset(
        folder / "straight/train", opened.tokenizer.layout.to_dict(), weights_hash(opened.tokenizer),
        teacher=weights_hash(opened.generator),
        sampling={"guidance": 2.0, "temperature": 1.0, "top_k": 20, "top_p": 1.0},
    )  # fmt: skip
    assert len(pairs) == 90
    rows = np.array([3, 16, 40])
    batch = pairs.fetch(rows, rows * 0, 0)
    assert batch["label"].tolist() == [3, 6, 0]
    token_map = TokenMap(codebook_of(opened.tokenizer), steps=10)
    noise, labels = torch.from_numpy(batch["noise"]), torch.from_numpy(batch["label"])
    assert np.array_equal(follow(opened.generator, labels, noise, token_map, guidance=2.0, top_k=20), batch["codes"])
    held_out = PairDataset(folder / "straight/val")
    assert np.array_equal(held_out.fetch(rows[:1], rows[:1], 0)["noise"], pair_noise(0, [HELD_OUT + 3], held_out.layout))
    assert not np.array_equal(held_out.read(rows[:1], rows[:1] * 0), pairs.read(rows[:1], rows[:1] * 0))


def test_killed_pairs_are_resumed_to_the_same_bytes(folder, start):
    moments, out = random.Random(0), folder / "killed"
    kills = 0
    for shards in (1, 3):
        command = start(folder, *PAIRS, "out=killed")
        kills += command.kill_when(lambda least=shards: len(list(out.glob("train/shard-*.json"))) >= least, moments)
    assert kills
    assert start(folder, *PAIRS, "out=killed").wait() == 0
    assert files(out) == files(folder / "straight")


@pytest.mark.slow
def test_two_ranks_write_what_one_does(folder, start_ranks):
    ranks = start_ranks(folder, 2, *PAIRS, "out=ranks", "strategy=ddp", "strategy.devices=2")
    assert ranks.wait() == [0, 0], ranks.output
    assert "on each of 2 ranks" in ranks.output
    assert files(folder / "ranks") == files(folder / "straight")


def test_what_does_not_fit_is_refused(folder, start, monkeypatch):
    """Another guidance into the same folder in one line; another teacher, guidance or noise when they are read."""
    command = start(folder, *PAIRS, "out=straight", "sampling.guidance=3")
    assert command.wait() == 2
    line = command.log.read_text().strip()
    assert line.count("\n") == 0
    assert "made otherwise (protocol.pairs.sampling.guidance: 2.0 there, 3.0 here)" in line
    with pytest.raises(UserError, match="pairs are of another teacher"):
        PairDataset(folder / "straight/train", teacher="0" * 64)
    with pytest.raises(UserError, match=r"drawn otherwise \(guidance: 2.0 there, 1.5 here\)"):
        PairDataset(folder / "straight/train", sampling={"guidance": 1.5, "temperature": 1.0, "top_k": 20, "top_p": 1.0})
    monkeypatch.setattr("tokar.data.pairs.gaussian", lambda seed, ids, shape: np.zeros((len(ids), *shape), np.float32))
    with pytest.raises(UserError, match="comes out otherwise on this machine"):
        PairDataset(folder / "straight/train")


STUDENT = [
    "train", "distill", "model=teacher", "pairs=straight", "student.timesteps=[0,5]", "student.split=9", "data.image_size=16",
    "loop.duration=6", "loop.batch_size=8", "loop.log_every=1", "loop.eval_every=3", "loop.eval_samples=10",
    "loop.sample_every=6", "loop.save_every=2", "loop.keep=9", "sampling.guidance=2", "sampling.top_k=20",
    "strategy.accelerator=cpu", "strategy.threads=1", "paths.runs=.",
]  # fmt: skip


def test_a_student_is_trained_killed_and_resumed(folder, start):
    """It begins with the teacher's weights; the run that was killed ends with the bytes of the one that was not."""
    assert start(folder, *STUDENT, "name=whole").wait() == 0
    metrics = [json.loads(line) for line in (folder / "whole/metrics.jsonl").read_text().splitlines()]
    last = [line for line in metrics if "val/sequence_accuracy" in line][-1]
    assert last["val/tv_bound"] == pytest.approx(1 - last["val/sequence_accuracy"])
    assert {"val/cross_entropy", "val/vector", "val/accuracy"} <= set(last)
    pictures = {path.name.split("-", 2)[2] for path in (folder / "whole/samples").glob("*.png")}
    assert pictures == {"one_step.png", "2_steps.png", "teacher.png"}
    killed, moments = folder / "cut", random.Random(1)
    command = start(folder, *STUDENT, "name=cut")
    assert command.kill_when(lambda: (killed / "checkpoints/step-00000002").exists(), moments)
    assert start(folder, *STUDENT, "name=cut").wait() == 0
    for kept in ("metrics.jsonl", "checkpoints/step-00000006/student/model.safetensors",
                 "checkpoints/step-00000006/student/ema.safetensors"):  # fmt: skip
        assert (killed / kept).read_bytes() == (folder / "whole" / kept).read_bytes(), kept


def test_a_student_is_sampled(folder, start):
    """After the run above: the pictures' codes follow from seed and number; a step that it never learned is refused."""
    ask = ["sample", "whole", "count=6", "save=[grid,codes]", "strategy.accelerator=cpu", "batch_size=4"]
    command = start(folder, *ask, "student.steps=[0]", "student.split=16", "out=drawn")
    assert command.wait() == 0, command.log.read_text()
    assert "6 images at" in command.log.read_text()
    assert "1 network calls (1 evaluations) each" in command.log.read_text()
    opened = open_distilled(folder / "whole", tokenizer=folder / "tokenizer")
    codebook, noise = codebook_of(opened.tokenizer), pair_noise(0, range(6), opened.tokenizer.layout.to_dict())
    vectors = generate(opened.model, codebook, torch.arange(6), torch.from_numpy(noise), steps=[0], split=16)
    assert np.array_equal(np.load(folder / "drawn/codes.npy"), nearest(vectors, codebook))
    loaded = tokar.load(folder / "whole", tokenizer=folder / "tokenizer")
    assert np.array_equal(loaded.sample_codes(range(6), steps=[0], split=16), np.load(folder / "drawn/codes.npy"))
    assert loaded.sample([4, 2]).shape == (2, 16, 16, 3)
    command = start(folder, *ask, "student.steps=[0,3]")
    assert command.wait() == 2
    assert "a step from 3 finished units, which this student was not trained for" in command.log.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["sampling.guidance=1.5"], "the pairs were drawn otherwise (guidance: 2.0 there, 1.5 here)"),
        (["pairs=null", "model=tokenizer"], "holds a VQGAN, not a generator"),
        (["student.timesteps=[0,64]"], "timesteps [0, 64] of 64 units; give 0 and rising numbers below 64"),
    ],
)
def test_a_student_that_cannot_be_is_refused(folder, start, changes, message):
    command = start(folder, *STUDENT, *changes, "name=refused")
    assert command.wait() == 2
    assert message in command.log.read_text()
    assert command.log.read_text().count("\n") == 1
    assert not (folder / "refused").exists()


TAUGHT = [
    "model=teacher", "pairs=straight", "data.image_size=16", "loop.batch_size=8", "loop.log_every=1", "loop.eval_samples=8",
    "sampling.guidance=2", "sampling.top_k=20", "draws=2", "strategy.accelerator=cpu", "strategy.threads=1", "paths.runs=.",
]  # fmt: skip


def test_both_networks_of_dd2_are_resumed(folder, start):
    """The generator moves at every other step; what was killed ends with the same bytes of both networks and the average."""
    diffusion = ["train", "diffusion", *TAUGHT, "width=32", "depth=1", "hidden=32", "loop.duration=2", "name=diffusion"]
    command = start(folder, *diffusion)
    assert command.wait() == 0, command.log.read_text()
    assert "val/teacher_nll" in (folder / "diffusion/metrics.jsonl").read_text()
    ask = ["train", "dd2", *TAUGHT, "diffusion=diffusion", "fake_updates=2", "generator_rests=1", "pair_weight=0.5",
           "loop.duration=6", "loop.save_every=2", "loop.keep=9"]  # fmt: skip
    command = start(folder, *ask, "name=dd2")
    assert command.wait() == 0, command.log.read_text()
    metrics = [json.loads(line) for line in (folder / "dd2/metrics.jsonl").read_text().splitlines()]
    moved = [line["step"] for line in metrics if "train/generator_loss" in line]
    assert moved == [2, 4, 6]
    assert {"val/code_distance", "val/teacher_nll", "val/codes/usage"} <= {key for line in metrics for key in line}
    cut = folder / "dd2cut"
    command = start(folder, *ask, "name=dd2cut")
    assert command.kill_when(lambda: (cut / "checkpoints/step-00000002").exists(), random.Random(2))
    assert start(folder, *ask, "name=dd2cut").wait() == 0
    for kept in ("metrics.jsonl", *(f"checkpoints/step-00000006/{name}.safetensors" for name in
                                    ("generator/model", "generator/ema", "fake/model"))):  # fmt: skip
        assert (cut / kept).read_bytes() == (folder / "dd2" / kept).read_bytes(), kept


@pytest.mark.parametrize(
    ("run", "options", "cost"),
    [
        ("whole", ["student.teacher=teacher", "student.keep=3"], (1 + 2 + 1, 1 + 4 + 1, 4)),
        ("dd2", ["student.teacher=teacher", "student.redraw=2"], (1 + 2, 1 + 4, 3)),
        ("diffusion", ["student.euler='1,3'"], (64, 64, 64 + 32 + 2 * 32)),
    ],
)
def test_what_was_distilled_is_measured_and_drawn(folder, start, digits, run, options, cost):
    """After the runs above; a teacher helps with the guidance that is asked for, in the evaluation with that of the run."""
    torch.manual_seed(0)
    judge = Classifier(16, 10, width=8)
    save_model(folder / "judge", {"_target_": "tokar.models.classifier.Classifier", "image_size": 16, "num_classes": 10,
                                  "width": 8}, judge.state_dict())  # fmt: skip
    ask = [*options, "count=10", "strategy.accelerator=cpu", "strategy.threads=1", "batch_size=4"]
    command = start(folder, "evaluate", run, *ask, f"data.path={digits}", "data=digits", "data.image_size=16", "split=val",
                    "features.path=judge", f"out=measured-{run}")  # fmt: skip
    assert command.wait() == 0, command.log.read_text()
    (path,) = (folder / f"measured-{run}").glob("*.json")
    numbers = json.loads(path.read_text())["numbers"]
    assert {"fd_classifier", "class_accuracy"} <= set(numbers)
    assert tuple(numbers[name] for name in ("network_calls", "evaluations", "depth")) == cost
    command = start(folder, "sample", run, *ask, "save=[codes]", "sampling.guidance=2", f"out=drawn-{run}")
    assert command.wait() == 0, command.log.read_text()
    assert f"{cost[0]} network calls ({cost[1]} evaluations) each" in command.log.read_text()
    command = start(folder, "sample", run, "student.split=3", "student.redraw=2", "student.keep=1", "out=refused")
    assert command.wait() == 2
    assert "knows no such thing" in command.log.read_text()


def test_a_table_of_teacher_students_and_what_needs_no_training(folder, start):
    """After the runs above: every way with its cost, the teacher's guidance counted twice; a student of another is refused."""
    node = {"_target_": "tokar.models.classifier.Classifier", "image_size": 16, "num_classes": 10, "width": 8}
    save_model(folder / "judge", node, Classifier(16, 10, width=8).state_dict())
    ask = ["distill", "compare", "teacher", "student=whole", "dd2=dd2", "features.path=judge", "count=40", "turns=5",
           "sampling.guidance=2", "sampling.top_k=20", "strategy.accelerator=cpu", "strategy.threads=1",
           "out=table"]  # fmt: skip
    command = start(folder, *ask)
    assert command.wait() == 0, command.log.read_text()
    results = [Result.load(path) for path in (folder / "table").glob("*.json")]
    rows = {str(result.subject["way"]): result.numbers for result in results}
    cost = {way: (numbers["evaluations"], numbers["depth"]) for way, numbers in rows.items()}
    assert cost == {
        "teacher": (128, 64), "independent": (0, 0), "teacher, last 32 skipped": (64, 32), "DD1, 1 step": (1, 1),
        "DD1, 2 steps": (2, 2), "DD1, teacher from 2 to 5": (1 + 2 * 3 + 1, 1 + 3 + 1), "DD2, 1 step": (1, 1),
        "DD2, 1 step, not snapped": (1, 1),
    }  # fmt: skip
    assert len({result.protocol_id for result in results}) == 1
    assert rows["teacher"]["times_as_fast"] == 1
    for numbers in rows.values():
        assert {"fd_classifier", "class_accuracy", "teacher_nll", "distinct_codes", "pair_information_error", "ms_1"} <= set(
            numbers
        )
        assert all(math.isfinite(value) for value in numbers.values())
        assert 1 <= numbers["distinct_codes"] <= 32
    assert all(way in command.log.read_text() for way in rows)
    with Image.open(next((folder / "table").glob("*_speed_and_quality.png"))) as picture:
        assert min(picture.size) > 300
    command = start(folder, *ask, "ema=false")
    assert command.wait() == 2
    assert "was distilled from another teacher" in command.log.read_text()
