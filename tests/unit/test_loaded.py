"""`tokar.load` on tiny models: what it gives, that it equals the commands, and what it refuses."""

import runpy
import sys

import numpy as np
import pytest
import tokar
import torch
from PIL import Image
from tiny_tokenizers import tiny_node
from tokar.cli import main
from tokar.errors import UserError
from tokar.evaluate.protocol import Result
from tokar.models.build import build, locate_model, save_model, weights_hash
from tokar.models.convert.files import export_original

GENERATOR = {"_target_": "tokar.models.generators.next_token.NextToken", "vocab_size": 16, "num_classes": 3, "grid": [4, 4],
             "dim": 64, "layers": 1, "heads": 1}  # fmt: skip
SCALES = {"_target_": "tokar.models.generators.next_scale.NextScale", "vocab_size": 16, "num_classes": 3,
          "grids": [[1, 1], [2, 2], [4, 4]], "embed_dim": 4, "dim": 32, "layers": 1, "heads": 2}  # fmt: skip


def write(folder, kind, node, seed=0):
    """A tokenizer and a generator of its codes, as a run leaves them."""
    torch.manual_seed(seed)
    tokenizer = build(tiny_node(kind)).eval()
    save_model(folder / "tokenizer", tiny_node(kind), tokenizer.state_dict(), {"layout": tokenizer.layout.to_dict()})
    generator = build(node)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    origin = {"path": str(folder / "tokenizer"), "hash": weights_hash(tokenizer)}
    facts = {"layout": tokenizer.layout.to_dict(), "classes": ["a", "b", "c"], "tokenizer": origin, "class_dropout": 0.1}
    run = folder / "run"
    save_model(run / "checkpoints/step-00000002/generator", node, generator.state_dict(), facts)
    (run / "checkpoints/step-00000002/state.json").write_text('{"main": "generator"}')
    (run / "checkpoints/step-00000002/COMPLETE").write_text("{}")
    (run / "config.yaml").write_text("stage: generator\ndata: {source: places/cifar.zip, image_size: 32}\nseed: 4\n")
    (run / "metrics.jsonl").write_text('{"step": 2, "train/loss": 1.0}\n')
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write(tmp_path_factory.mktemp("loaded"), "vqgan", GENERATOR)


@pytest.fixture(scope="module")
def model(run):
    return tokar.load(run)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def test_images_in_every_form_become_the_same_codes(model, images):
    codes = model.encode(images)
    assert (codes.shape, codes.dtype) == ((3, 16), np.int64)
    for form in (torch.from_numpy(images), [Image.fromarray(image) for image in images]):
        assert np.array_equal(model.encode(form, batch_size=2), codes)
    decoded = model.decode(codes, batch_size=2)
    assert (decoded.shape, decoded.dtype) == ((3, 32, 32, 3), np.uint8)
    assert np.array_equal(model.decode(torch.from_numpy(codes)), decoded)
    assert model.decode(codes[:0]).shape == (0, 32, 32, 3)


def test_samples_are_those_of_the_command(model, run, tmp_path, capsys):
    asked = ["count=5", "classes=[2,0]", "save=[codes,npz]", "seed=3", "sampling.guidance=2", "sampling.top_k=9"]
    assert main(["sample", str(run), *asked, f"out={tmp_path}", "batch_size=2", "strategy.accelerator=cpu"]) == 0
    choices = {"seed": 3, "guidance": 2.0, "top_k": 9}
    assert np.array_equal(model.sample_codes([2, 0, 2, 0, 2], **choices), np.load(tmp_path / "codes.npy"))
    drawn = np.load(tmp_path / "samples.npz")["arr_0"]
    assert np.array_equal(model.sample([2, 0, 2, 0, 2], batch_size=3, **choices), drawn)
    assert np.array_equal(model.sample(2, **choices), drawn[:1])
    given = np.full((2, 16), -1)
    given[:, 5], given[1, 7] = 3, 4
    codes = model.sample_codes([1, 1], given=given, batch_size=1)
    assert (codes[:, 5].tolist(), int(codes[1, 7])) == ([3, 3], 4)


