"""The schema of what every training run has: data, optimizer, schedule, loop, strategy, logger."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from .nodes import Length, Node, Text


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
    save_async: bool = Field(True, description="write checkpoints while training goes on")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_every: Length | None = Field(None, description="checkpoints at multiples of this are never pruned")
    eval_samples: PositiveInt = Field(1024, description="images of the validation split looked at")


class Guard(Node):
    """What happens when a step goes wrong, or does not end."""

    spike: PositiveFloat | None = Field(
        None,
        description="skip a step whose loss lies so many spreads above its running mean; null: only what is not finite. "
        "Losses that may jump, as when a discriminator starts, want null",
    )
    warmup: PositiveInt = Field(100, description="good steps before the first spike is told")
    patience: PositiveInt = Field(
        3, description="so many skipped steps in a row take the run back to its last checkpoint from before them"
    )
    rollbacks: NonNegativeInt = Field(
        3, description="how often in a row a run goes back without getting past the place; then it stops"
    )
    hang_after: PositiveFloat | None = Field(
        480.0,
        description="seconds without a step after which a run that hangs reports all ranks' stacks and ends; "
        "ten times that around evaluations, pictures, checkpoints and the first step; null: never",
    )


class Strategy(Node):
    """How the work is spread and in what precision."""

    name: Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"] = Field(
        "single",
        description="one device; whole networks on every rank; shards of everything by FSDP2; or by DeepSpeed's ZeRO shards of "
        "moments, gradients too, weights too",
    )
    devices: PositiveInt = Field(1, description="on each node")
    nodes: PositiveInt = Field(1, description="machines")
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = Field(
        "fp32",
        description="of products and convolutions; weights stay in fp32; fp16 scales the loss; fp8: linear layers, by "
        "torchao, the rest in bf16",
    )
    compile: bool = Field(False, description="torch.compile each repeated unit of a network")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activation checkpointing: units keep their inputs, or also the results of products and attention, and "
        "compute the rest again in the backward pass",
    )
    attention: Literal["auto", "sdpa", "flex", "flash"] = Field(
        "auto",
        description="kernel of a generator's attention; auto: flash-attn where it is installed and fits, else torch's sdpa",
    )
    channels_last: bool = Field(True, description="memory format of convolutions; single and ddp only")
    offload: Literal["none", "optimizer"] = Field(
        "none", description="zero2 and zero3 on GPUs: moments and masters in host memory"
    )
    reshard: bool = Field(
        True, description="fsdp: free a unit's weights after its forward; false gathers once, for more memory"
    )
    persistent: NonNegativeInt = Field(100_000, description="zero3: parameters of fewer elements stay on every rank")
    bucket_mib: PositiveInt = Field(25, description="gradients that ranks exchange at once, MiB")
    backend: Literal["auto", "nccl", "gloo"] = Field("auto", description="between ranks; auto: nccl for GPUs, else gloo")
    timeout: PositiveInt = Field(1800, description="seconds after which ranks that wait for one another give up")
    threads: NonNegativeInt = Field(0, description="CPU threads per process; 0 leaves torch's choice")


class Profile(Node):
    """Windows of steps under torch's profiler; traces and tables go to the run's folder profile/."""

    start: NonNegativeInt = Field(10, description="steps before the first window")
    steps: NonNegativeInt = Field(0, description="length of a window; 0: none, and no share of communication in timing.jsonl")
    every: PositiveInt | None = Field(None, description="steps from one window's start to the next; null: only one window")
    memory: bool = Field(False, description="allocations and shapes too")
    ranks: PositiveInt = Field(1, description="the first so many ranks write theirs")


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
    guard: Guard
    strategy: Strategy
    logger: Logger
    profile: Profile
    resume_from: Text | None = Field(None, description="run or checkpoint to go on from when this run has none of its own")
    init_from: Text | None = Field(None, description="run, checkpoint or exported model whose weights to start from")
