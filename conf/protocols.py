"""The schema of an evaluation protocol: what is measured, on how many images, with which features, against what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from ..ranges import NonNegativeInt, PositiveInt
from .nodes import Node, Text

FOLDER = Path(__file__).parent / "protocol"

FeatureName = Literal["classifier", "inception", "inception_tf1", "dinov2", "clip"]
MeasureName = Literal[
    "frechet", "spatial_frechet", "inception_score", "precision_recall", "kid", "clip_score", "class_accuracy"
]


class Protocol(Node):
    """A protocol by name, as `conf/protocol` writes it down; keys may be changed, and the result then says which."""

    name: Text = Field(description="as results call it")
    of: list[Literal["tokenizer", "samples"]] = Field(
        min_length=1, description="a tokenizer against the images that it reconstructs, or samples against real images"
    )
    features: FeatureName = Field(description="network that looks at the images; its resize and scaling belong to it")
    measures: list[MeasureName] = Field(min_length=1, description="what is made of the features")
    count: PositiveInt | None = Field(None, description="images; null: as many as the reference split has")
    split_size: PositiveInt = Field(5000, description="inception_score: images of each part, in order")
    neighbours: PositiveInt = Field(3, description="precision_recall: the radius of an image reaches to this neighbour")
    subsets: PositiveInt = Field(100, description="kid: averaged over so many")
    subset_size: Annotated[int, Field(ge=2)] = Field(1000, description="kid: images of each side in one")
    keep: PositiveInt = Field(50_000, description="precision_recall, kid: at most so many images keep their features")
    keep_reference: PositiveInt = Field(50_000, description="the same, of the reference")
    seed: NonNegativeInt = Field(0, description="of what is kept and of the subsets")

    def changes(self) -> dict[str, Any]:
        """Keys that are not as shipped under this name, with their values; of a name that is not shipped, none."""
        path = FOLDER / f"{self.name}.yaml"
        if not path.is_file():
            return {}
        shipped = Protocol.model_validate(yaml.safe_load(path.read_text())).model_dump()
        return {key: value for key, value in self.model_dump().items() if shipped[key] != value}
