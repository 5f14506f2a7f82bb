"""What an evaluation stands on: the run that is measured, the reference data, the networks that judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..conf.protocols import Protocol
from ..conf.schema import Measured
from ..conf.spine import Data
from ..conf.stages import Sampling
from ..errors import UserError
from ..models.open import OpenedGenerator, open_generator
from .generation import Reference
from .protocols import Judging, open_judging, reference_of
from .ranks import Pace
from .reference import split_images


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

    def judging(self, protocol: Protocol, captions: Sequence[str] | None = None) -> Judging:
        """The networks of a protocol, on the device."""
        return open_judging(protocol, self.config, self.device, captions)

    def reference(self, judging: Judging, place: Path | None = None) -> Reference:
        """The real images that samples are compared with: those of a file or folder, else the reference split."""
        pace = Pace(self.config.batch_size)
        return reference_of(judging, place, lambda: split_images(self.data, self.reference_split), pace)
