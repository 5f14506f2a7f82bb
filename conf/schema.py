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
Varying = float | dict[str, Any] | str
"""A number, or a schedule over sampling progress: `{kind: step, value: 1.75, start: 0.18}` or `"step:1.75,start=0.18"`."""
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]


class Node(BaseModel):
    """A part of the config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Paths(Node):
    """Where users' things lie."""

    datasets: Text = Field(description="prepared shards and codes")
    runs: Text = Field(description="one folder for each run")


class Data(Node):
    """A data set, how it is prepared, and how it is read while training."""

    source: Text = Field(description="digits, folders of classes, zips of them, or tars; {split} stands for each split")
    path: Text = Field(description="folder of prepared shards")
    train_split: str = Field("train", description="name of the split to learn from")
    val_split: str = Field("val", description="name of the split to measure on")
    image_size: PositiveInt = Field(description="pixels a side that the network sees")
    prepare_size: PositiveInt | None = Field(
        None, description="resize the shorter side to this when preparing; null keeps the bytes"
    )
    crop: Literal["none", "center", "random"] = Field("center", description="how image_size is cut out")
    flip: bool = Field(False, description="mirror every other image at random while training")
    decoder: Literal["auto", "simplejpeg", "pil"] = Field(
        "auto", description="of JPEG; auto takes simplejpeg where it is installed"
    )
    workers: NonNegativeInt = Field(0, description="loader processes per rank; 0 reads in the training process")


class Optim(Node):
    """AdamW or Adam, and gradient clipping."""

    name: Literal["adamw", "adam"] = "adamw"
    lr: PositiveFloat = Field(description="learning rate at its peak")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="decay of the first and second moments")
    eps: PositiveFloat = Field(1e-8, description="added to the denominator")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled (AdamW)")
    weight_decay_end: NonNegativeFloat | None = Field(
        None, description="what weight_decay moves to over the run, along half a cosine; null: it stays"
    )
    decay_vectors: bool = Field(False, description="decay biases, norms and other one-dimensional parameters too")
    clip: NonNegativeFloat = Field(1.0, description="largest gradient norm; 0 does not clip")


class ScheduleConfig(Node):
    """Learning rate over the run, as a factor of `optim.lr`."""

    kind: Literal["constant", "cosine", "linear", "wsd", "drops"] = Field("constant", description="shape after the warm-up")
    warmup: Length = Field(0, description="linear, from `first`")
    first: Fraction = Field(0.0, description="factor that the warm-up starts from")
    hold: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the run after the warm-up before linear begins to fall"
    )
    floor: Fraction = Field(0.0, description="factor at the end")
    decay: Fraction = Field(0.2, description="share of the run that wsd decays over")
    drops: list[Length] = Field([], description="when the kind drops multiplies by `drop`")
    drop: Fraction = Field(0.1, description="factor of each drop")


class Ema(Node):
    """Exponential moving average of the weights."""

    decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="share of the average that stays at each update")
    warmup: bool = Field(True, description="decay min(decay, (1+n)/(10+n)) for the first updates")


