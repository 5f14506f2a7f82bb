"""The schema of each training stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from .nodes import Component, Length, Node, Text, Varying
from .spine import Optim, Spine


class TokenizerLosses(Node):
    """Weights of the tokenizer's losses."""

    reconstruction: Literal["l1", "l2"] = Field("l2", description="distance of pixels")
    reconstruction_weight: NonNegativeFloat = Field(1.0, description="of the pixel loss")
    perceptual_weight: NonNegativeFloat = Field(0.0, description="of LPIPS, which needs lpips_weights")
    lpips_weights: Text | None = Field(None, description="file with VGG16 and linear-head weights")
    convnext_weight: NonNegativeFloat = Field(0.0, description="of the distance of ConvNeXt's logits; needs convnext_path")
    convnext_path: Text | None = Field(None, description="folder or hub id of a ConvNeXt classifier of transformers")
    adversarial: Literal["hinge", "non_saturating"] = Field("hinge", description="loss of the discriminator")
    adversarial_generator: Literal["hinge", "non_saturating"] | None = Field(
        None, description="loss of the generator; null takes the discriminator's"
    )
    adversarial_weight: NonNegativeFloat = Field(0.5, description="of the generator's adversarial loss")
    adversarial_start: Length = Field(0, description="the discriminator rests before")
    adversarial_warmup: Length = Field(0, description="from its start the adversarial weight rises linearly for so long")
    adaptive: bool = Field(False, description="scale the adversarial weight by the ratio of last-layer gradients")
    r1_weight: NonNegativeFloat = Field(0.0, description="γ/2: of the discriminator's squared gradient on real images")
    r1_every: PositiveInt = Field(1, description="R1 at every so many steps, weighted as much higher (StyleGAN2: 16)")
    lecam_weight: NonNegativeFloat = Field(0.0, description="of LeCam, which keeps logits near the other kind's average")
    lecam_decay: Fraction = Field(0.999, description="of LeCam's averages")
    auxiliary_end: Length = Field(0, description="end of the tokenizer's early losses (GigaTok's shortcut and feature loss)")


class Semantic(Node):
    """Semantic regularization: the tokenizer's projected features follow a frozen teacher's."""

    teacher: Component
    weight: NonNegativeFloat = Field(0.5, description="of the cosine loss")


class TokenizerParts(Node):
    """What the tokenizer stage is made of."""

    tokenizer: Component
    discriminator: Component | None
    losses: TokenizerLosses
    semantic: Semantic | None = Field(None, description="a teacher that the features follow")
    optim: Optim
    discriminator_optim: Optim


class TokenizerRun(TokenizerParts, Spine):
    """`tokar train tokenizer`."""

    stage: Literal["tokenizer"]


class Codes(Node):
    """Codes on disk, or made on the fly."""

    path: Text | None = Field(description="folder of code shards; null encodes images on the fly")
    tokenizer: Text | None = Field(description="run or exported model of the tokenizer that made the codes")


class Sampling(Node):
    """How codes are drawn from a generator."""

    guidance: Varying = Field(1.0, description="s in u + s·(c − u)")
    temperature: Varying = Field(1.0, description="divides the logits")
    top_k: NonNegativeInt = Field(0, description="keep the k likeliest codes; 0 keeps all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="keep the likeliest codes that make up this probability"
    )
    greedy: bool = Field(False, description="always the likeliest code")
    cache: bool = Field(True, description="keep keys and values; false recomputes them (slow, for comparison)")
    compile: bool = Field(False, description="torch.compile the decode step; worth it for many samples on a GPU")
    steps: Varying | None = Field(None, description="block diffusion: steps in each block or sub-block; null: one a token")
    reveal: Literal["confidence", "threshold", "maskgit", "first_hitting", "entropy", "adaptive"] | None = Field(
        None, description="block diffusion: which tokens each step reveals; null: confidence"
    )
    pace: Literal["uniform", "cosine"] | None = Field(
        None, description="block diffusion: equally many tokens a step, or few first; null: cosine for maskgit, else uniform"
    )
    threshold: Fraction | None = Field(
        None, description="reveal=threshold or adaptive: confidence from which on a token is revealed; null: 0.9"
    )
    reveal_noise: NonNegativeFloat | None = Field(
        None, description="reveal=maskgit: Gumbel noise on the log of confidence, fading to 0; null: 4.5"
    )
    entropy_budget: NonNegativeFloat | None = Field(
        None, description="reveal=entropy: sum of a step's entropies, adaptive: how far it may rise; nats; null: 0.35"
    )
    sub_block: PositiveInt | None = Field(
        None, description="block diffusion: tokens of the parts of a block that are finished one by one; null: the whole block"
    )
    sub_block_cache: bool = Field(
        False, description="compute a sub-block alone after its first step, the rest of its block as it was then (approximate)"
    )


class StudentSampling(Node):
    """How a network that was distilled from a generator is asked; each kind knows some of these and refuses the others."""

    steps: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = Field(
        None, description="DD1: finished units at which its passes begin: [0] is one step; null: all that it was trained for"
    )
    split: NonNegativeInt | None = Field(
        None,
        description="tokens of the first so many units become codes, others stay vectors; null: as trained (DD1), all (DD2)",
    )
    teacher: Text | None = Field(None, description="generator that helps, drawing as sampling says; for keep or redraw")
    keep: NonNegativeInt | None = Field(
        None, description="DD1: units that stay of the first pass; the teacher draws from there to the last step's beginning"
    )
    redraw: PositiveInt | None = Field(None, description="DD2: last units that the teacher draws anew, one step each")
    euler: Varying | None = Field(
        None, description="diffusion model: Euler steps of each token, also 'ramp:5,first=50' (DiSA); null: 10"
    )
    compile: bool | None = Field(None, description="DD1, DD2: torch.compile the pass, worth it for many samples; null: no")