def test_a_folder_to_publish_comes_back(run, model, tmp_path, capsys):
    numbers = Result("generation", {"frechet": 2.5}, {"features": "x/judge", "count": 10}, {"checkpoint": "step-00000002"})
    numbers.save(run / "evaluation/generation.json")
    out = tmp_path / "digits"
    assert main(["export", str(run), "--hf", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer"]
    (run.parent / "tokenizer").rename(run.parent / "gone")
    try:
        assert np.array_equal(tokar.load(out).sample([0, 1], seed=5), model.sample([0, 1], seed=5))
        with pytest.raises(UserError, match=r"its tokenizer .* is not here"):
            tokar.load(run)
        assert tokar.load(run, tokenizer=run.parent / "gone").layout == model.layout
        assert main(["export", str(run), "--hf", str(tmp_path / "other"), "--decode-with", str(run.parent / "gone")]) == 0
    finally:
        (run.parent / "gone").rename(run.parent / "tokenizer")
    card = (out / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in model.generator.parameters())
    for part in ("license: #", f"NextToken`, {parameters:,} parameters", "3 classes to 16 raster tokens of 16 codes",
                 "| data.source | …/cifar.zip |", "| frechet | 2.5 |", f"protocol {numbers.protocol_id}",
                 "| features | …/judge |", 'tokar.load("digits")'):  # fmt: skip
        assert part in card, part


def test_a_published_file_is_loaded(model, run, tmp_path, images):
    file = tmp_path / "vq.pt"
    export_original(run.parent / "tokenizer", file, "llamagen_vq")
    published = tokar.load(file, image_size=32)
    assert published.layout == model.layout
    assert np.array_equal(published.encode(images), model.encode(images))
    export_original(locate_model(run), tmp_path / "gpt.pt", "llamagen_gpt")
    with pytest.raises(UserError, match="does not say which tokenizer"):
        tokar.load(tmp_path / "gpt.pt")
    with pytest.raises(UserError, match="256 tokens of 16 codes, but the tokenizer has 1024 of 16"):
        tokar.load(tmp_path / "gpt.pt", tokenizer=file)
    generator = tokar.load(tmp_path / "gpt.pt", tokenizer=file, config={"block_size": 16}, image_size=32)
    assert np.array_equal(generator.sample([1, 2], seed=7), model.sample([1, 2], seed=7))


@pytest.mark.parametrize(("kind", "node"), [("vqgan", GENERATOR), ("multiscale", SCALES)])
def test_the_example_of_the_documents_runs(kind, node, tmp_path, root, monkeypatch, capsys):
    monkeypatch.setenv("TOKAR_RUN", str(write(tmp_path, kind, node)))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(root / "docs/example.py"))
    rows = 7 if kind == "multiscale" else 4
    assert capsys.readouterr().out.endswith(f"example.png: {rows} rows of 8\n")
    assert Image.open("example.png").size == (8 * 32, rows * 32)


def test_a_classifier_judges(tmp_path, images):
    node = {"_target_": "tokar.models.classifier.Classifier", "image_size": 32, "num_classes": 4, "width": 8}
    save_model(tmp_path, node, build(node).state_dict(), {"classes": ["a", "b", "c", "d"]})
    judge = tokar.load(tmp_path)
    assert judge.classes == ["a", "b", "c", "d"]
    np.testing.assert_allclose(judge.classify(images).sum(1), np.ones(3), rtol=1e-6)
    with pytest.raises(UserError, match="16x16 pixels, this classifier takes 32x32"):
        judge.classify(images[:, :16, :16])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.encode(np.zeros((1, 32, 32, 3))), r"images: float64 \[1, 32, 32, 3\]; give uint8"),
        (lambda model: model.encode(np.zeros((32, 32, 3), np.uint8)), r"images: uint8 \[32, 32, 3\]; give uint8"),
        (lambda model: model.encode([Image.new("L", (32, 32)), Image.new("L", (8, 8))]), "not pictures of one size"),
        (lambda model: model.decode(np.zeros((2, 5), int)), r"codes: int64 \[2, 5\]; give integers \[B, 16\]"),
        (lambda model: model.decode(np.full((1, 16), 16)), "codes: code 16; those of patch are 0 to 15"),
        (lambda model: model.decode(np.zeros((1, 16), int), tokens=3), "cannot decode a prefix"),
        (lambda model: model.sample([3]), "class_ids: no class 3; classes are 0 to 2"),
        (lambda model: model.sample(["a dog"]), "class_ids: this model draws classes, not texts"),
        (lambda model: model.sample([0], guidence=2), "guidence: no such choice; did you mean 'guidance'"),
        (lambda model: model.sample([0], seed=-1), "negative"),
        (lambda model: tokar.load("nowhere"), "nowhere: no such file or folder"),
        (lambda model: tokar.load("nowhere", device="gpu"), "device=gpu: no such device; give cpu, cuda or cuda:1"),
    ],
)
def test_mistakes_are_told(model, ask, message):
    with pytest.raises(UserError, match=message):
        ask(model)


def test_a_tokenizer_alone_draws_nothing(run):
    with pytest.raises(UserError, match="a VQGAN turns images into codes"):
        tokar.load(run.parent / "tokenizer").sample([0])


def test_the_package_is_imported_without_torch():
    import subprocess

    code = "import sys, tokar; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