class Loop(Node):
    """How long, how often, how much."""

    duration: Length = Field(description='of the run: 2000, "2k steps", "500k samples", "3 epochs"')
    batch_size: PositiveInt = Field(description="samples per optimizer step, over all ranks")
    accumulate: PositiveInt = Field(1, description="micro-batches per rank and step")
    log_every: PositiveInt = Field(20, description="steps")
    eval_every: Length | None = Field(None, description="null: only at the end")
    sample_every: Length | None = Field(None, description="pictures while training")
    save_every: Length | None = Field(None, description="checkpoints; null: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_every: Length | None = Field(None, description="checkpoints at multiples of this are never pruned")
    eval_samples: PositiveInt = Field(1024, description="images of the validation split looked at")


class Strategy(Node):
    """How the work is spread and in what precision."""

    name: Literal["single", "ddp"] = Field("single", description="one device, or data-parallel ranks")
    devices: PositiveInt = Field(1, description="on each node")
    nodes: PositiveInt = Field(1, description="machines")
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the arithmetic; weights stay in fp32")
    compile: bool = Field(False, description="torch.compile each network")
    attention: Literal["auto", "sdpa", "flex", "flash"] = Field(
        "auto",
        description="kernel of a generator's attention; auto: flash-attn where it is installed and fits, else torch's sdpa",
    )
    channels_last: bool = Field(True, description="memory format of convolutions")
    threads: NonNegativeInt = Field(0, description="CPU threads per process; 0 leaves torch's choice")


class Wandb(Node):
    """Weights & Biases, an addition to metrics.jsonl."""

    mode: Literal["disabled", "offline", "online"] = Field("disabled", description="offline keeps the files in the run folder")
    project: str = Field("tokar", description="as W&B calls it")
    entity: str | None = Field(None, description="user or team; null takes W&B's default")
    tags: list[str] = Field([], description="labels of the run")


class Logger(Node):
    """Where metrics go besides metrics.jsonl."""

    progress: bool = Field(True, description="bar and lines while training")
    wandb: Wandb


class Spine(Node):
    """What every training stage has."""

    stage: str
    experiment: str | None = Field(None, description="set by the experiment file")
    name: Text | None = Field(None, description="run folder; null derives it from experiment and overrides")
    seed: NonNegativeInt = Field(0, description="of weights, order and augmentation")
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
    label_smoothing: Fraction = Field(0.0, description="probability spread over the other classes")
    shift: NonNegativeInt = Field(0, description="augmentation: random shift in pixels")


class Prepare(Node):
    """`tokar data prepare`."""

    stage: Literal["prepare"]
    paths: Paths
    data: Data
    splits: list[str] = Field(
        ["train", "val"], min_length=1, description="splits to write; one that the source lacks is an error"
    )
    workers: PositiveInt = Field(description="processes")
    shard_size: PositiveInt = Field(description="images per shard")
    format: Literal["keep", "png", "jpeg", "webp"] = Field("keep", description="of images written anew")
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="of JPEG and WebP")
    on_bad: Literal["skip", "fail"] = Field("skip", description="list a bad image in bad.jsonl and go on, or stop at the first")


class TextFeatures(Node):
    """A frozen encoder of captions."""

    path: Text = Field(description="folder or hub id of a T5 or CLIP of transformers")
    tokens: PositiveInt = Field(120, description="slots of a text; longer ones are cut, shorter ones padded at the left")


class Encode(Node):
    """`tokar encode`."""

    stage: Literal["encode"]
    paths: Paths
    data: Data
    model: Text = Field(description="a tokenizer run, checkpoint or exported model")
    out: Text = Field(description="folder of the code shards")
    views: Literal["one", "flip", "ten-crop"] = Field(
        "one", description="of each image: itself, with its mirror image, or five crops and their mirror images"
    )
    crop_ratio: Annotated[float, Field(ge=1)] = Field(1.1, description="ten-crop: size of the image it crops from")
    splits: list[str] = Field(["train", "val"], min_length=1, description="to encode")
    batch_size: PositiveInt = Field(64, description="images at once")
    shard_size: PositiveInt = Field(16384, description="images per shard")
    text: TextFeatures | None = Field(None, description="also the features of the captions (.txt beside each image)")
    seed: NonNegativeInt = 0
    strategy: Strategy


