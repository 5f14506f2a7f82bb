"""Images from what was distilled from a generator: one-step students and generators, diffusion models, with a teacher's help.

Shapes: `N` samples, `B` of one batch, `T` tokens of an image, `D` code width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..conf.stages import Sampling, StudentSampling
from ..data.pairs import pair_noise
from ..errors import UserError
from ..models.build import weights_hash
from ..models.distill.codebook import codebook_of, nearest
from ..models.distill.distilled import HELPED, Ask, Helper, check_help
from ..models.generators.base import Generator
from ..models.open import OpenedDistilled, open_generator
from ..models.samplers.decode import Tally


def ask_of(
    student: StudentSampling, opened: OpenedDistilled, sampling: Sampling, *, seed: int, tokenizer: Path | None = None
) -> Ask:
    """How a distilled network is to be asked, its teacher opened on the same device.

    Args:
        student: what the config says.
        opened: the network and its tokenizer.
        sampling: of the teacher.
        seed: of the teacher's draws.
        tokenizer: where the tokenizer lies now; `None`: where it lay while training.

    Raises:
        UserError: options of another kind of network, help without a teacher, or a teacher that does not fit.
    """
    choices = student.model_dump(exclude={"teacher"})
    ask = Ask(**choices)
    opened.model.check(ask)
    if student.teacher is None:
        check_help(ask)
        return ask
    if not any(choices[name] is not None for name in HELPED):
        able = [f"student.{name}=…" for name in HELPED if name in opened.model.knows]
        fix = f"say so with {able[0]}" if able else "leave it out: this network has no use for one"
        raise UserError("a teacher that is to help with nothing", where="student.teacher", fix=fix)
    teacher = _open_teacher(Path(student.teacher), opened, sampling, tokenizer)
    return Ask(**choices, teacher=Helper(teacher, seed, sampling.model_dump()))


def _open_teacher(path: Path, opened: OpenedDistilled, sampling: Sampling, tokenizer: Path | None) -> Generator:
    found = open_generator(path, tokenizer=tokenizer)
    if found.generator.plan != opened.model.plan or weights_hash(found.tokenizer) != weights_hash(opened.tokenizer):
        raise UserError(
            "is a generator of other tokens", where=f"student.teacher={path}", fix="give the teacher it learned from"
        )
    found.check_guidance(sampling.guidance)
    return found.generator.to(next(opened.model.parameters()).device)


@torch.inference_mode()
def draw_vectors(
    opened: OpenedDistilled,
    labels: Tensor,
    ask: Ask,
    *,
    seed: int,
    batch_size: int,
    numbers: np.ndarray | None = None,
    on_batch: Callable[[int], None] | None = None,
    tally: Tally | None = None,
) -> Iterator[dict[str, Tensor]]:
    """What a distilled network makes of `labels [N]`: `vectors [B, T, D]`, nearest `codes [B, T]`, `label`, on the CPU.

    Sample i depends on (seed, i) and its class alone; the noise is that of pair i of the same seed.

    Args:
        opened: network and tokenizer, on one device.
        labels: `[N]`.
        ask: how.
        seed: of the noise.
        batch_size: samples at once.
        numbers: of the samples `[N]`; `None`: 0, 1, ….
        on_batch: told the number of samples after each batch.
        tally: is told what it cost.
    """
    device, layout = next(opened.model.parameters()).device, opened.tokenizer.layout.to_dict()
    codebook = codebook_of(opened.tokenizer)
    numbers = np.arange(len(labels)) if numbers is None else numbers
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        ids = torch.from_numpy(numbers[start : start + len(part)])
        noise = torch.from_numpy(pair_noise(seed, ids.numpy(), layout)).to(device)
        vectors = opened.model.draw(noise, part.to(device), codebook, ask, ids, tally)
        if on_batch is not None:
            on_batch(len(part))
        yield {"vectors": vectors.cpu(), "codes": nearest(vectors, codebook).cpu(), "label": part}
