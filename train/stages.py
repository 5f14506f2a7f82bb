"""From a checked config to a stage and its data: one builder for each stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conf.schema import ClassifierRun, Data, GeneratorRun, Spine, TokenizerRun
from ..data.codes import CodeDataset
from ..data.shards import ImageDataset
from ..data.stream import Stream
from ..data.transforms import Augment
from ..errors import UserError
from ..models.build import resolve_target, weights_hash
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.layout import TokenLayout
from .classifier import ClassifierStage
from .generator import GeneratorStage
from .stage import Batch, Stage
from .strategy import Workers
from .tokenizer import TokenizerStage


@dataclass(frozen=True)
class Built:
    """A stage with its training stream and its validation batches `(samples, rank) → batches`."""

    stage: Stage
    train: Stream
    validate: Callable[[int, int], Iterator[Batch]]
