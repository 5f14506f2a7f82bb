import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from tokar.data.codes import CodeDataset, CodeWriter, code_type
from tokar.data.shards import ImageDataset
from tokar.data.stream import Stream
from tokar.errors import UserError
from tokar.models.tokenizers.layout import raster_layout

LAYOUT = raster_layout((2, 3), 512, 8, 4).to_dict()
PROTOCOL = {"crop": "ten", "size": 24, "ratio": 1.1}
TWO_STREAMS = {
    **LAYOUT,
    "kind": "multiscale",
    "streams": [
        {**LAYOUT["streams"][0], "name": f"scale{n}", "n_tokens": n, "vocab_size": 10**n, "grid": None} for n in (1, 2)
    ],
}


def _writer(folder, layout=LAYOUT, tokenizer_hash="a" * 64, views=3, protocol=PROTOCOL, count=25, **options):
    options = {"classes": ["cat", "dog"], "shard_size": 10, **options}
    return CodeWriter(folder, layout, tokenizer_hash, views, protocol, count=count, **options)


def _codes(start, stop, views=3, tokens=6):
    """Every code tells its image, view and token apart."""
    images, view, token = np.ogrid[start:stop, :views, :tokens]
    return images * 18 + view * 6 + token


def _write(writer, parts=None):
    for part in writer.pending() if parts is None else parts:
        n = np.arange(part.start, part.stop)
        writer.write(part.shard, _codes(part.start, part.stop), n % 2, [f"key{i}" for i in n])


@pytest.fixture
def folder(tmp_path):
    writer = _writer(tmp_path / "codes")
    _write(writer)
    writer.finish()
    return tmp_path / "codes"


def test_codes_come_back(folder):
    dataset = CodeDataset(folder, LAYOUT, "a" * 64)
    assert (len(dataset), dataset.views, dataset.classes) == (25, 3, ["cat", "dog"])
    order = np.random.default_rng(0).permutation(25)
    views = order % 3
    np.testing.assert_array_equal(dataset.read(order, views), _codes(0, 25)[order, views])
    assert dataset.labels.tolist() == [i % 2 for i in range(25)]
    assert [dataset.key(i) for i in (0, 9, 10, 24)] == ["key0", "key9", "key10", "key24"]
    assert np.load(folder / "codes-000001.npy", mmap_mode="r").dtype == np.uint16


def test_the_manifest_says_what_the_codes_are(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["layout"] == json.loads(json.dumps(LAYOUT))
    assert (manifest["tokenizer_hash"], manifest["views"], manifest["protocol"]) == ("a" * 64, 3, PROTOCOL)
    assert [entry["count"] for entry in manifest["shards"]] == [10, 10, 5]


def test_large_vocabularies_take_four_bytes(tmp_path):
    layout = raster_layout((2, 3), 2**18, 8, 4).to_dict()
    assert (code_type(LAYOUT), code_type(layout)) == (np.uint16, np.uint32)
    assert code_type(raster_layout((2, 3), 65536, 8, 4).to_dict()) == np.uint16
    writer = _writer(tmp_path, layout, count=1, views=1)
    codes = np.array([[[0, 1, 65535, 65536, 2**18 - 1, 7]]])
    writer.write(0, codes, np.zeros(1), ["a"])
    writer.finish()
    np.testing.assert_array_equal(CodeDataset(tmp_path).read(np.array([0]), np.array([0])), codes[0])


def test_several_ranks_write_disjoint_ranges(tmp_path):
    shares = [_writer(tmp_path).pending(rank, 2) for rank in range(2)]
    assert [[part.shard for part in share] for share in shares] == [[0, 1], [2]]
    assert shares[1][0] == (2, 20, 25)
    _write(_writer(tmp_path), shares[1])
    with pytest.raises(UserError, match="2 shards are not written yet, the first is 0"):
        _writer(tmp_path).finish()
    _write(_writer(tmp_path), shares[0])
    _writer(tmp_path).finish()
    assert len(CodeDataset(tmp_path)) == 25


def test_an_interrupted_encoding_goes_on(tmp_path):
    writer = _writer(tmp_path)
    _write(writer, writer.pending()[:2])
    with pytest.raises(UserError, match="no such file; run tokar encode first"):
        CodeDataset(tmp_path)
    (tmp_path / ".codes-000002.npy.123.tmp").write_bytes(b"left over")
    (tmp_path / "codes-000001.npy").write_bytes(b"cut")
    resumed = _writer(tmp_path)
    assert [part.shard for part in resumed.pending()] == [1, 2]
    _write(resumed)
    resumed.finish()
    np.testing.assert_array_equal(CodeDataset(tmp_path).read(np.arange(25), np.zeros(25, int)), _codes(0, 25)[:, 0])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_hash": "b" * 64}, "by another tokenizer"),
        ({"views": 2}, "views: 3 there, 2 here"),
        ({"protocol": {**PROTOCOL, "ratio": 1.05}}, r"protocol.ratio: 1.1 there, 1.05 here"),
        ({"count": 26}, "count: 25 there, 26 here"),
    ],
)
def test_codes_with_other_settings_are_not_mixed(tmp_path, change, message):
    _writer(tmp_path)
    with pytest.raises(UserError, match=message):
        _writer(tmp_path, **change)


