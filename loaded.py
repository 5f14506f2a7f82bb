"""What `tokar.load` gives: trained models that speak numpy.

Shapes: `B` images, `H`, `W` their pixels, `N` tokens of an image, `V` codes. Images are uint8 `[B, H, W, 3]`, codes int64
`[B, N]` in layout order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .data.stream import to_image, to_uint8
from .errors import UserError, nearest
from .evaluate.arrays import Images, class_ids_of, codes_of, in_batches, pixels_of
from .evaluate.distilled import draw_vectors
from .evaluate.samples import decode_batches, text_encoder
from .models.classifier import Classifier
from .models.distill.codebook import codebook_of
from .models.distill.distilled import Ask, Distilled
from .models.generators.base import Generator
from .models.open import OpenedDistilled, OpenedGenerator, distilled_with_tokenizer, open_model, with_tokenizer
from .models.samplers.decode import sample
from .models.samplers.guidance import OFF, Varying
from .models.samplers.reveal import Within
from .models.tokenizers.base import Tokenizer
from .models.tokenizers.layout import TokenLayout
from .models.tokenizers.vqgan import VQGAN

Pixels = NDArray[np.uint8]
Codes = NDArray[np.int64]
BATCH = 64
"""Images that pass through a network at once, when not said otherwise."""


class LoadedTokenizer:
    """Images to codes and back.

    Args:
        tokenizer: the network, on its device.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def layout(self) -> TokenLayout:
        """Number, order and grid of the tokens, image size, vocabulary."""
        return self.tokenizer.layout

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.tokenizer.parameters()).device

    def encode(self, images: Images, *, batch_size: int = BATCH) -> Codes:
        """Codes `[B, N]` int64.

        Args:
            images: uint8 `[B, H, W, 3]`, or pictures of PIL; `H` and `W` as the tokenizer takes them (`layout.image_size`).
            batch_size: images at once.

        Raises:
            UserError: other numbers than pixels, or a size that the tokenizer does not take.
        """
        pixels = pixels_of(images)

        def codes(part: Tensor) -> Tensor:
            return self.tokenizer.encode(to_image(part)).codes.long()

        return in_batches(codes, pixels, batch_size, self.device)

    def decode(self, codes: ArrayLike | Tensor, *, tokens: int | None = None, batch_size: int = BATCH) -> Pixels:
        """Images uint8 `[B, H, W, 3]`.

        Args:
            codes: integers `[B, N]`.
            tokens: decode from the first so many tokens alone, where the layout allows it (`layout.prefix_decodable`; whole
                scales of a multi-scale one).
            batch_size: images at once.

        Raises:
            UserError: another shape, a code beyond the vocabulary, or a prefix that cannot be decoded.
        """
        checked = codes_of(codes, self.layout)
        if tokens is None:
            return self._pictures({"codes": part} for part in checked.split(batch_size))

        def image(part: Tensor) -> Tensor:
            return to_uint8(self.tokenizer.decode_partial(part, tokens))

        return in_batches(image, checked, batch_size, self.device)

    def sample(self, class_ids: Any, *, seed: int = 0, **choices: Any) -> Pixels:
        """A tokenizer alone draws nothing.

        Raises:
            UserError: always; see `LoadedGenerator.sample`.
        """
        raise UserError(
            f"a {type(self.tokenizer).__name__} turns images into codes, it draws none",
            fix="load a generator, and call its sample",
        )

    def _pictures(self, batches: Iterable[dict[str, Tensor]]) -> Pixels:
        parts = [batch["image"].numpy() for batch in decode_batches(self.tokenizer, iter(batches))]
        return np.concatenate(parts) if parts else np.zeros((0, *self.layout.image_size, 3), np.uint8)


