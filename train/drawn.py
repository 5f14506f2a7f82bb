"""What a run leaves for its report beside numbers and pictures: the use of its codes, and the order of its tokens."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..evaluate.protocol import write_whole
from ..evaluate.report.runs import CODES, PLAN
from ..models.generators.base import Generator
from ..models.generators.plan import Plan
from ..models.tokenizers.layout import TokenLayout

FORMAT = 1


def save_counts(histograms: Mapping[str, Tensor], folder: Path) -> None:
    """Write how often each code was used, `[V]` by the name of its stream, to `codes.npz`."""
    counts = {name: histogram.cpu().numpy().round().astype(np.int64) for name, histogram in histograms.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **counts)
    write_whole(folder / CODES, buffer.getvalue())


def save_plan(network: nn.Module, facts: Mapping[str, Any], folder: Path) -> None:
    """Write the order in which a generator reveals its tokens to `plan.json`; other networks have none.

    Args:
        network: any.
        facts: what lies beside its weights, `layout` among it.
        folder: of the run.
    """
    if isinstance(network, Generator) and "layout" in facts:
        described = describe_plan(network.plan, TokenLayout.from_dict(facts["layout"]))
        write_whole(folder / PLAN, (json.dumps(described) + "\n").encode())


def describe_plan(plan: Plan, layout: TokenLayout) -> dict[str, Any]:
    """The plan by streams of the layout: `revealed_at` is the unit that reveals each token, in layout order."""
    streams, start = [], 0
    for stream in layout.streams:
        stop = start + stream.n_tokens
        grid = stream.grid or (plan.grid if len(layout.streams) == 1 else None)
        streams.append({"name": stream.name, "grid": grid, "revealed_at": plan.revealed_at[start:stop]})
        start = stop
    return {"format": FORMAT, "n_units": plan.n_units, "streams": streams}
