import pytest
import torch
from tokar.evaluate.features import ClassifierFeatures
from tokar.models.build import save_model
from tokar.models.classifier import Classifier


@pytest.fixture
def classifier_folder(tmp_path):
    torch.manual_seed(0)
    node = {"_target_": "tokar.models.classifier.Classifier", "image_size": 16, "num_classes": 4, "width": 8}
    folder = tmp_path / "classifier"
    save_model(folder, node, Classifier(16, 4, width=8).state_dict())
    return folder


@pytest.fixture
def network(classifier_folder):
    return ClassifierFeatures(classifier_folder)


@pytest.fixture
def images():
    return torch.randint(0, 256, (23, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def source_of(images, labels=None):
    """Images in memory as a source by number."""

    def source(batches):
        for numbers in batches:
            yield {"image": images[numbers], **({"label": labels[numbers]} if labels is not None else {})}

    return source


@pytest.fixture
def as_source():
    return source_of