class LoadedGenerator(LoadedTokenizer):
    """Images from classes (or texts), and through its tokenizer images to codes and back.

    Args:
        opened: generator and tokenizer, on their device.
    """

    def __init__(self, opened: OpenedGenerator) -> None:
        super().__init__(opened.tokenizer)
        self.opened, self.generator = opened, opened.generator

    @property
    def classes(self) -> list[str]:
        """Names of the classes, where the data had some."""
        return list(self.opened.facts.get("classes") or [])

    def sample(self, class_ids: Any, *, seed: int = 0, **choices: Any) -> Pixels:
        """Images uint8 `[B, H, W, 3]`: what `tokar sample` draws for these classes with this seed.

        Args:
            class_ids: see `sample_codes`.
            seed: see there.
            choices: see there: `guidance`, `temperature`, `top_k`, `top_p`, `greedy`, `given`, …

        Raises:
            UserError: see there.
        """
        return self.decode(self.sample_codes(class_ids, seed=seed, **choices), batch_size=choices.get("batch_size", BATCH))

    def sample_codes(
        self,
        class_ids: int | Sequence[int] | Sequence[str] | NDArray[Any] | Tensor,
        *,
        seed: int = 0,
        guidance: Varying = OFF,
        temperature: Varying = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        given: ArrayLike | Tensor | None = None,
        cache: bool = True,
        compile: bool = False,
        batch_size: int = BATCH,
        **within: Unpack[Within],
    ) -> Codes:
        """Codes `[B, N]` int64. Sample i depends on `seed`, i, its class and the choices below, not on the other samples.

        Args:
            class_ids: one for each sample, `[B]`, or a single one; of a generator of texts: the texts.
            seed: not negative.
            guidance: scale `s` in `u + s·(c - u)`, a number or a schedule such as `{"kind": "linear", …}`; 1: none.
            temperature: divides the logits, a number or a schedule.
            top_k: keep the k most likely tokens; 0: all.
            top_p: keep the most likely tokens up to this total probability; 1: all.
            greedy: take the most likely token instead of drawing.
            given: codes `[B, N]` or `[1, N]` that are fixed, -1 where one is to be drawn (in- and out-painting).
            cache: use the KV cache.
            compile: run the decode step through `torch.compile`, on a GPU.
            batch_size: samples at once.
            within: how a generator of blocks reveals one: `steps`, `reveal`, … (see `models.samplers.reveal.Within`).

        Raises:
            UserError: no such class, a choice out of range, or guidance that the generator was not trained for.
        """
        if unknown := sorted(set(within) - set(Within.__annotations__)):
            names = ["guidance", "temperature", "top_k", "top_p", "greedy", "given", *Within.__annotations__]
            raise UserError("no such choice", where=unknown[0], fix=nearest(unknown[0], names))
        self.opened.check_guidance(guidance)
        choices: dict[str, Any] = {
            "guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p, "greedy": greedy, "cache": cache,
            "compile": compile, **within,
        }  # fmt: skip
        conditions = self._conditions(class_ids).to(self.device)
        fixed = None if given is None else codes_of(given, self.layout, least=-1)
        codes = sample(self.generator, conditions, seed=seed, given=fixed, max_batch=batch_size, **choices)
        return codes.cpu().numpy()

    def _conditions(self, asked: Any) -> Tensor:
        if self.generator.text is None:
            return class_ids_of(asked, self.generator.num_classes)
        texts = [asked] if isinstance(asked, str) else list(asked)
        if not all(isinstance(text, str) for text in texts):
            raise UserError("this generator draws texts", where="class_ids", fix="give a list of them")
        return text_encoder(self.opened, None, self.device)(texts)


class LoadedDistilled(LoadedTokenizer):
    """Images from classes in one step or few, and through its tokenizer images to codes and back.

    Args:
        opened: a one-step student, a one-step generator or a diffusion model, and its tokenizer, on their device.
    """

    def __init__(self, opened: OpenedDistilled) -> None:
        super().__init__(opened.tokenizer)
        self.opened, self.model = opened, opened.model

    def sample(self, class_ids: Any, *, seed: int = 0, **choices: Any) -> Pixels:
        """Images uint8 `[B, H, W, 3]`: what `tokar sample` draws. Sample i depends on `seed`, i and its class alone.

        Args:
            class_ids: one for each sample, `[B]`, or a single one.
            seed: of the noise, not negative.
            choices: of a student `steps`, finished units at which its passes begin (`[0]` is one step; `None`: all that it was
                trained for); of a student or a one-step generator `split`, tokens of the first so many units become codes
                (`None`: as trained); of a diffusion model `euler`, steps of each token; of all `batch_size`.

        Raises:
            UserError: no such class, a choice of another kind of network, or a step that it was not trained for.
        """
        return self._pictures(self._drawn(class_ids, seed, **choices))

    def sample_codes(self, class_ids: Any, *, seed: int = 0, **choices: Any) -> Codes:
        """Codes `[B, N]` int64 that are nearest to what `sample` decodes; arguments as there."""
        return np.concatenate([batch["codes"].numpy() for batch in self._drawn(class_ids, seed, **choices)])

    def _drawn(
        self,
        asked: Any,
        seed: int,
        *,
        steps: Sequence[int] | None = None,
        split: int | None = None,
        euler: Varying | None = None,
        batch_size: int = BATCH,
    ) -> Iterator[dict[str, Tensor]]:
        if seed < 0:
            raise UserError("negative", where="seed", fix="use numbers from 0 on")
        labels = class_ids_of(asked, self.model.num_classes)
        ask = Ask(steps=steps, split=split, euler=euler)
        self.model.check(ask)
        return draw_vectors(self.opened, labels, ask, seed=seed, batch_size=batch_size)


