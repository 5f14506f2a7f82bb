"""The typed schema of every command's config: what keys there are, their types and ranges.

Component nodes (`_target_: tokar.…`) are checked against the signature of what they name, see signature.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from .duration import Duration


def _duration(value: Any) -> Any:
    Duration.parse(value)
    return value


def _component(value: dict[str, Any]) -> dict[str, Any]:
    if "_target_" not in value:
        raise ValueError("needs a _target_; choose an option of this group")
    return value


Length = Annotated[int | float | str, AfterValidator(_duration)]
"""A duration: `2000` (steps), `"500k samples"`, `"3 epochs"`."""
Component = Annotated[dict[str, Any], AfterValidator(_component)]
"""A node with `_target_`."""
Varying = float | dict[str, Any]
"""A number, or a schedule over sampling progress (`{kind: step, value: 1.75, start: 0.18}`)."""
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]


class Node(BaseModel):
    """A part of the config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Paths(Node):
    """Where users' things lie."""

    datasets: Text
    runs: Text


class Data(Node):
    """A data set, how it is prepared, and how it is read while training."""

    source: Text = Field(description="digits, a class folder, a zip of class folders, or WebDataset tars")
    path: Text = Field(description="folder of prepared shards")
    train_split: str = "train"
    val_split: str = "val"
    image_size: PositiveInt
    prepare_size: PositiveInt | None = Field(
        None, description="resize the shorter side to this when preparing; null keeps the bytes"
    )
    crop: Literal["none", "center", "random"] = "center"
    flip: bool = False
    decoder: Literal["auto", "simplejpeg", "pil"] = "auto"
    workers: NonNegativeInt = Field(0, description="loader processes per rank; 0 reads in the training process")


class Optim(Node):
    """AdamW or Adam, and gradient clipping."""

    name: Literal["adamw", "adam"] = "adamw"
    lr: PositiveFloat
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    decay_vectors: bool = Field(False, description="decay biases, norms and other one-dimensional parameters too")
    clip: NonNegativeFloat = Field(1.0, description="largest gradient norm; 0 does not clip")


class ScheduleConfig(Node):
    """Learning rate over the run, as a factor of `optim.lr`."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup: Length = 0
    floor: Fraction = Field(0.0, description="factor at the end")
    decay: Fraction = Field(0.2, description="share of the run that wsd decays over")


class Ema(Node):
    """Exponential moving average of the weights."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    warmup: bool = Field(True, description="decay min(decay, (1+n)/(10+n)) for the first updates")


class Loop(Node):
    """How long, how often, how much."""

    duration: Length
    batch_size: PositiveInt = Field(description="samples per optimizer step, over all ranks")
    accumulate: PositiveInt = Field(1, description="micro-batches per rank and step")
    log_every: PositiveInt = 20
    eval_every: Length | None = None
    sample_every: Length | None = Field(None, description="pictures while training")
    save_every: Length | None = None
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_every: Length | None = Field(None, description="checkpoints at multiples of this are never pruned")
    eval_samples: PositiveInt = 1024


class Strategy(Node):
    """How the work is spread and in what precision."""

    name: Literal["single", "ddp"] = "single"
    devices: PositiveInt = 1
    nodes: PositiveInt = 1
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    channels_last: bool = True
    threads: NonNegativeInt = Field(0, description="CPU threads per process; 0 leaves torch's choice")


class Wandb(Node):
    """Weights & Biases, an addition to metrics.jsonl."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "tokar"
    entity: str | None = None
    tags: list[str] = []


class Logger(Node):
    """Where metrics go besides metrics.jsonl."""

    progress: bool = True
    wandb: Wandb


class Spine(Node):
    """What every training stage has."""

    stage: str
    experiment: str | None = Field(None, description="set by the experiment file")
    name: Text | None = Field(None, description="run folder; null derives it from experiment and overrides")
    seed: NonNegativeInt = 0
    paths: Paths
    data: Data
    optim: Optim
    schedule: ScheduleConfig
    ema: Ema | None
    loop: Loop
    strategy: Strategy
    logger: Logger
    resume_from: Text | None = Field(None, description="run or checkpoint to go on from when this run has none of its own")
    init_from: Text | None = Field(None, description="run, checkpoint or exported model whose weights to start from")


class TokenizerLosses(Node):
    """Weights of the tokenizer's losses."""

    reconstruction: Literal["l1", "l2"] = "l2"
    reconstruction_weight: NonNegativeFloat = 1.0
    perceptual_weight: NonNegativeFloat = 0.0
    lpips_weights: Text | None = Field(None, description="file with VGG16 and linear-head weights")
    adversarial: Literal["hinge", "non-saturating"] = "hinge"
    adversarial_weight: NonNegativeFloat = 0.5
    adversarial_start: Length = 0
    adaptive: bool = Field(False, description="scale the adversarial weight by the ratio of last-layer gradients")


