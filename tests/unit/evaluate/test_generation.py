import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate.frechet import Gaussian, frechet_distance
from tokar.evaluate.generation import GenerationScore, evaluate_generation, gaussian_of


def as_batches(images, labels=None, size=5):
    batches = [{"image": part} for part in images.split(size)]
    for batch, part in zip(batches, labels.split(size) if labels is not None else [], strict=False):
        batch["label"] = part
    return batches


@pytest.fixture
def reference(network, images):
    return gaussian_of(as_batches(images), network, data={"name": "noise", "split": "val"})


def test_the_reference_is_at_no_distance_from_itself(network, images, reference):
    result = evaluate_generation(as_batches(images, size=7), reference, network)
    assert result.numbers["fd_classifier"] == pytest.approx(0, abs=1e-6)
    assert result.protocol["reference"] == {"data": {"name": "noise", "split": "val"}, "count": 23}


def test_other_images_are_further_away(network, images, reference):
    near = evaluate_generation(as_batches((images.int() + 5).clamp(max=255).to(torch.uint8)), reference, network)
    far = evaluate_generation(as_batches(images // 2), reference, network)
    assert 0 < near.numbers["fd_classifier"] < far.numbers["fd_classifier"]


def test_class_accuracy_is_the_share_of_agreeing_labels(network, images, reference):
    labels = network(images).logits.argmax(1)
    labels[:5] = (labels[:5] + 1) % 4
    result = evaluate_generation(as_batches(images, labels), reference, network, judge=network)
    assert result.numbers["class_accuracy"] == pytest.approx(18 / 23)
    assert result.protocol["classifier"] == network.protocol()


def test_accuracy_alone_needs_no_reference(network, images):
    labels = network(images).logits.argmax(1)
    assert evaluate_generation(as_batches(images, labels), None, network, judge=network).numbers == {"class_accuracy": 1.0}


def test_sample_count_and_reference_are_part_of_the_protocol(network, images, reference):
    results = [evaluate_generation(as_batches(images[:count]), reference, network) for count in (23, 20)]
    other = Gaussian(reference.mean, reference.covariance, 23, {**reference.protocol, "data": {"name": "other"}})
    results.append(evaluate_generation(as_batches(images), other, network))
    assert len({result.protocol_id for result in results}) == 3


def test_what_made_the_samples_is_told_but_does_not_split_the_table(network, images, reference):
    results = [evaluate_generation(as_batches(images), reference, network, subject={"guidance": s}) for s in (1.0, 2.0)]
    assert results[0].protocol_id == results[1].protocol_id
    assert results[1].subject == {"guidance": 2.0}


@pytest.mark.parametrize("ranks", [1, 3])
def test_parts_and_interruptions_change_nothing(network, images, reference, ranks):
    labels = torch.arange(23) % 4
    whole = GenerationScore(network, network)
    whole.update(images, labels)
    total = whole.empty()
    for rank in range(ranks):
        part, resumed = whole.empty(), whole.empty()
        part.update(images[rank::ranks][:3], labels[rank::ranks][:3])
        resumed.load_state_dict(part.state_dict())
        resumed.update(images[rank::ranks][3:], labels[rank::ranks][3:])
        total.merge(resumed)
    other = gaussian_of(as_batches(images // 2), network)
    assert total.numbers(other) == pytest.approx(whole.numbers(other), rel=1e-6)


def test_mistakes_get_one_line(network, images, reference):
    foreign = Gaussian(reference.mean, reference.covariance, 23, {"features": {**network.protocol(), "weights_sha256": "0"}})
    with pytest.raises(UserError, match="weights_sha256 differ"):
        evaluate_generation(as_batches(images), foreign, network)
    with pytest.raises(UserError, match="label 4 for a classifier of 4 classes"):
        evaluate_generation(as_batches(images, torch.full((23,), 4)), reference, network, judge=network)
    with pytest.raises(UserError, match="nothing to measure"):
        evaluate_generation(as_batches(images), None, network)
    with pytest.raises(UserError, match="at least two images"):
        evaluate_generation([], reference, network)


def test_distance_uses_the_features_of_the_network(network, images, reference):
    own = gaussian_of(as_batches(images // 3), network)
    result = evaluate_generation(as_batches(images // 3), reference, network)
    assert result.numbers["fd_classifier"] == pytest.approx(frechet_distance(own, reference))
