import pytest
from tokar.conf.protocols import Protocol
from tokar.evaluate.generation import Reference, evaluate_samples, score_of
from tokar.evaluate.protocols import Judging
from tokar.evaluate.ranks import Pace


@pytest.fixture
def judging(network):
    measures = ["frechet", "inception_score", "precision_recall", "kid", "class_accuracy"]
    values = {"name": "x", "of": ["samples"], "features": "classifier", "measures": measures, "split_size": 10}
    return Judging(Protocol.model_validate({**values, "subset_size": 10, "subsets": 4, "keep": 20}), network)


def test_all_measures_of_a_protocol_in_any_batch(judging, images, as_source):
    labels = images.float().mean((1, 2, 3)).long() % 4
    reference = score_of(lambda: judging.reference_score(23, {}), as_source(images // 2), 23, Pace(5))
    assert set(reference.measures) == {"frechet", "precision_recall", "kid"}
    results = []
    for size in (3, 23):
        score = score_of(lambda: judging.score(23), as_source(images, labels), 23, Pace(size))
        results.append(evaluate_samples(score, 23, Reference(reference, {"split": "val"}), {"seed": 0}))
    one, other = results
    assert one.numbers == pytest.approx(other.numbers, rel=1e-6, abs=1e-9)
    assert set(one.numbers) == {
        "fd_classifier", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std", "class_accuracy"
    }  # fmt: skip
    assert one.protocol_id == other.protocol_id
    assert one.protocol["reference"]["split"] == "val"
    assert one.protocol["measures"]["kid"]["choice"] == "first of permutation(seed 0) of 23"
    assert one.protocol["features"] == judging.network.protocol()


def test_images_are_at_no_distance_from_themselves(judging, images, as_source):
    score = score_of(lambda: judging.score(23), as_source(images), 23, Pace())
    reference = score_of(lambda: judging.reference_score(23, {}), as_source(images), 23, Pace())
    numbers = evaluate_samples(score, 23, Reference(reference)).numbers
    assert numbers["fd_classifier"] == pytest.approx(0, abs=1e-6)
    assert "class_accuracy" not in numbers  # there are no labels
    assert numbers["precision"] == 1


def test_what_made_the_samples_is_told_but_does_not_split_the_table(judging, images, as_source):
    score = score_of(lambda: judging.score(23), as_source(images), 23, Pace())
    results = [evaluate_samples(score, 23, Reference(score), {"guidance": s}) for s in (1.0, 2.0)]
    assert results[0].protocol_id == results[1].protocol_id
    assert results[1].subject == {"guidance": 2.0}
    assert results[0].protocol_id != evaluate_samples(score, 22, Reference(score)).protocol_id
