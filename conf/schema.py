"""The typed schema of every command's config: what keys there are, their types and ranges.

Here the commands that do not train; `spine.py` and `stages.py` hold training, `nodes.py` what all are made of.
Component nodes (`_target_: tokar.…`) are checked against the signature of what they name, see signature.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..ranges import NonNegativeInt, PositiveFloat, PositiveInt
from .nodes import Component, Node, Text
from .protocols import FeatureName, Protocol
from .slurm import Slurm
from .spine import Data, Paths, Strategy
from .stages import (
    ClassifierRun,
    DD2Run,
    DiffusionRun,
    DistillRun,
    GeneratorRun,
    Sampling,
    StudentSampling,
    TokenizerParts,
    TokenizerRun,
)
from .sweeps import SweepCommand


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
    student: StudentSampling = Field(StudentSampling(), description="of what was distilled; sampling is then its teacher's")
    strategy: Strategy


class Pairs(Node):
    """`tokar distill pairs`."""

    stage: Literal["pairs"]
    paths: Paths
    model: Text = Field(description="the teacher: a generator run, checkpoint or exported model")
    decode_with: Text | None = Field(None, description="its tokenizer; null takes the one it was trained with")
    out: Text = Field(description="folder of the pairs")
    count: PositiveInt = Field(description="pairs to learn from")
    val_count: PositiveInt = Field(2000, description="pairs held out")
    seed: NonNegativeInt = Field(0, description="pair i depends on (seed, i) alone")
    solver: Literal["dpm", "heun", "euler"] = Field("dpm", description="of the flow: DPM-Solver++(2M), Heun, Euler")
    solver_steps: PositiveInt = Field(100, description="of the solver, uniform in time")
    fused: bool = Field(False, description="torch.compile each step of the solver; worth it on a GPU")
    batch_size: PositiveInt = Field(64, description="pairs at once")
    shard_size: PositiveInt = Field(16384, description="pairs per shard")
    ema: bool = Field(True, description="averaged weights where there are some")
    sampling: Sampling
    strategy: Strategy


class Features(Node):
    """The feature network of a Fréchet distance."""

    name: FeatureName | None = Field(None, description="which network; null: the protocol's, else classifier")
    path: Text | None = Field(None, description="its run, folder or weights file")
    sha256: Text | None = Field(
        None, description="inception: hash of a weights file other than the published one, which is refused without"
    )


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


class Measured(Node):
    """What every measurement of images says: against what, by whom, where."""

    paths: Paths
    data: Data | None = None
    split: Text | None = Field(None, description="reference; null: validation for a tokenizer, training for samples")
    decode_with: Text | None = Field(None, description="tokenizer; null takes the one the generator was trained with")
    features: Features
    judge: Text | None = Field(None, description="classifier run that judges classes; null takes features.path of a classifier")
    batch_size: PositiveInt = Field(64, description="images at once")
    seed: NonNegativeInt = Field(0, description="of the samples")
    ema: bool = Field(True, description="averaged weights where there are some")
    sampling: Sampling | None = Field(None, description="null: as the run samples")
    strategy: Strategy


class Evaluate(Measured):
    """`tokar evaluate`."""

    stage: Literal["evaluate"]
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
    text_encoder: Text | None = Field(None, description="of captions; null: where it lay when they were encoded")
    protocol: Protocol | None = Field(
        None, description="protocol=gfid-50k and others of conf/protocol; null: features.name decides"
    )
    reference: Text | None = Field(
        None, description="npz with mu and sigma, npz or folder of images; null: the reference split of data"
    )
    captions: Text | None = Field(
        None, description="clip_score: file with one caption a line, image after image; null: those of the reference split"
    )
    count: PositiveInt | None = Field(None, description="images; null takes the whole reference split")
    lpips_weights: Text | None = Field(None, description="file with VGG16 and linear-head weights; null leaves LPIPS out")
    student: StudentSampling = Field(StudentSampling(), description="of what was distilled; sampling is then its teacher's")
    save_every: PositiveInt = Field(2048, description="images of a rank after which what it has is saved, to go on from")
    statistics: Text | None = Field(
        None, description="npz to write mean and covariance of the samples' features to: a reference of later evaluations"
    )
    out: Text | None = Field(None, description="null: the evaluation folder of the run")

    @property
    def dealt(self) -> bool:
        """Whether its images are dealt to ranks, and gone on with after an interruption; other measures run in one process."""
        return self.probe is None and self.measure == "quality"


class Compare(Measured):
    """`tokar distill compare`."""

    stage: Literal["compare"]
    model: Text = Field(description="the teacher: a generator run, checkpoint or exported model")
    student: Text | None = Field(None, description="run of `tokar train distill`; null: none to compare")
    dd2: Text | None = Field(None, description="run of `tokar train dd2` (or diffusion); null: none to compare")
    skip: PositiveInt | None = Field(None, description="units that the teacher leaves out at the end; null: half of them")
    keep: NonNegativeInt | None = Field(
        None, description="units of the student's first step that stay when the teacher helps; null: half of those of its last"
    )
    count: PositiveInt = Field(2000, description="samples of each; fewer than some hundreds of a class tell little of pairs")
    groups: Annotated[int, Field(ge=2)] = Field(8, description="of codes, between which pairs of tokens are counted")
    turns: Annotated[int, Field(ge=5)] = Field(9, description="timed calls of each at either batch; the median counts")
    out: Text | None = Field(None, description="folder; null: the evaluation folder of the student's run")


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
    profile: bool = Field(False, description="also trace each row with torch's profiler, into profile/ beside the JSON file")
    out: Text = Field(description="JSON file")


class Estimate(Node):
    """`tokar estimate`: the machine and the data that a training is planned for."""

    stage: Literal["estimate"]
    device: Text = Field(description="a GPU by name: b200, h200, h100, h100 pcie, a100, a100 40gb, l40s, l4, a10, v100, t4")
    memory_gib: PositiveFloat | None = Field(None, description="of a device; null: as the table of GPUs says")
    tflops: PositiveFloat | None = Field(None, description="TFLOP/s of products at best; null: as the table says")
    mfu: Annotated[float, Field(gt=0, le=1)] = Field(description="share of the peak that the networks reach")
    link_gbs: PositiveFloat | None = Field(None, description="GB/s that a GPU sends within its node; null: as the table says")
    network_gbs: PositiveFloat = Field(description="GB/s that a GPU sends to other nodes")
    fill: Annotated[float, Field(gt=0, le=1)] = Field(description="share of the memory that tensors may take")
    codes_of: Text | None = Field(None, description="experiment of the tokenizer; null: named by codes.tokenizer")
    num_classes: PositiveInt = Field(description="of the data")


SCHEMAS: dict[str, type[Node]] = {
    "tokenizer": TokenizerRun,
    "generator": GeneratorRun,
    "classifier": ClassifierRun,
    "distill": DistillRun,
    "diffusion": DiffusionRun,
    "dd2": DD2Run,
    "prepare": Prepare,
    "encode": Encode,
    "sample": Sample,
    "pairs": Pairs,
    "evaluate": Evaluate,
    "compare": Compare,
    "bench": Bench,
    "estimate": Estimate,
    "slurm": Slurm,
    "sweep": SweepCommand,
}
FILLED: dict[str, frozenset[str]] = {
    "tokenizer": frozenset(),
    "generator": frozenset({"vocab_size", "num_classes", "grid", "n_tokens", "grids", "embed_dim"}),
    "classifier": frozenset({"image_size", "num_classes"}),
    "bench": frozenset({"vocab_size", "num_classes", "grid", "n_tokens", "grids", "embed_dim"}),
}
"""Constructor arguments that a stage reads off its data and tokenizer, so configs leave them out."""