class TokenizerRun(Spine):
    """`tokar train tokenizer`."""

    stage: Literal["tokenizer"]
    tokenizer: Component
    discriminator: Component | None
    discriminator_optim: Optim
    losses: TokenizerLosses


class Codes(Node):
    """Codes on disk, or made on the fly."""

    path: Text | None = Field(description="folder of code shards; null encodes images on the fly")
    tokenizer: Text | None = Field(description="run or exported model of the tokenizer that made the codes")


class Sampling(Node):
    """How codes are drawn from a generator."""

    guidance: Varying = 1.0
    temperature: Varying = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    greedy: bool = False
    cache: bool = True


class GeneratorRun(Spine):
    """`tokar train generator`."""

    stage: Literal["generator"]
    codes: Codes
    generator: Component
    class_dropout: Fraction = Field(0.1, description="share of samples trained without their class")
    sampling: Sampling


class ClassifierRun(Spine):
    """`tokar train classifier`."""

    stage: Literal["classifier"]
    classifier: Component
    label_smoothing: Fraction = 0.0
    shift: NonNegativeInt = Field(0, description="augmentation: random shift in pixels")


class Prepare(Node):
    """`tokar data prepare`."""

    stage: Literal["prepare"]
    paths: Paths
    data: Data
    splits: list[str] = Field(["train", "val"], description="splits to write; one that the source lacks is an error")
    workers: PositiveInt = Field(description="processes")
    shard_size: PositiveInt = Field(description="images per shard")
    format: Literal["keep", "png", "jpeg", "webp"] = "keep"
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    on_bad: Literal["skip", "fail"] = "skip"


class Encode(Node):
    """`tokar encode`."""

    stage: Literal["encode"]
    paths: Paths
    data: Data
    model: Text = Field(description="a tokenizer run, checkpoint or exported model")
    out: Text
    views: Literal["one", "flip", "ten-crop"] = "one"
    crop_ratio: Annotated[float, Field(ge=1)] = Field(1.1, description="ten-crop: size of the image it crops from")
    splits: list[str] = ["train", "val"]
    batch_size: PositiveInt = 64
    shard_size: PositiveInt = 16384
    seed: NonNegativeInt = 0
    strategy: Strategy


class Sample(Node):
    """`tokar sample`."""

    stage: Literal["sample"]
    paths: Paths
    model: Text = Field(description="a generator run, checkpoint or exported model")
    decode_with: Text | None = Field(None, description="tokenizer; null takes the one the generator was trained with")
    out: Text | None = Field(None, description="null: the samples folder of the run")
    count: PositiveInt = 64
    classes: list[NonNegativeInt] | None = None
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 64
    save: list[Literal["grid", "folder", "npz", "codes"]] = ["grid"]
    scale: PositiveInt = 2
    ema: bool = True
    sampling: Sampling
    strategy: Strategy


class Features(Node):
    """The feature network of a Fréchet distance."""

    name: Literal["classifier", "inception", "dinov2"] = "classifier"
    path: Text | None = None


class Evaluate(Node):
    """`tokar evaluate`."""

    stage: Literal["evaluate"]
    paths: Paths
    target: Text = Field(description="a run, an exported model, an npz or a folder of images")
    data: Data | None = None
    split: Text | None = Field(None, description="reference; null: validation for a tokenizer, training for samples")
    features: Features
    judge: Text | None = Field(None, description="classifier run that judges classes; null takes features.path of a classifier")
    count: PositiveInt | None = Field(None, description="images; null takes the whole reference split")
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    ema: bool = True
    lpips_weights: Text | None = None
    sampling: Sampling | None = None
    strategy: Strategy
    out: Text | None = None


class Bench(Node):
    """`tokar bench`."""

    stage: Literal["bench"]
    paths: Paths
    data: Data
    tokenizer: Component
    discriminator: Component | None
    losses: TokenizerLosses
    generator: Component
    optim: Optim
    sampling: Sampling
    strategy: Strategy
    grid: tuple[PositiveInt, PositiveInt] = Field(description="token grid of the generator")
    num_classes: PositiveInt
    batch_size: PositiveInt = Field(description="of training steps")
    sample_batch: PositiveInt = Field(description="of sampling")
    seconds: PositiveFloat = Field(description="measured for each row, after a warm-up")
    out: Text = Field(description="JSON file")


SCHEMAS: dict[str, type[Node]] = {
    "tokenizer": TokenizerRun,
    "generator": GeneratorRun,
    "classifier": ClassifierRun,
    "prepare": Prepare,
    "encode": Encode,
    "sample": Sample,
    "evaluate": Evaluate,
    "bench": Bench,
}
FILLED: dict[str, frozenset[str]] = {
    "tokenizer": frozenset(),
    "generator": frozenset({"vocab_size", "num_classes", "grid", "n_tokens"}),
    "classifier": frozenset({"image_size", "num_classes"}),
    "bench": frozenset({"vocab_size", "num_classes", "grid", "n_tokens"}),
}
"""Constructor arguments that a stage reads off its data and tokenizer, so configs leave them out."""
