import numpy as np
import pytest
import torch
from tokar.conf.compose import compose, groups
from tokar.conf.protocols import Protocol
from tokar.errors import UserError
from tokar.evaluate.protocols import COMPARING, Judging, choose_protocol, reference_of
from tokar.evaluate.ranks import Pace

NAMES = groups()["protocol"]


def asked(*overrides):
    return compose("evaluate", ["target=x", *overrides]).typed


@pytest.mark.parametrize("name", NAMES)
def test_each_shipped_protocol_is_its_file_and_is_written_down(root, name):
    protocol = asked(f"protocol={name}").protocol
    assert protocol.name == name
    assert protocol.changes() == {}
    assert f"| `{name}` |" in (root / "docs" / "protocols.md").read_text()


def test_what_is_changed_is_told():
    config = asked("protocol=kid", "protocol.subset_size=7", "count=40")
    assert choose_protocol(config, "samples").changes() == {"count": 40, "subset_size": 7}
    assert choose_protocol(asked("protocol=kid"), "samples").changes() == {}


def test_without_a_name_the_features_decide():
    plain = choose_protocol(asked("features.name=dinov2", "count=9"), "samples")
    assert (plain.features, plain.measures, plain.count) == ("dinov2", ["frechet"], 9)
    assert choose_protocol(asked(), "samples").measures == ["frechet", "class_accuracy"]
    assert choose_protocol(asked(), "tokenizer").measures == ["frechet"]


@pytest.mark.parametrize(
    ("overrides", "of", "word"),
    [
        (["protocol=gfid-50k"], "tokenizer", "is of samples; take another one, such as protocol=rfid-val"),
        (["protocol=rfid-val"], "samples", "is of a tokenizer; take another one, such as protocol=gfid-50k"),
        (["protocol=kid", "features.name=clip"], "samples", "protocol kid reads inception_tf1"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, of, word):
    with pytest.raises(UserError, match=word):
        choose_protocol(asked(*overrides), of)


@pytest.fixture
def judging(network):
    values = {"name": "x", "of": ["samples"], "features": "classifier", "measures": ["frechet", "kid"]}
    return Judging(Protocol.model_validate({**values, "subset_size": 5, "keep_reference": 9}), network)


def refuse():
    pytest.fail("the split was asked for")


def test_a_reference_is_looked_at_once(judging, images, tmp_path, monkeypatch, as_source):
    monkeypatch.setenv("TOKAR_CACHE", str(tmp_path))
    asked_for = []

    def split(content):
        def source(batches):
            asked_for.extend(np.concatenate(batches) if batches else [])
            yield from as_source(images)(batches)

        return source, 23, {"content": content}

    references = [reference_of(judging, None, lambda content=content: split(content), Pace(4)) for content in "aab"]
    assert len(asked_for) == 2 * 23
    assert {reference.score.measures["kid"].features.shape for reference in references} == {(9, judging.network.dim)}
    one, again, _ = (reference.score.gaussians["frechet"].covariance for reference in references)
    assert torch.equal(one, again)


def test_a_file_of_statistics_gives_what_it_has_and_its_images_the_rest(judging, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKAR_CACHE", str(tmp_path))
    mean = np.arange(judging.network.dim)
    np.savez(tmp_path / "ref.npz", arr_0=images.numpy(), mu=mean, sigma=np.eye(len(mean)))
    reference = reference_of(judging, tmp_path / "ref.npz", refuse, Pace())
    assert reference.score.gaussians["frechet"].mean.tolist() == mean.tolist()
    chosen = reference.score.measures["kid"]
    torch.testing.assert_close(chosen.features.float(), judging.network(images[np.flatnonzero(chosen.wanted)]).pooled)
    assert reference.facts["statistics"] == ["frechet"]
    np.savez(tmp_path / "short.npz", mu=mean, sigma=np.eye(len(mean)))
    with pytest.raises(UserError, match=r"short\.npz: has statistics but no images for kid"):
        reference_of(judging, tmp_path / "short.npz", refuse, Pace())
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=images.numpy())
    with pytest.raises(UserError, match=r"wide\.npz: statistics of 3 features, fd_classifier has"):
        reference_of(judging, tmp_path / "wide.npz", refuse, Pace())


def test_a_protocol_that_compares_nothing_needs_no_reference(network):
    values = {"name": "x", "of": ["samples"], "features": "classifier", "measures": ["inception_score"]}
    assert reference_of(Judging(Protocol.model_validate(values), network), None, refuse, Pace()).score is None
    measures = Judging(Protocol.model_validate({**values, "measures": [*COMPARING[2:], "frechet"]}), network).score(30).measures
    assert {name for name, measure in measures.items() if measure.compares} == {*COMPARING} - {"spatial_frechet"}


@pytest.mark.parametrize("name", NAMES)
def test_reference_or_not_is_told_by_the_measure(name):
    """What a protocol names as comparing is what the classes say."""
    from tokar.evaluate import measures, neighbours

    classes = {
        "frechet": measures.Frechet, "spatial_frechet": measures.SpatialFrechet, "kid": neighbours.KernelDistance,
        "precision_recall": neighbours.PrecisionRecall, "inception_score": measures.InceptionScore,
        "clip_score": measures.Mean, "class_accuracy": measures.Mean,
    }  # fmt: skip
    for measure in asked(f"protocol={name}").protocol.measures:
        assert classes[measure].compares == (measure in COMPARING)


def test_a_sample_is_a_function_of_seed_and_number():
    from tokar.evaluate.samples import draw_codes
    from tokar.models.generators.next_token import NextToken

    torch.manual_seed(0)
    generator = NextToken(8, 3, grid=(2, 2), dim=8, layers=1, heads=1, multiple_of=8).eval()
    torch.nn.init.normal_(generator.head.weight)
    labels = torch.arange(20) % 3

    def drawn(numbers, batch_size):
        batches = draw_codes(generator, labels[numbers], seed=5, sampling={}, batch_size=batch_size, numbers=numbers)
        return torch.cat([batch["codes"] for batch in batches])

    whole = drawn(np.arange(20), 20)
    assert len(whole.unique(dim=0)) > 5
    for part in (np.arange(7), np.arange(7, 20), np.array([3, 11, 4])):
        assert torch.equal(drawn(part, 3), whole[part])
