"""`tokar sample`: codes and images from a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..conf.compose import Composed
from ..conf.schema import Sample
from ..conf.stages import StudentSampling
from ..data.files import check_place, os_errors, whole_file
from ..data.progress import progress_bar
from ..errors import UserError
from ..evaluate.console import say
from ..evaluate.distilled import ask_of, draw_vectors
from ..evaluate.images import save_folder, save_grid, save_npz
from ..evaluate.samples import Texts, class_ids, decode_batches, draw_codes, text_encoder
from ..evaluate.speed import Laps, clocked
from ..models.build import pick_device
from ..models.open import OpenedGenerator, holds_distilled, open_distilled, open_generator
from ..models.samplers.decode import Tally
from ..models.tokenizers.base import Tokenizer
from .paint import canvas

GRID_LIMIT = 1024
"""Pictures in one grid: more is no picture any more."""


def sample(composed: Composed) -> int:
    """Draw `count` samples and write them as asked: a grid, a folder of PNGs, an npz, the codes."""
    config: Sample = composed.typed
    if "grid" in config.save and config.count > GRID_LIMIT:
        raise UserError(
            f"{config.count} pictures do not fit one grid", where="save", fix=f"set count={GRID_LIMIT}, or save=[npz]"
        )
    out = Path(config.out) if config.out else samples_folder(Path(config.model))
    check_place(out)
    device = pick_device(config.strategy.accelerator)
    tally, laps = Tally(), Laps()
    draw = _draw_distilled if holds_distilled(Path(config.model)) else _draw_generator
    with progress_bar(None, config.count, "sampling") as advance:
        tokenizer, num_classes, drawn = draw(config, device, advance, tally)
        batches = list(clocked(drawn, laps, device))  # codes are small; pictures are decoded as each file is written
    speed, cost = 1 / laps.seconds_per_image, tally.per_image
    calls, evaluations = f"{cost['network_calls']:g} network calls", f"{cost['evaluations']:g} evaluations"
    say(f"{config.count} images at {speed:.1f} a second, {calls} ({evaluations}) each")
    for path in _write(config, tokenizer, num_classes, batches, out):
        say(str(path))
    return 0


Drawn = tuple[Tokenizer, int, Iterator[dict[str, Tensor]]]
"""Tokenizer, number of classes, batches to be drawn."""


def _draw_generator(config: Sample, device: torch.device, advance: Callable[[int], None], tally: Tally) -> Drawn:
    if config.student != StudentSampling():
        raise UserError("is of what was distilled, this is a generator", where="student", fix="leave it out; see sampling")
    place = Path(config.decode_with) if config.decode_with else None
    opened = open_generator(Path(config.model), tokenizer=place, ema=config.ema)
    opened.tokenizer.to(device)
    opened, given = canvas(config, opened, device)
    opened.check_guidance(config.sampling.guidance)
    drawn = draw_codes(
        opened.generator.to(device), _conditions(config, opened, device), seed=config.seed,
        sampling={**config.sampling.model_dump(), "given": given}, batch_size=config.batch_size, on_batch=advance, tally=tally,
    )  # fmt: skip
    return opened.tokenizer, opened.generator.num_classes, drawn


def _draw_distilled(config: Sample, device: torch.device, advance: Callable[[int], None], tally: Tally) -> Drawn:
    for key in ("prompts", "given", "scales"):
        if getattr(config, key) is not None:
            raise UserError("what was distilled cannot", where=key, fix="leave it out, or sample its teacher")
    place = Path(config.decode_with) if config.decode_with else None
    opened = open_distilled(Path(config.model), tokenizer=place, ema=config.ema)
    opened.model.to(device)
    opened.tokenizer.to(device)
    drawn = draw_vectors(
        opened, class_ids(config.count, config.classes, opened.model.num_classes),
        ask_of(config.student, opened, config.sampling, seed=config.seed, tokenizer=place), seed=config.seed,
        batch_size=config.batch_size, on_batch=advance, tally=tally,
    )  # fmt: skip
    return opened.tokenizer, opened.model.num_classes, drawn


def _conditions(config: Sample, opened: OpenedGenerator, device: torch.device) -> Tensor | Texts:
    """Of `count` samples: classes or texts, in turn."""
    if opened.generator.text is None:
        if config.prompts is not None:
            raise UserError("this generator knows classes, not texts", where="prompts", fix="give classes=[…] instead")
        return class_ids(config.count, config.classes, opened.generator.num_classes)
    if config.classes is not None or config.prompts is None:
        raise UserError(
            "this generator draws texts", where="classes" if config.classes else "prompts", fix="give prompts=[…], or a file"
        )
    prompts = read_prompts(config.prompts)
    encoder = text_encoder(opened, config.text_encoder, device)
    return Texts(encoder, [prompts[index % len(prompts)] for index in range(config.count)])


def read_prompts(prompts: list[str] | str) -> list[str]:
    """A list as it is, or the lines of a file.

    Raises:
        UserError: no such file, or nothing in it.
    """
    if not isinstance(prompts, str):
        return prompts
    path = Path(prompts)
    if not path.is_file():
        raise UserError("no such file", where=f"prompts={prompts}", fix="write prompts=[a text,another], or a file of lines")
    with os_errors(path):
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError("no text in it", where=path, fix="write one prompt on each line")
    return lines


def samples_folder(model: Path) -> Path:
    """The samples folder of the run that `model` lies in, or one beside an exported model."""
    run = next((folder for folder in [model, *model.parents] if (folder / "config.yaml").is_file()), model)
    return run / "samples"


def _write(config: Sample, tokenizer: Tokenizer, num_classes: int, batches: list[dict[str, Tensor]], out: Path) -> list[Path]:
    written = []
    if "grid" in config.save:
        images = torch.cat([batch["image"] for batch in decode_batches(tokenizer, batches)])
        prompts = config.prompts if isinstance(config.prompts, list) else None
        classes = len(prompts or config.classes or range(num_classes))
        columns = classes if 1 < classes <= 20 else None  # one class a column, where that is readable
        written.append(save_grid(images, out / "samples.png", columns, config.scale))
    if "folder" in config.save:
        written.append(save_folder(decode_batches(tokenizer, batches), out / "images"))
    if "npz" in config.save:
        written.append(save_npz(decode_batches(tokenizer, batches), out / "samples.npz", config.count))
    if "codes" in config.save:
        written.append(_save_codes(torch.cat([batch["codes"] for batch in batches]), out / "codes.npy"))
    return written


def _save_codes(codes: Tensor, path: Path) -> Path:
    import numpy as np

    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.save(file, codes.numpy())
    return path