class Sample(Node):
    """`tokar sample`."""

    stage: Literal["sample"]
    paths: Paths
    model: Text = Field(description="a generator run, checkpoint or exported model")
    decode_with: Text | None = Field(None, description="tokenizer; null takes the one the generator was trained with")
    out: Text | None = Field(None, description="null: the samples folder of the run")
    count: PositiveInt = Field(64, description="images")
    classes: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = Field(None, description="null cycles through all")
    prompts: Annotated[list[Text], Field(min_length=1)] | Text | None = Field(
        None, description="texts to draw in turn, or a file with one on each line; for a generator of texts"
    )
    text_encoder: Text | None = Field(None, description="where it lies; null: where it lay when the captions were encoded")
    scales: Annotated[list[PositiveInt | list[PositiveInt]], Field(min_length=1)] | None = Field(
        None, description="sides of the scales to draw, other than trained on: FlexVAR; null: as trained"
    )
    given: Text | None = Field(None, description="image of which a part stays; keep or mask says which")
    keep: Literal["top", "bottom", "left", "right", "center", "border"] | None = Field(None, description="the part that stays")
    mask: Text | None = Field(None, description="image whose bright parts are drawn anew")
    seed: NonNegativeInt = Field(0, description="sample i depends on (seed, i) alone")
    batch_size: PositiveInt = Field(64, description="images at once")
    save: list[Literal["grid", "folder", "npz", "codes"]] = Field(["grid"], min_length=1, description="what to write")
    scale: PositiveInt = Field(2, description="enlargement of the grid's pictures")
    ema: bool = Field(True, description="averaged weights where there are some")
    sampling: Sampling
    strategy: Strategy


class Features(Node):
    """The feature network of a Fréchet distance."""

    name: Literal["classifier", "inception", "dinov2"] = Field("classifier", description="which network")
    path: Text | None = Field(None, description="its run or weights file")


class Probe(Node):
    """A linear classifier on frozen features."""

    tokens: Literal["latent", "quantized", "encoder"] = Field(
        "latent", description="of a tokenizer: before or after quantization, or what the convolution before it sees"
    )
    pool: Literal["mean", "concat"] = Field("mean", description="over the tokens")
    epochs: PositiveInt = Field(90, description="over the training images")
    warmup_epochs: NonNegativeInt = Field(10, description="linear, from 0")
    batch_size: PositiveInt = Field(256, description="features at once")
    lr: PositiveFloat = Field(0.1, description="of LARS at a batch of 256; scaled by the batch")
    views: PositiveInt | None = Field(None, description="augmented views of each image, reused in turn; null: one per epoch")


class Evaluate(Node):
    """`tokar evaluate`."""

    stage: Literal["evaluate"]
    paths: Paths
    target: Text = Field(description="a run, an exported model, an npz or a folder of images")
    measure: Literal["quality", "prefixes", "crops", "likelihood"] = Field(
        "quality",
        description="of a tokenizer also: images from the first tokens alone; details and text, for the report; of a generator "
        "also: bits of held-out codes",
    )
    draws: Annotated[int, Field(ge=2)] = Field(
        4, description="measure=likelihood: of the bound of each image (block diffusion)"
    )
    probe: Probe | None = Field(None, description="probe=linear: measure how much of the class the tokens tell")
    data: Data | None = None
    split: Text | None = Field(None, description="reference; null: validation for a tokenizer, training for samples")
    decode_with: Text | None = Field(None, description="tokenizer; null takes the one the generator was trained with")
    features: Features
    judge: Text | None = Field(None, description="classifier run that judges classes; null takes features.path of a classifier")
    count: PositiveInt | None = Field(None, description="images; null takes the whole reference split")
    batch_size: PositiveInt = Field(64, description="images at once")
    seed: NonNegativeInt = Field(0, description="of the samples")
    ema: bool = Field(True, description="averaged weights where there are some")
    lpips_weights: Text | None = Field(None, description="file with VGG16 and linear-head weights; null leaves LPIPS out")
    sampling: Sampling | None = Field(None, description="null: as the run samples")
    strategy: Strategy
    out: Text | None = Field(None, description="null: the evaluation folder of the run")


class Bench(TokenizerParts):
    """`tokar bench`."""

    stage: Literal["bench"]
    paths: Paths
    data: Data
    generator: Component
    sampling: Sampling
    strategy: Strategy
    grid: tuple[PositiveInt, PositiveInt] = Field(description="token grid of the generator")
    num_classes: PositiveInt = Field(description="of the generator")
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
    "generator": frozenset({"vocab_size", "num_classes", "grid", "n_tokens", "grids", "embed_dim"}),
    "classifier": frozenset({"image_size", "num_classes"}),
    "bench": frozenset({"vocab_size", "num_classes", "grid", "n_tokens", "grids", "embed_dim"}),
}
"""Constructor arguments that a stage reads off its data and tokenizer, so configs leave them out."""