def test_another_tokenizer_or_layout_is_refused(folder):
    with pytest.raises(UserError, match=r"made by another tokenizer \(aaaaaaaaaaaa…, in use: bbbbbbbbbbbb…\)"):
        CodeDataset(folder, LAYOUT, "b" * 64)
    other = raster_layout((2, 4), 1024, 8, 4).to_dict()
    with pytest.raises(UserError) as caught:
        CodeDataset(folder, other, "a" * 64)
    line = str(caught.value)
    assert "streams.0.n_tokens: 6 there, 8 here" in line
    assert "streams.0.vocab_size: 512 there, 1024 here" in line
    with pytest.raises(UserError, match=r"streams: 1 there, 2 here"):
        CodeDataset(folder, {**LAYOUT, "streams": [LAYOUT["streams"][0]] * 2})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "codes-000001.npy").unlink(), r"codes-000001\.npy: the shard is missing or truncated"),
        (
            lambda folder: (folder / "labels-000002.npy").write_bytes(b"x"),
            r"labels-000002\.npy: the shard is missing or truncated",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{"), "damaged or not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "not code shards of format 1"),
    ],
)
def test_damaged_folders_are_refused(folder, harm, message):
    harm(folder)
    with pytest.raises(UserError, match=message) as caught:
        CodeDataset(folder)
    assert "\n" not in str(caught.value)


def test_codes_outside_the_vocabulary_are_refused_when_written_and_when_read(tmp_path, folder):
    writer = _writer(tmp_path / "new", TWO_STREAMS, views=1, count=1)
    good = np.array([[[9, 99, 99]]])
    for bad in ([[[10, 0, 0]]], [[[0, 100, 0]]], [[[-1, 0, 0]]]):
        with pytest.raises(UserError, match="outside the vocabulary"):
            writer.write(0, np.array(bad), np.zeros(1), ["a"])
    writer.write(0, good, np.zeros(1), ["a"])
    shard = np.load(folder / "codes-000000.npy")
    shard[3, 1, 2] = 512
    np.save(folder / "codes-000000.npy", shard)
    with pytest.raises(UserError, match="the shards are damaged"):
        list(itertools.islice(Stream(CodeDataset(folder), batch_size=25, seed=0).batches(0), 20))


@pytest.mark.parametrize("shape", [(9, 3, 6), (10, 2, 6), (10, 3, 7)])
def test_wrong_shapes_are_refused(tmp_path, shape):
    with pytest.raises(UserError, match=r"shard 0 needs codes \(10, 3, 6\)"):
        _writer(tmp_path).write(0, np.zeros(shape, int), np.zeros(10), ["k"] * 10)


def test_the_view_is_a_function_of_seed_epoch_and_sample(folder):
    dataset = CodeDataset(folder)
    indices, epochs = np.arange(25), np.zeros(25, int)
    whole = dataset.fetch(indices, epochs, 0)["codes"]
    np.testing.assert_array_equal(dataset.fetch(indices[[7, 3]], epochs[:2], 0)["codes"], whole[[7, 3]])
    views = np.array([dataset.fetch(indices, epochs + epoch, 0)["codes"][:, 0] % 18 // 6 for epoch in range(60)])
    assert set(views.flatten()) == {0, 1, 2}
    assert np.bincount(views.flatten()).min() > 400
    assert (views.min(axis=0) == 0).all()
    assert (views.max(axis=0) == 2).all()


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 3), (2, 2)])
def test_codes_flow_through_the_stream(folder, workers, world):
    dataset = CodeDataset(folder)
    (expected,) = next(Stream(dataset, batch_size=12, seed=2).batches(20))
    assert (expected["codes"].dtype, tuple(expected["codes"].shape)) == (torch.int64, (12, 6))
    parts = []
    for rank in range(world):
        iterator = Stream(dataset, batch_size=12, seed=2, rank=rank, world=world, workers=workers).batches(20)
        parts += next(iterator)
        iterator.close()
    for name in expected:
        assert torch.equal(torch.cat([part[name] for part in parts]), expected[name])
    assert torch.equal(expected["codes"][:, 0] // 18, expected["index"])


def test_pickling_does_not_carry_the_codes(folder):
    dataset = CodeDataset(folder)
    dataset.fetch(np.arange(25), np.zeros(25, int), 0)
    copied = pickle.loads(pickle.dumps(dataset))
    assert copied._maps == {}
    np.testing.assert_array_equal(copied.read(np.arange(25), np.zeros(25, int)), _codes(0, 25)[:, 0])


@pytest.mark.parametrize("name", ["codes", "labels"])
def test_a_damaged_header_is_one_line(folder, name):
    path = folder / f"{name}-000000.npy"
    content = path.read_bytes()
    path.write_bytes(bytes(255 - byte for byte in content[:64]) + content[64:])
    with pytest.raises(UserError, match="the shard is damaged; delete it and run tokar encode again"):
        CodeDataset(folder).fetch(np.arange(2), np.zeros(2, dtype=np.int64), 0)


def test_images_are_not_codes_nor_codes_images(folder, tmp_path):
    with pytest.raises(UserError, match=r"codes, not images; give them as codes\.path"):
        ImageDataset(folder.parent, folder.name)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "manifest.json").write_text('{"format": 1, "shards": [{"name": "x.tar", "bytes": 3}]}')
    with pytest.raises(UserError, match="not code shards of format 1"):
        CodeDataset(tmp_path / "images")
