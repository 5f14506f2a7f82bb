"""A model folder to publish: safetensors, config and a model card, as a hub of models shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.build import build, export_model, locate_model, model_facts, model_node
from ..models.open import ITS_TOKENIZER, tokenizer_place
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.layout import TokenLayout
from .protocol import Result, write_whole
from .report.runs import MARKS, Run, flatten, read_run

CARD = "README.md"
TRAINING = ("data", "loop.duration", "loop.batch_size", "optim.name", "optim.lr", "schedule", "strategy.precision", "seed")
"""Of a run's config, what the card tells of the training."""


def export_card(source: Path, out: Path, *, ema: bool = True, tokenizer: Path | None = None) -> Path:
    """Write a model as `export_model` does, the tokenizer of its codes in `tokenizer/`, and a model card.

    Args:
        source: a run, a checkpoint or a model folder.
        out: the folder to write.
        ema: take the averaged weights where there are some.
        tokenizer: of a generator or a student, where it lies now; `None`: where it lay while training.

    Raises:
        UserError: there is no model, or its tokenizer is gone.
    """
    folder = locate_model(source)
    facts, node = model_facts(folder), model_node(folder)
    with torch.device("meta"):
        model: nn.Module = build(node, trusted=False)
    place = tokenizer_place(source, facts, tokenizer) if facts.get("tokenizer") or tokenizer else None
    export_model(source, out, ema=ema)
    if place is not None:
        export_model(place, out / ITS_TOKENIZER)
    run = next((each for each in (source, *source.parents) if any((each / mark).exists() for mark in MARKS)), None)
    kind = "tokenizer" if isinstance(model, Tokenizer) else "generator" if place else "model"
    lines = _card(out.name, kind, model, facts, node, None if run is None else read_run(run))
    write_whole(out / CARD, ("\n".join(lines) + "\n").encode())
    return out


def _card(
    name: str, kind: str, model: nn.Module, facts: Mapping[str, Any], node: Mapping[str, Any], run: Run | None
) -> Iterator[str]:
    yield from ("---", "library_name: tokar", f"tags: [tokar, image-{kind}]")
    yield from ("license: # yours to choose, e.g. apache-2.0", "---", "", f"# {name}", "", _about(kind, model, facts), "")
    count = sum(parameter.numel() for parameter in model.parameters())
    yield from ("## Use", "", *_use(name, kind), "", "## Architecture", "", f"`{node['_target_']}`, {count:,} parameters.", "")
    yield from _table(("argument", "value"), {key: value for key, value in flatten(node).items() if key != "_target_"})
    yield from ("", "## Data and training", "", *_training(run), "", "## Results", "")
    yield from _results([] if run is None else [result for _, result in run.results])


def _about(kind: str, model: nn.Module, facts: Mapping[str, Any]) -> str:
    what = f"A {type(model).__name__} of tokar"
    layout = model.layout if isinstance(model, Tokenizer) else facts.get("layout")
    if layout is None:
        return f"{what}."
    shape = layout if isinstance(layout, TokenLayout) else TokenLayout.from_dict(layout)
    images = "images of {}x{} pixels".format(*shape.image_size)
    tokens = f"{shape.total_tokens} {shape.kind} tokens of {shape.vocab_size} codes"
    if kind == "tokenizer":
        return f"{what}: {images} to {tokens}, and back."
    asked = f"{len(facts['classes'])} classes" if facts.get("classes") else "classes or texts"
    return f"{what}: {asked} to {tokens}, and by its tokenizer (`{ITS_TOKENIZER}/`) to {images}."


def _use(name: str, kind: str) -> Iterator[str]:
    yield from ("```python", "import tokar", "", f'model = tokar.load("{name}")  # this folder, on disk')
    if kind == "generator":
        yield "images = model.sample([0, 1, 2], seed=0)  # uint8 [3, H, W, 3]"
    if kind != "model":
        yield from ("codes = model.encode(images)  # int64 [B, N] of uint8 [B, H, W, 3]", "again = model.decode(codes)")
    yield "```"


def _training(run: Run | None) -> Iterator[str]:
    if run is None or not run.config:
        yield "Not known: the model was exported without its run."
        return
    told = {key: value for key, value in flatten(run.config).items() if key in TRAINING or key.split(".")[0] in TRAINING}
    yield from _table(("key", "value"), {**told, "last logged step": run.last_step, "commit": run.environment.get("commit")})


def _results(results: list[Result]) -> Iterator[str]:
    if not results:
        yield "None were measured: `tokar evaluate RUN` before the export writes them here."
    for result in results:
        yield from (f"### {result.name} (checkpoint {result.subject.get('checkpoint', 'not known')})", "")
        yield from _table(("metric", "value"), {key: f"{value:.6g}" for key, value in result.numbers.items()})
        yield from ("", f"How it was measured (protocol {result.protocol_id}):", "")
        yield from (*_table(("protocol", "value"), flatten(result.protocol)), "")


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"| {head[0]} | {head[1]} |", "|---|---|")
    for key, value in rows.items():
        if value is not None:
            place = isinstance(value, str) and "/" in value
            yield f"| {key} | {'…/' + Path(value).name if place else value} |"  # where it lay on a disk is nobody's business