class LoadedClassifier:
    """Images to classes.

    Args:
        classifier: the network, on its device.
        classes: their names.
    """

    def __init__(self, classifier: Classifier, classes: Sequence[str]) -> None:
        self.classifier, self.classes = classifier, list(classes)

    def classify(self, images: Images, *, batch_size: int = BATCH) -> NDArray[np.float32]:
        """Probability of each class, float32 `[B, classes]`.

        Args:
            images: uint8 `[B, H, W, 3]`, or pictures of PIL.
            batch_size: images at once.

        Raises:
            UserError: other numbers than pixels, or another size.
        """
        pixels, side = pixels_of(images), self.classifier.image_size
        if pixels.shape[1:3] != (side, side):
            size = f"{pixels.shape[1]}x{pixels.shape[2]}"
            raise UserError(f"{size} pixels, this classifier takes {side}x{side}", where="images", fix="resize them")

        def probabilities(part: Tensor) -> Tensor:
            return self.classifier(to_image(part)).softmax(1)

        return in_batches(probabilities, pixels, batch_size, next(self.classifier.parameters()).device)


Loaded = LoadedTokenizer | LoadedClassifier


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    ema: bool = True,
    device: str | torch.device = "cpu",
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> Loaded:
    """See `tokar.load`."""
    where, place = Path(path), None if tokenizer is None else Path(tokenizer)
    on = _device(device)
    found = open_model(where, ema=ema, family=family, config=config)
    match found.model:
        case Tokenizer() as model:
            return LoadedTokenizer(_sized(model, image_size).to(on))
        case Generator() as model:
            opened = with_tokenizer(found, where, place)
            _check_codes(model, _sized(opened.tokenizer, image_size), where)
            opened.tokenizer.to(on)
            model.to(on)
            return LoadedGenerator(opened)
        case Distilled() as model:
            distilled = distilled_with_tokenizer(found, where, place)
            _check_tokens(model, _sized(distilled.tokenizer, image_size).to(on), where)
            model.to(on)
            return LoadedDistilled(distilled)
        case Classifier() as model:
            return LoadedClassifier(model.to(on), found.facts.get("classes") or [])
    raise UserError(
        f"holds a {type(found.model).__name__}, which is no model to use",
        where=path,
        fix="load a tokenizer, a generator, a student or a classifier",
    )


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError("no such device", where=f"device={name}", fix="give cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible", where=f"device={name}", fix="give device='cpu'")
    return device


def _sized(tokenizer: Tokenizer, side: int | None) -> Tokenizer:
    """The tokenizer for images of another size, where it takes several."""
    if side is not None and tokenizer.layout.image_size != (side, side):
        if not isinstance(tokenizer, VQGAN):
            height, width = tokenizer.layout.image_size
            raise UserError(f"this tokenizer takes {height}x{width} alone", where="image_size", fix="leave it out")
        tokenizer.layout = tokenizer.layout_for((side, side))
    return tokenizer


def _check_tokens(model: Distilled, tokenizer: Tokenizer, where: Path) -> None:
    """Tokens must be as many, and as wide, as the tokenizer's."""
    own = (model.plan.n_tokens, model.embed_dim)
    its = (tokenizer.layout.total_tokens, codebook_of(tokenizer).shape[1])
    if own != its:
        raise UserError(
            f"{own[0]} tokens of width {own[1]}, but the tokenizer has {its[0]} of {its[1]}",
            where=where,
            fix="give its own tokenizer, at its own image_size",
        )


def _check_codes(model: Generator, tokenizer: Tokenizer, where: Path) -> None:
    """Codes must be as many, and as many different ones, as the tokenizer's."""
    own, its = (model.plan.n_tokens, model.vocab_size), (tokenizer.layout.total_tokens, tokenizer.layout.vocab_size)
    if own != its:
        raise UserError(
            f"{own[0]} tokens of {own[1]} codes, but the tokenizer has {its[0]} of {its[1]}",
            where=where,
            fix="give its own tokenizer, at its own image_size",
        )