class Contrast(Node):
    """Condition contrastive alignment (CCA): a trained generator learns to do without guidance."""

    reference: Text = Field(description="the generator run it begins with and is compared with; its averaged weights")
    beta: PositiveFloat = Field(0.02, description="β: of the log-likelihood ratio of an image")
    weight: NonNegativeFloat = Field(
        description="λ: of images under another class; VAR d16, d20 50, d24 100; LlamaGen B 1000, L 300"
    )


class Adapt(Node):
    """A trained next-token generator learns to read vectors in the place of codes, which DD2 asks of a teacher."""

    reference: Text = Field(description="the generator run it begins with; its averaged weights")
    hidden: PositiveInt = Field(1024, description="of the layer that reads vectors")
    fit_steps: NonNegativeInt = Field(1000, description="to fit that layer to the table of codes, before training begins")


class GeneratorRun(Spine):
    """`tokar train generator`."""

    stage: Literal["generator"]
    codes: Codes
    generator: Component
    class_dropout: Fraction = Field(0.1, description="share of samples trained without their class")
    contrast: Contrast | None = Field(None, description="fine-tune a trained generator by CCA in the place of its likelihood")
    adapt: Adapt | None = Field(None, description="fine-tune a trained next-token generator to read vectors, by its likelihood")
    sampling: Sampling


class StudentShape(Node):
    """What a one-step student learns of a trajectory; units are scales (VAR) or tokens (LlamaGen)."""

    timesteps: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        description="finished units from which it learns to go to the end: 0, and perhaps one for a second step"
    )
    split: NonNegativeInt = Field(description="tokens of the first so many units become codes, the others stay vectors")


class DistillLosses(Node):
    """Weights of the student's losses beside the cross-entropy, whose weight is 1."""

    vector_weight: NonNegativeFloat = Field(1.0, description="of the squared distance of predicted vectors to the codes")
    perceptual_weight: NonNegativeFloat = Field(0.0, description="of LPIPS between decoded images, which needs lpips_weights")
    lpips_weights: Text | None = Field(None, description="file with VGG16 and linear-head weights")


class TaughtRun(Spine):
    """What every distillation has."""

    model: Text = Field(description="the teacher: a generator run, checkpoint or exported model")
    decode_with: Text | None = Field(None, description="its tokenizer; null takes the one it was trained with")
    pairs: Text | None = Field(description="folder of `tokar distill pairs`; null draws them while training")
    count: PositiveInt = Field(100_000, description="pairs=null: how many there are")
    sampling: Sampling


class DistillRun(TaughtRun):
    """`tokar train distill`."""

    stage: Literal["distill"]
    student: StudentShape
    losses: DistillLosses


class ScoredRun(TaughtRun):
    """What both stages of DD2 have: tokens are noised, and scores compared there."""

    draws: PositiveInt = Field(4, description="noises of each token in a step (MAR: 4)")
    level_power: PositiveFloat = Field(
        1.0, description="levels of noise are u**power: above 1 more low ones, where codes differ"
    )
    chunk: PositiveInt | None = Field(None, description="tokens whose scores are computed at once; null: all")


class DiffusionRun(ScoredRun):
    """`tokar train diffusion`."""

    stage: Literal["diffusion"]
    width: PositiveInt = Field(1024, description="of the network that moves one token")
    depth: PositiveInt = Field(3, description="its residual blocks")
    hidden: PositiveInt = Field(1024, description="next-token teachers of codes: of the layer that reads vectors")
    fit_steps: NonNegativeInt = Field(1000, description="next-token teachers of codes: steps to fit that layer to their table")
    steps: Varying = Field(10, description="Euler steps of each token when it draws, a number or a schedule over the image")
    head_only: bool = Field(False, description="train the new head alone; the backbone stays the teacher's (DD2's first phase)")


class DD2Run(ScoredRun):
    """`tokar train dd2`."""

    stage: Literal["dd2"]
    diffusion: Text = Field(description="run of `tokar train diffusion`: where both networks begin")
    after: Text | None = Field(None, description="a dd2 run to go on from: its averaged generator and its fake score network")
    generator_rests: Length = Field(0, description="the generator's first update comes after so long (DD2's alignment: 8000)")
    fake_updates: PositiveInt = Field(5, description="updates of the fake score network for each of the generator")
    fake_optim: Optim
    form: Literal["sid", "dmd"] = Field("sid", description="of the distillation loss; dmd needs less memory")
    alpha: NonNegativeFloat = Field(1.0, description="of form=sid")
    score_weight: NonNegativeFloat = Field(
        1.0, description="of the distillation loss; 0: none, the fake score network waits, the generator moves at every step"
    )
    pair_weight: NonNegativeFloat = Field(
        0.0, description="of the squared distance from a pair's noise, in one step, to its tokens (DMD's regression; DD2: none)"
    )


class ClassifierRun(Spine):
    """`tokar train classifier`."""

    stage: Literal["classifier"]
    classifier: Component
    label_smoothing: Fraction = Field(0.0, description="probability spread over the other classes")
    shift: NonNegativeInt = Field(0, description="augmentation: random shift in pixels")
