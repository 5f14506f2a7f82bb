"""What an evaluation leaves behind: its result with the time of the samples, nothing of a mistake, all before a full disk."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizers import tiny_node
from tokar.conf.compose import compose
from tokar.errors import UserError, of_system
from tokar.evaluate import generated
from tokar.evaluate.protocol import Result
from tokar.evaluate.run import evaluate
from tokar.models.build import build, save_model, weights_hash


@pytest.fixture
def place(tmp_path, classifier_folder, images, monkeypatch):
    """A folder of three images, and other ones to compare them with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKAR_CACHE", str(tmp_path / "cache"))
    np.savez("real.npz", images.numpy())
    os.mkdir("fake")
    for number, pixels in enumerate(images[:3].numpy()):
        Image.fromarray(pixels).save(f"fake/{number}.png")
    return tmp_path


def measure(*overrides):
    words = ["features.path=classifier", "reference=real.npz", "batch_size=1", "save_every=1", "strategy.accelerator=cpu"]
    return evaluate(compose("evaluate", ["target=fake", *words, *overrides]))


def test_too_few_images_are_refused_before_one_is_looked_at(place, monkeypatch):
    monkeypatch.setattr(generated, "read_samples", lambda *_: pytest.fail("an image was looked at"))
    named = ("protocol=classifier", "count=3")
    for more, line in (
        (("count=1",), "statistics of 1 images have no covariance"),
        ((*named, "protocol.measures=[kid]", "protocol.subset_size=4"), "subsets of 4 of 3 images"),
        ((*named, "protocol.measures=[precision_recall]"), "3 images have no 3 neighbours each"),
        (
            (*named, "protocol.measures=[kid]", "protocol.subset_size=3", "protocol.keep_reference=2"),
            "subsets of 3 of 2 images",
        ),
    ):
        with pytest.raises(UserError, match=line):
            measure(*more)
    assert not (place / "evaluation").exists()


def test_a_mistake_leaves_nothing_and_a_full_disk_what_was_done(place, monkeypatch):
    (place / "fake" / "3.png").write_text("no image")
    with pytest.raises(UserError, match=r"3\.png: no readable image"):
        measure()
    assert not (place / "evaluation").exists()
    os.remove("fake/3.png")

    def full(*_):
        error = OSError(errno.ENOSPC, "")
        raise of_system(error, "s.npz") from error

    with monkeypatch.context() as patch:
        patch.setattr(generated, "save_gaussians", full)
        with pytest.raises(UserError, match="the disk is full"):
            measure("statistics=s.npz")
    assert [*place.glob("evaluation/unfinished/*/rank-00000.pt")]
    with monkeypatch.context() as patch:
        patch.setattr(generated, "read_samples", lambda at, batches: iter(batches))  # fails at any image
        assert measure("statistics=s.npz") == 0
    assert [path.suffix for path in (place / "evaluation").iterdir()] == [".json"]


def test_drawn_samples_tell_their_time_beside_their_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    judge = {"_target_": "tokar.models.classifier.Classifier", "image_size": 32, "num_classes": 3, "width": 8}
    generator = {"_target_": "tokar.models.generators.next_token.NextToken", "vocab_size": 16, "num_classes": 3,
                 "grid": [4, 4], "dim": 32, "layers": 1, "heads": 1}  # fmt: skip
    tokenizer = build(tiny_node("vqgan"))
    layout = tokenizer.layout.to_dict()
    save_model(tmp_path / "tok", tiny_node("vqgan"), tokenizer.state_dict(), {"layout": layout})
    facts = {"layout": layout, "classes": ["a", "b", "c"], "tokenizer": {"path": "tok", "hash": weights_hash(tokenizer)}}
    save_model(tmp_path / "gen", generator, build(generator).state_dict(), facts)
    save_model(tmp_path / "judge", judge, build(judge).state_dict())
    np.savez("real.npz", np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    words = ["target=gen", "features.path=judge", "reference=real.npz", "count=5", "strategy.accelerator=cpu"]
    for size in (2, 5):
        assert evaluate(compose("evaluate", [*words, f"batch_size={size}", f"out=by{size}"])) == 0
    (small,), (large,) = (tuple((tmp_path / f"by{size}").glob("*.json")) for size in (2, 5))
    assert small.name == large.name
    one, other = Result.load(small), Result.load(large)
    assert one.protocol_id == other.protocol_id
    assert one.numbers == pytest.approx(other.numbers, rel=1e-3)  # a decoder's pixel may be rounded the other way
    for result, size in ((one, 2), (other, 5)):
        assert result.speed["seconds_per_image"] > 0
        assert result.speed["decoder_seconds_per_image"] > 0
        assert (result.speed["batch_size"], result.speed["ranks"]) == (size, 1)
        assert result.speed["device"].startswith("CPU")
