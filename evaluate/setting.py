"""What an evaluation stands on: the run that is measured, the reference data, the networks that judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..conf.schema import Measured
from ..conf.spine import Data
from ..conf.stages import Sampling
from ..data.progress import progress_bar
from ..errors import UserError
from ..models.build import locate_model
from ..models.open import OpenedGenerator, open_generator
from .features import ClassifierFeatures, FeatureNet, features_place, load_features
from .frechet import Gaussian
from .generation import gaussian_of
from .reference import reference_batches


def run_of(target: Path) -> Path | None:
    """The run folder that `target` is or lies in."""
    return next((folder for folder in [target, *target.parents] if (folder / "config.yaml").is_file()), None)


def evaluation_folder(target: Path) -> Path:
    """Where results about `target` go: into its run, or beside it."""
    return (run_of(target) or target.parent) / "evaluation"


@dataclass(frozen=True)
class Setting:
    """Config, the sampling that the command line asks for, what is measured, where it runs."""

    config: Measured
    sampling: Mapping[str, Any]
    target: Path
    device: torch.device

    @property
    def run(self) -> Path | None:
        """The run folder that the target is or lies in."""
        return run_of(self.target)

    @property
    def run_config(self) -> dict[str, Any]:
        """Of that run; empty without one."""
        return dict(yaml.safe_load((self.run / "config.yaml").read_text())) if self.run else {}

    @property
    def data(self) -> Data:
        """The reference data: as configured, or that of the run.

        Raises:
            UserError: neither.
        """
        if self.config.data is not None:
            return self.config.data
        if "data" not in self.run_config:
            raise UserError("no reference data", where="data", fix="name a data set, e.g. data=digits")
        return Data.model_validate(self.run_config["data"])

    @property
    def reference_split(self) -> str:
        """That samples are compared with."""
        return self.config.split or self.data.train_split

    @property
    def features_path(self) -> Path | None:
        """Where the weights of the features lie; a classifier may be named by its run."""
        features = self.config.features
        return features_place(features.name, features.path or (self.config.judge if features.name == "classifier" else None))

    def opened_generator(self) -> OpenedGenerator:
        """The generator that the target is, and its tokenizer."""
        place = Path(self.config.decode_with) if self.config.decode_with else None
        opened = open_generator(self.target, tokenizer=place, ema=self.config.ema)
        opened.generator.to(self.device)
        opened.tokenizer.to(self.device)
        return opened

    @property
    def as_sampled(self) -> Sampling:
        """As the run samples, but for what is asked otherwise."""
        return Sampling.model_validate({**self.run_config.get("sampling", {}), **self.sampling})

    def sampling_of(self, opened: OpenedGenerator) -> dict[str, Any]:
        """The same as plain values.

        Raises:
            UserError: guidance of a generator that was not trained for it.
        """
        found = self.as_sampled
        opened.check_guidance(found.guidance)
        return found.model_dump()

    def features(self) -> FeatureNet:
        """The network of the Fréchet distance."""
        return load_features(self.config.features.name, self.features_path, self.device)

    def judge(self, network: FeatureNet) -> ClassifierFeatures | None:
        """Who tells classes: a classifier of its own, or that of the features."""
        if self.config.judge:
            return ClassifierFeatures(locate_model(Path(self.config.judge))).to(self.device)
        return network if isinstance(network, ClassifierFeatures) else None

    def reference(self, network: FeatureNet) -> Gaussian:
        """Feature statistics of the reference split."""
        batches, total, facts = reference_batches(self.data, self.reference_split, self.config.batch_size, None)
        with progress_bar(None, total, "reference") as advance:
            return gaussian_of(batches, network, data=facts, on_batch=advance)
