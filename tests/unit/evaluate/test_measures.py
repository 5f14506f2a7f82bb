import math

import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate.feature_net import Features
from tokar.evaluate.measures import Frechet, InceptionScore, Mean, SpatialFrechet, class_accuracy, clip_score


def logits(count=46, classes=7):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(0)) * 2


def add(measure, rows, batch_size=8, order=None):
    """Logits in batches, the images' numbers beside them."""
    for numbers in (torch.arange(len(rows)) if order is None else order).split(batch_size):
        measure.update(Features(rows[numbers], rows[numbers]), {"index": numbers})
    return measure


def test_inception_score_is_its_formula_in_each_part():
    rows, scores = logits(), []
    for part in rows.double().split(20):
        p = part.softmax(1)
        kl = [sum(x * math.log(x / q) for x, q in zip(row, p.mean(0).tolist(), strict=True)) for row in p.tolist()]
        scores.append(math.exp(sum(kl) / len(kl)))
    found = add(InceptionScore(20), rows).compute(None)
    assert found["inception_score"] == pytest.approx(sum(scores) / 3, rel=1e-12)
    assert found["inception_score_std"] == pytest.approx(torch.tensor(scores).std(correction=0).item(), rel=1e-5)


def test_inception_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore as Theirs

    theirs = Theirs(feature=torch.nn.Flatten(), splits=1)
    rows = logits()
    theirs.update(rows)
    assert add(InceptionScore(1000), rows).compute(None)["inception_score"] == pytest.approx(
        theirs.compute()[0].item(), rel=1e-6
    )


def test_the_parts_of_an_inception_score_do_not_depend_on_the_order_they_come_in():
    rows = logits()
    whole, first, second = add(InceptionScore(20), rows), InceptionScore(20), InceptionScore(20)
    add(first, rows, 5, torch.arange(45, 12, -1))
    add(second, rows, 3, torch.arange(13))
    first.merge(second.state_dict())
    assert first.compute(None) == pytest.approx(whole.compute(None), rel=1e-12)
    with pytest.raises(UserError, match="have no classes"):
        whole.update(Features(rows), {"index": torch.arange(46)})


def test_frechet_distance_agrees_with_torchmetrics(network, images):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pooled(torch.nn.Module):
        def forward(self, pixels):
            return network(pixels.permute(0, 2, 3, 1)).pooled

    theirs = FrechetInceptionDistance(feature=Pooled(), input_img_size=(3, 16, 16)).set_dtype(torch.float64)
    ours = [Frechet(network), Frechet(network)]
    for real, pixels, measure in ((True, images, ours[0]), (False, images // 2, ours[1])):
        theirs.update(pixels.permute(0, 3, 1, 2), real=real)
        measure.update(network(pixels), {})
    distance = ours[1].compute(ours[0])["fd_classifier"]
    assert distance == pytest.approx(theirs.compute().item(), rel=1e-4)  # it takes roots of eigenvalues of a product


def test_class_accuracy_is_the_share_of_agreeing_labels(network, images):
    features = network(images)
    labels = features.logits.argmax(1)
    labels[:5] = (labels[:5] + 1) % 4
    accuracy = class_accuracy(network)
    accuracy.update(features, {"image": images, "label": labels})
    other = class_accuracy(network, judge=network)
    other.update(Features(features.pooled), {"image": images, "label": labels})
    assert accuracy.compute() == other.compute() == {"class_accuracy": pytest.approx(18 / 23)}
    with pytest.raises(UserError, match="label 4 for a classifier of 4 classes"):
        accuracy.update(features, {"image": images, "label": torch.full((23,), 4)})


def test_a_mean_of_nothing_is_not_told():
    mean = Mean("calls", lambda features, batch: batch.get("calls"), {})
    mean.update(Features(torch.zeros(2, 1)), {})
    assert mean.compute() == {}
    mean.update(Features(torch.zeros(2, 1)), {"calls": torch.tensor([3.0, 4.0])})
    mean.merge({"count": 2, "total": 13.0})
    assert mean.compute() == {"calls": 5.0}


def test_clip_score_is_the_cosine_in_percent(tmp_path, images):
    from text_encoders import write_clip_model
    from tokar.evaluate.features import load_features

    write_clip_model(tmp_path)
    network = load_features("clip", tmp_path)
    network.network.text_projection.weight.mul_(-1)  # or every cosine of these weights is below 0
    captions = ["a red boat", "a green dog", "zero"]
    score = clip_score(network, captions)
    for numbers in torch.arange(7).split(4):
        score.update(network(images[numbers]), {"index": numbers})
    expected = []
    for i in range(7):
        a, b = network(images[i : i + 1]).pooled[0], network.captions([captions[i % 3]])[0]
        expected.append(max(0.0, 100 * (a @ b / a.norm() / b.norm()).item()))
    assert score.compute()["clip_score"] == pytest.approx(sum(expected) / 7, rel=1e-4)
    assert sum(expected) > 0
    with pytest.raises(UserError, match="needs captions"):
        clip_score(network, [])


def test_measures_that_do_not_fit_the_features_are_refused(network):
    with pytest.raises(UserError, match="have no places; take inception_tf1"):
        SpatialFrechet(network)
    with pytest.raises(UserError, match="classifier reads no captions"):
        clip_score(network, ["a"])


def test_states_do_not_grow_with_the_images(network, images):
    def size(state):
        if isinstance(state, torch.Tensor):
            return state.numel()
        parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
        return 1 + sum(map(size, parts))

    measures, sizes = (Frechet(network), InceptionScore(5000), class_accuracy(network)), []
    for start in (0, 23, 46):
        batch = {"image": images, "label": torch.arange(23) % 4, "index": torch.arange(start, start + 23)}
        for measure in measures:
            measure.update(network(images), batch)
        sizes.append([size(measure.state_dict()) for measure in measures])
    assert sizes[0] == sizes[1] == sizes[2]
