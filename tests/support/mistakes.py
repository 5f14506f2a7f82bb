"""The table of mistakes that users make, with the command that then must say so (tests/integration/test_mistakes.py)."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spoil import (
    add_key,
    append,
    archive,
    both,
    cut,
    edit,
    flip_bytes,
    folder,
    images,
    later_format,
    lock,
    move,
    no_room,
    not_a_number,
    pickled,
    picture,
    remove,
    replace_result,
    run,
    statistics,
    tar,
    tensors,
    write,
)
from text_encoders import write_t5

TOKENIZER = "tokar train tokenizer experiment=digits_vqgan name=tok $TINY"
GENERATOR = "tokar train generator experiment=digits_llamagen name=gen $TINY"
JUDGE = "tokar train classifier experiment=digits_classifier name=judge $TINY"
PREPARE = "tokar data prepare workers=1 shard_size=1000"
ENCODE = "tokar encode runs/tok out=datasets/digits-codes shard_size=1000"
OTHER = TOKENIZER.replace("=tok ", "=two ") + " seed=1"
PAIRS = "tokar distill pairs runs/gen out=datasets/pairs count=64 val_count=16 solver_steps=10 sampling.guidance=2"
STUDENT = "tokar train distill experiment=dd1_digits name=stu model=runs/gen pairs=datasets/pairs $TINY"
DIFFUSION = "tokar train diffusion experiment=diffusion_digits name=dif model=runs/gen pairs=datasets/pairs fit_steps=9 $TINY"
FIRST = (PREPARE, TOKENIZER, OTHER, ENCODE, GENERATOR, JUDGE, PAIRS, STUDENT, DIFFUSION)
"""What went well before each mistake."""

NEW_TOKENIZER, NEW_GENERATOR = TOKENIZER.replace("=tok ", "=new "), GENERATOR.replace("=gen ", "=new ")
NEW_STUDENT = STUDENT.replace("=stu ", "=new ")
DD2 = "tokar train dd2 experiment=dd2_digits name=new model=runs/gen diffusion=runs/dif after=null pairs=null $TINY"
TWIN = run(GENERATOR.replace("=gen ", "=twin ") + " seed=1")
OF_OTHER_CODES = run(GENERATOR.replace("=gen ", "=far ") + " codes.path=null codes.tokenizer=runs/two")
NEWEST, OLDER = "runs/tok/checkpoints/step-00000004", "runs/tok/checkpoints/step-00000002"
GEN = "runs/gen/checkpoints/step-00000004/generator"
SHARD, VAL_SHARD = "datasets/digits/train/shard-000000.tar", "datasets/digits/val/shard-000000.tar"
CODES = "datasets/digits-codes/train"
STARTED = ("runs/tok/environment.json", "runs/tok/config.yaml", "runs/tok/code.patch")
"""A run that is started writes down that it was."""


@dataclass(frozen=True)
class Mistake:
    """One row.

    Args:
        happened: what was done wrong, in a few words.
        command: as typed; `$TINY` is expanded.
        spoil: makes it so, in the working directory; what it returns is closed when the command has ended.
        code: exit code.
        makes: beginnings of the paths that the command may make or change all the same.
    """

    happened: str
    command: str
    spoil: Callable[[], object] | None = None
    code: int = 2
    makes: tuple[str, ...] = ()


OF_TEXTS = (
    "tokar train generator experiment=digits_llamagen +generator.condition.dim=128 "
    "+generator.condition._target_=tokar.models.generators.conditions.TextCondition"
)
CHECK = "tokar config check"
VQGAN, LLAMAGEN = "tokenizer experiment=digits_vqgan", "generator experiment=digits_llamagen"
SMALLER = "tokenizer.encoder.multipliers=[1,1,2]"

MISTAKES: dict[str, tuple[Mistake, ...]] = {
    "Commands and config": (
        Mistake("a misspelt command", "tokar trian tokenizer"),
        Mistake("a misspelt second word", "tokar train tokeniser"),
        Mistake("an option that there is not", "tokar train tokenizer --learning-rate=1e-3"),
        Mistake("an argument left out", "tokar sample"),
        Mistake("a misspelt key", f"{CHECK} {VQGAN} optim.lrr=1e-3"),
        Mistake("a misspelt key behind +", f"{CHECK} {VQGAN} +optim.lrr=1e-3"),
        Mistake("a misspelt key of a network", f"{CHECK} {LLAMAGEN} generator.layer=8"),
        Mistake("a misspelt group", f"{CHECK} {VQGAN} strategi=ddp"),
        Mistake("a misspelt option of a group", f"{CHECK} {VQGAN} optim=adamv"),
        Mistake("a misspelt experiment", f"{CHECK} tokenizer experiment=digits_vqgann"),
        Mistake("a group of another stage", f"{CHECK} {VQGAN} generator=llamagen_b"),
        Mistake("an experiment of another stage", "tokar train generator experiment=digits_vqgan"),
        Mistake("what must be given is missing", "tokar train tokenizer"),
        Mistake("several mistakes at once", f"{CHECK} {VQGAN} optim.lr=fast seed=-1 loop.batchsize=8"),
        Mistake("text for a number", f"{CHECK} {VQGAN} optim.lr=fast"),
        Mistake("out of range", f"{CHECK} {VQGAN} optim.betas=[0.9,1.5]"),
        Mistake("a list too short", f"{CHECK} {VQGAN} optim.betas=[0.9]"),
        Mistake("no such choice", f"{CHECK} {VQGAN} data.crop=centre"),
        Mistake("a codebook without codes", f"{CHECK} {VQGAN} tokenizer.quantizer.codebook_size=0"),
        Mistake("a value where a network is wanted", f"{CHECK} {VQGAN} tokenizer.quantizer=8"),
        Mistake("not a duration", f"{CHECK} {VQGAN} 'loop.duration=3 weeks'"),
        Mistake("no value", f"{CHECK} {VQGAN} optim.lr"),
        Mistake("a key that must not be null", f"{CHECK} {VQGAN} loop.batch_size=null"),
        Mistake("an unknown name in ${…}", f"{CHECK} {VQGAN} 'data.path=${{paths.data}}/digits'"),
        Mistake("a deleted key that there is not", f"{CHECK} {VQGAN} ~optim.lrr"),
        Mistake("a sweep without -m", "tokar train tokenizer experiment=digits_vqgan optim.lr=1e-3,3e-4"),
        Mistake("a sweep with one bad point", "tokar train tokenizer experiment=digits_vqgan -m optim.lr=1e-3,-1"),
        Mistake(
            "a sweep of one misspelt key and another",
            "tokar sweep classifier experiment=digits_classifier sweep.cuont=3 optim.lrr=1,2",
        ),
        Mistake("a point of a sweep that cannot be", "tokar sweep classifier experiment=digits_classifier optim.lr=1e-3,-1"),
        Mistake("a sweep in which nothing varies", "tokar sweep classifier experiment=digits_classifier seed=1"),
        Mistake("a grid over an interval", "tokar sweep classifier experiment=digits_classifier 'optim.lr=interval(0,1)'"),
        Mistake("a sweep whose points are one run", "tokar sweep classifier experiment=digits_classifier data.workers=0,1"),
        Mistake(
            "a grid that should prune", "tokar sweep classifier experiment=digits_classifier seed=0,1 sweep/pruning=median"
        ),
        Mistake(
            "a sweep on a cluster that is not named",
            "tokar sweep classifier experiment=digits_classifier seed=0,1 sweep.backend=slurm",
        ),
        Mistake(
            "a metric that does not say what is better",
            "tokar sweep classifier experiment=digits_classifier seed=0,1 sweep.metric=val/x",
        ),
        Mistake("no sweep here", "tokar sweep status runs"),
        Mistake("a key of Hydra without -m", f"{CHECK} {VQGAN} hydra/launcher=submitit_slurm"),
        Mistake("one device and two", f"{CHECK} {VQGAN} strategy=single strategy.devices=2"),
        Mistake("fp16 on a CPU", f"{CHECK} {VQGAN} strategy.accelerator=cpu strategy.precision=fp16"),
        Mistake("LPIPS without weights", f"{CHECK} {VQGAN} losses.perceptual_weight=1"),
        Mistake("LPIPS weights that are not there", f"{CHECK} {VQGAN} losses.perceptual_weight=1 losses.lpips_weights=vgg.pt"),
        Mistake("an adaptive weight without discriminator", f"{CHECK} {VQGAN} discriminator=null losses.adaptive=true"),
        Mistake("ConvNeXt's logits without ConvNeXt", f"{CHECK} {VQGAN} losses.convnext_weight=0.1"),
        Mistake("LeCam without discriminator", f"{CHECK} {VQGAN} discriminator=null losses.lecam_weight=0.1"),
        Mistake("more micro-batches than samples", f"{CHECK} {VQGAN} loop.batch_size=4 loop.accumulate=8"),
        Mistake("codes from nowhere", f"{CHECK} {LLAMAGEN} codes.path=null"),
        Mistake("heads that do not divide the width", "tokar train generator experiment=digits_llamagen generator.heads=3"),
        Mistake(
            "encoder and decoder that do not meet",
            "tokar train tokenizer experiment=digits_vqgan tokenizer.decoder.multipliers=[1,2]",
        ),
        Mistake(
            "a discriminator too deep for the images", "tokar train tokenizer experiment=digits_vqgan discriminator.layers=4"
        ),
        Mistake(
            "a teacher for a tokenizer without semantic features",
            "tokar train tokenizer experiment=digits_vqgan semantic=classifier semantic.teacher.path=runs/judge",
        ),
        Mistake("a speed that is not measured", "tokar bench loaders"),
    ),
    "Data": (
        Mistake("a source that is not there", "tokar data prepare data=imagenet256 data.source=photos"),
        Mistake("a misspelt bundled source", "tokar data prepare data.source=digit data.path=datasets/new"),
        Mistake("an empty folder as source", "tokar data prepare data.source=photos data.path=datasets/new", folder("photos")),
        Mistake(
            "images without class folders",
            "tokar data prepare data.source=photos data.path=datasets/new",
            picture("photos/cat.png"),
        ),
        Mistake(
            "text as source", "tokar data prepare data.source=photos.txt data.path=datasets/new", write("photos.txt", "cats")
        ),
        Mistake(
            "a broken zip as source",
            "tokar data prepare data.source=photos.zip data.path=datasets/new",
            write("photos.zip", "PK"),
        ),
        Mistake(
            "no usable image in the source",
            "tokar data prepare data.source=photos data.path=datasets/new splits=[train]",
            write("photos/train/cat/1.png", "not a picture"),
            makes=("datasets/new",),
        ),
        Mistake(
            "a broken image, and on_bad=fail",
            "tokar data prepare data.source=photos data.path=datasets/new splits=[train] on_bad=fail",
            both(picture("photos/train/cat/0.png"), write("photos/train/cat/1.png", "not a picture")),
            makes=("datasets/new",),
        ),
        Mistake("a split that the source lacks", "tokar data prepare data.path=datasets/new splits=[train,test]"),
        Mistake("other settings in a prepared folder", "tokar data prepare data.prepare_size=16 shard_size=1000"),
        Mistake("not prepared", "tokar train tokenizer experiment=digits_vqgan data=cifar10"),
        Mistake("a split not prepared", "tokar train tokenizer experiment=digits_vqgan", remove("datasets/digits/val")),
        Mistake(
            "an interrupted preparation",
            "tokar train tokenizer experiment=digits_vqgan",
            remove("datasets/digits/train/manifest.json"),
        ),
        Mistake(
            "a truncated manifest", "tokar train tokenizer experiment=digits_vqgan", cut("datasets/digits/train/manifest.json")
        ),
        Mistake("a missing shard", "tokar train tokenizer experiment=digits_vqgan", remove(SHARD)),
        Mistake("a truncated shard", "tokar train tokenizer experiment=digits_vqgan", cut(SHARD)),
        Mistake(
            "a shard of another preparation",
            "tokar train tokenizer experiment=digits_vqgan",
            both(remove(SHARD), lambda: shutil.copy(VAL_SHARD, SHARD)),
        ),
        Mistake("a damaged image in a shard", "tokar evaluate runs/tok", flip_bytes(VAL_SHARD, 0.3, 3000)),
        Mistake("a shard that changed, looked at", "tokar data verify datasets/digits", flip_bytes(SHARD, 0.5), code=1),
        Mistake(
            "a damaged image, found by a loader process",
            "tokar train classifier experiment=digits_classifier data.workers=1 loop.duration=300 name=new",
            flip_bytes(SHARD, 0.5),
            makes=("runs/new/",),
        ),
        Mistake(
            "tars without labels for a classifier",
            "tokar train classifier experiment=digits_classifier data.path=tars",
            both(tar("tars/train/0.tar", a="", b=""), tar("tars/val/0.tar", a="", b="")),
            makes=("tars/",),
        ),
        Mistake(
            "tars where one label is missing",
            "tokar train classifier experiment=digits_classifier data.path=tars",
            both(tar("tars/train/0.tar", a="0", b=""), tar("tars/val/0.tar", a="0", b="1")),
            makes=("tars/",),
        ),
        Mistake(
            "tars with labels in words",
            "tokar train classifier experiment=digits_classifier data.path=tars",
            both(tar("tars/train/0.tar", a="cat", b="dog"), tar("tars/val/0.tar", a="cat", b="dog")),
        ),
        Mistake(
            "images of another size, and crop none",
            "tokar train tokenizer experiment=digits_vqgan data.image_size=16 name=new loop.duration=1",
            makes=("runs/new",),
        ),
        Mistake(
            "an image size that the stride does not divide", "tokar train tokenizer experiment=digits_vqgan data.image_size=36"
        ),
        Mistake(
            "an image size that TiTok's patches do not fill",
            "tokar train tokenizer tokenizer=titok data=digits data.image_size=36 loop.duration=1 loop.batch_size=2",
        ),
        Mistake("tokenizer and data of two sizes", "tokar train tokenizer experiment=digits_vqgan tokenizer.image_size=64"),
        Mistake("a folder without shards, looked at", "tokar data inspect datasets"),
        Mistake("a folder that is not there, verified", "tokar data verify datasets/digit"),
    ),
    "Checkpoints and runs": (
        Mistake(
            "the newest checkpoint is damaged",
            TOKENIZER,
            cut(f"{NEWEST}/tokenizer/model.safetensors"),
            code=0,
            makes=("runs/tok/",),
        ),
        Mistake(
            "a file of the newest checkpoint is gone",
            TOKENIZER,
            remove(f"{NEWEST}/tokenizer/optim.safetensors"),
            code=0,
            makes=("runs/tok/",),
        ),
        Mistake(
            "bytes of the newest checkpoint changed",
            TOKENIZER,
            flip_bytes(f"{NEWEST}/tokenizer/model.safetensors", 0.5),
            code=0,
            makes=("runs/tok/",),
        ),
        Mistake(
            "the newest checkpoint is half written",
            TOKENIZER,
            move(NEWEST, "runs/tok/checkpoints/.step-00000004.77"),
            code=0,
            makes=("runs/tok/",),
        ),
        Mistake(
            "every checkpoint is damaged",
            TOKENIZER,
            both(cut(f"{NEWEST}/state.json"), cut(f"{OLDER}/state.json")),
            makes=STARTED,
        ),
        Mistake(
            "weights that changed on disk, sampled from", "tokar sample runs/gen", flip_bytes(f"{GEN}/ema.safetensors", 0.5)
        ),
        Mistake("a damaged average to sample from", "tokar sample runs/gen", cut(f"{GEN}/ema.safetensors")),
        Mistake("a damaged model config", "tokar encode runs/tok out=datasets/new", cut(f"{NEWEST}/tokenizer/config.json")),
        Mistake("a damaged state", "tokar encode runs/tok out=datasets/new", cut(f"{NEWEST}/state.json", 0.3)),
        Mistake("a checkpoint of a later version", TOKENIZER, later_format(NEWEST), makes=STARTED),
        Mistake("another config in the run folder", TOKENIZER + " optim.lr=1e-3"),
        Mistake("another stage in the run folder", TOKENIZER.replace("name=tok", "name=gen")),
        Mistake("a run folder in use", TOKENIZER, lock("runs/tok/.lock")),
        Mistake("a config.yaml that is not YAML", TOKENIZER, write("runs/tok/config.yaml", "a: [1")),
        Mistake("a config.yaml cut to nothing", TOKENIZER, write("runs/tok/config.yaml", "")),
        Mistake("a damaged environment.json", TOKENIZER, cut("runs/tok/environment.json"), code=0, makes=("runs/tok/",)),
        Mistake(
            "resume_from a run without checkpoint",
            f"{NEW_TOKENIZER} resume_from=runs/empty",
            folder("runs/empty"),
            makes=("runs/new/",),
        ),
        Mistake("resume_from a path that is not there", f"{NEW_TOKENIZER} resume_from=runs/tik", makes=("runs/new/",)),
        Mistake("resume_from another stage", f"{NEW_TOKENIZER} resume_from=runs/gen", makes=("runs/new/",)),
        Mistake("resume_from another network", f"{NEW_TOKENIZER} resume_from=runs/tok {SMALLER}", makes=("runs/new/",)),
        Mistake(
            "resume_from a run without averages",
            f"{NEW_GENERATOR} resume_from=runs/plain",
            run(GENERATOR.replace("=gen ", "=plain ") + " ema=null"),
            makes=("runs/new/",),
        ),
        Mistake(
            "resume_from a run with one network more",
            f"{NEW_TOKENIZER} resume_from=runs/tok discriminator=null",
            makes=("runs/new/",),
        ),
        Mistake("a learning rate far too high", f"{NEW_TOKENIZER} optim.lr=1e9", makes=("runs/new/",)),
        Mistake("no room for a checkpoint", NEW_TOKENIZER, no_room(1_000_000), makes=("runs/new/",)),
        Mistake("init_from wrong shapes", f"{NEW_TOKENIZER} init_from=runs/tok {SMALLER}", makes=("runs/new/",)),
        Mistake("init_from another kind of model", f"{NEW_TOKENIZER} init_from=runs/gen", makes=("runs/new/",)),
        Mistake("init_from a path that is not there", f"{NEW_TOKENIZER} init_from=runs/tik", makes=("runs/new/",)),
        Mistake(
            "init_from corrected in the same folder",
            f"{NEW_TOKENIZER} init_from=runs/tok",
            run(f"{NEW_TOKENIZER} init_from=runs/tik"),
            makes=("runs/new/",),
            code=0,
        ),
    ),
    "Paths": (
        Mistake(
            "runs below a file", "tokar train tokenizer experiment=digits_vqgan paths.runs=notes/runs", write("notes", "x")
        ),
        Mistake(
            "a file where the run folder should be",
            "tokar train tokenizer experiment=digits_vqgan name=notes",
            write("runs/notes", "x"),
        ),
        Mistake("data sets below a file", "tokar data prepare paths.datasets=notes/data", write("notes", "x")),
        Mistake("codes below a file", "tokar encode runs/tok out=notes/codes", write("notes", "x")),
        Mistake("samples below a file", "tokar sample runs/gen out=notes/samples count=1", write("notes", "x")),
        Mistake("numbers below a file", "tokar evaluate runs/judge out=notes/numbers", write("notes", "x")),
        Mistake("a report below a file", "tokar report runs/tok --out notes/report.html", write("notes", "x")),
        Mistake("a picture below a file", "tokar data inspect datasets/digits --picture notes/digits.png", write("notes", "x")),
        Mistake("a model below a file", "tokar export runs/tok notes/model", write("notes", "x")),
        Mistake("a benchmark below a file", "tokar bench loader seconds=0.01 out=notes/b.json", write("notes", "x")),
        Mistake(
            "a converted model below a file",
            "tokar convert runs/tok notes/model.safetensors --family llamagen_vq",
            write("notes", "x"),
        ),
        Mistake("a model folder that is not empty", "tokar export runs/tok runs/gen"),
        Mistake("an original onto a folder", "tokar convert runs/tok runs/gen --family llamagen_vq"),
        Mistake("an original without a name", "tokar convert runs/tok"),
        Mistake("a run that is not there", "tokar encode runs/tik"),
        Mistake("a run that has not saved yet", "tokar sample runs/new", write("runs/new/config.yaml", "stage: generator")),
        Mistake("a report on what is no run", "tokar report datasets"),
        Mistake("a report on what is not there", "tokar report runs/tik"),
        Mistake("an evaluation of what is not there", "tokar evaluate runs/tik"),
        Mistake("a tokenizer as generator", "tokar sample runs/tok"),
        Mistake("a generator as tokenizer", "tokar encode runs/gen"),
        Mistake("a file as a run", "tokar sample notes", write("notes", "x")),
        Mistake("the tokenizer is gone", "tokar sample runs/gen", remove("runs/tok")),
        Mistake(
            "the tokenizer was trained again",
            "tokar sample runs/gen decode_with=runs/two count=1",
        ),
        Mistake("evaluation without the tokenizer", "tokar evaluate runs/gen features.path=runs/judge", remove("runs/tok")),
    ),
    "Codes": (
        Mistake("codes that are not there", "tokar train generator experiment=digits_llamagen codes.path=datasets/coeds"),
        Mistake("codes whose tokenizer is gone", NEW_GENERATOR, remove("runs/tok"), code=0, makes=("runs/new",)),
        Mistake(
            "codes of another tokenizer",
            "tokar train generator experiment=digits_llamagen codes.tokenizer=runs/two",
        ),
        Mistake(
            "codes of another layout",
            "tokar train generator experiment=digits_llamagen codes.tokenizer=runs/new",
            run(f"{NEW_TOKENIZER} {SMALLER}"),
        ),
        Mistake(
            "codes of two tokenizers in one folder",
            "tokar encode runs/two out=datasets/digits-codes shard_size=1000",
        ),
        Mistake("codes encoded otherwise in one folder", "tokar encode runs/tok out=datasets/digits-codes shard_size=500"),
        Mistake("codes not finished", "tokar train generator experiment=digits_llamagen", remove(f"{CODES}/manifest.json")),
        Mistake("a truncated code shard", "tokar train generator experiment=digits_llamagen", cut(f"{CODES}/codes-000000.npy")),
        Mistake(
            "a damaged code shard",
            "tokar train generator experiment=digits_llamagen name=new loop.duration=30",
            flip_bytes(f"{CODES}/codes-000000.npy", 0.5),
            makes=("runs/new",),
        ),
        Mistake(
            "a damaged header of a code shard",
            "tokar train generator experiment=digits_llamagen name=new loop.duration=30",
            flip_bytes(f"{CODES}/codes-000000.npy", 0.0),
            makes=("runs/new",),
        ),
        Mistake(
            "damaged labels of a code shard",
            "tokar train generator experiment=digits_llamagen name=new loop.duration=30",
            flip_bytes(f"{CODES}/labels-000000.npy", 0.0),
            makes=("runs/new",),
        ),
        Mistake(
            "a truncated manifest of codes", "tokar train generator experiment=digits_llamagen", cut(f"{CODES}/manifest.json")
        ),
        Mistake("images instead of codes", "tokar train generator experiment=digits_llamagen codes.path=datasets/digits"),
        Mistake("codes instead of images", "tokar train tokenizer experiment=digits_vqgan data.path=datasets/digits-codes"),
        Mistake("an image size that is not the tokenizer's", "tokar encode runs/tok data.image_size=64 out=datasets/new"),
        Mistake("a split that is not prepared", "tokar encode runs/tok splits=[train,test] out=datasets/new"),
        Mistake(
            "a generator on the fly with another image size",
            "tokar train generator experiment=digits_llamagen codes.path=null codes.tokenizer=runs/tok data.image_size=16",
        ),
        Mistake("a grid that is not the codes'", "tokar train generator experiment=digits_llamagen +generator.grid=[8,8]"),
        Mistake("a row for codes on a grid", "tokar train generator experiment=digits_llamagen +generator.n_tokens=16"),
        Mistake(
            "next-scale on a tokenizer of one scale",
            "tokar train generator generator=var_small data=digits codes.path=datasets/digits-codes loop.duration=1 "
            "loop.batch_size=2",
        ),
        Mistake(
            "heads that 2-D rotary positions cannot turn",
            "tokar train generator experiment=digits_llamagen generator.dim=108 generator.heads=6",
        ),
        Mistake("an odd image size", "tokar encode runs/tok data.image_size=33 out=datasets/new"),
        Mistake("a generator of texts without their features", OF_TEXTS),
        Mistake(
            "text features of another width",
            OF_TEXTS,
            both(
                edit(f"{CODES}/manifest.json", text={"path": "t5", "tokens": 77, "features": 768}),
                edit(f"{CODES.replace('train', 'val')}/manifest.json", text={"path": "t5", "tokens": 77, "features": 768}),
            ),
        ),
        Mistake("a condition of another width", f"{OF_TEXTS} generator.dim=64"),
        Mistake("no text encoder", "tokar encode runs/tok text=t5 text.path=models/t5 out=datasets/new"),
        Mistake(
            "captions that are not there",
            "tokar encode runs/tok text=t5 text.path=t5 text.tokens=6 out=datasets/new",
            lambda: write_t5(Path("t5")),
        ),
    ),
    "Distillation": (
        Mistake("pairs of another guidance into the same folder", PAIRS.replace("guidance=2", "guidance=3")),
        Mistake("pairs of a tokenizer", PAIRS.replace("runs/gen", "runs/tok")),
        Mistake("a student of another guidance than its pairs", f"{NEW_STUDENT} sampling.guidance=1.5"),
        Mistake("a student of another teacher than its pairs", f"{NEW_STUDENT} model=runs/twin", TWIN),
        Mistake("a student of another codebook", f"{NEW_STUDENT} decode_with=runs/two"),
        Mistake("pairs of another codebook", NEW_STUDENT, edit("datasets/pairs/train/manifest.json", tokenizer_hash="0" * 64)),
        Mistake("codes of images for pairs", f"{NEW_STUDENT} pairs=datasets/digits-codes"),
        Mistake("a step from behind the last token", f"{NEW_STUDENT} student.timesteps=[0,16]"),
        Mistake("a step that the student was not trained for", "tokar sample runs/stu student.steps=[0,3]"),
        Mistake("the same, measured", "tokar evaluate runs/stu features.path=runs/judge student.steps=[0,3]"),
        Mistake("an option of DD2 for a student of DD1", "tokar sample runs/stu student.redraw=2"),
        Mistake("options of a student for a generator", "tokar sample runs/gen student.steps=[0]"),
        Mistake("help without a teacher", "tokar sample runs/stu student.keep=2"),
        Mistake("a teacher with nothing to do", "tokar sample runs/stu student.teacher=runs/gen"),
        Mistake("a teacher with nothing left to do", "tokar sample runs/stu student.teacher=runs/gen student.keep=5"),
        Mistake("a tokenizer that is to help", "tokar sample runs/stu student.teacher=runs/tok student.keep=2"),
        Mistake("help in other codes", "tokar sample runs/stu student.teacher=runs/far student.keep=2", OF_OTHER_CODES),
        Mistake("a token in no step", "tokar sample runs/dif student.euler=0"),
        Mistake("DD2 that learns from nothing", f"{DD2} score_weight=0 pair_weight=0"),
        Mistake("DD2 from a student", f"{DD2} diffusion=runs/stu"),
        Mistake("DD2 from the diffusion form of another teacher", f"{DD2} model=runs/twin", TWIN),
        Mistake(
            "the head alone in shards", "tokar config check diffusion experiment=diffusion_digits head_only=true strategy=fsdp"
        ),
        Mistake("an alignment of a tokenizer", f"{NEW_GENERATOR} +contrast.reference=runs/tok +contrast.weight=300"),
        Mistake(
            "an alignment in other codes", f"{NEW_GENERATOR} +contrast.reference=runs/far +contrast.weight=300", OF_OTHER_CODES
        ),
    ),
    "Sampling": (
        Mistake("a class that the generator does not know", "tokar sample runs/gen classes=[3,10]"),
        Mistake("a negative class", "tokar sample runs/gen classes=[-1]"),
        Mistake("no class at all", "tokar sample runs/gen classes=[]"),
        Mistake("prompts for a generator of classes", "tokar sample runs/gen 'prompts=[a red boat]'"),
        Mistake("no prompt at all", "tokar sample runs/gen prompts=[]"),
        Mistake(
            "guidance in a training run that always has the class",
            "tokar train generator experiment=digits_llamagen class_dropout=0",
        ),
        Mistake(
            "guidance of a generator that always had the class",
            "tokar sample runs/plain sampling.guidance=2",
            run(GENERATOR.replace("=gen ", "=plain ") + " class_dropout=0 sampling.guidance=1"),
        ),
        Mistake("top_p 0", "tokar sample runs/gen sampling.top_p=0"),
        Mistake("a negative top_k", "tokar sample runs/gen sampling.top_k=-5"),
        Mistake("temperature 0", "tokar sample runs/gen sampling.temperature=0"),
        Mistake("an unknown guidance schedule", "tokar sample runs/gen 'sampling.guidance={kind: cosinus, value: 2}'"),
        Mistake("guidance in words", "tokar sample runs/gen sampling.guidance=strong"),
        Mistake("a guidance schedule without value", "tokar sample runs/gen 'sampling.guidance={kind: step}'"),
        Mistake("too many pictures for a grid", "tokar sample runs/gen count=5000"),
        Mistake("an unknown form", "tokar sample runs/gen save=[gif]"),
        Mistake("no room for the samples", "tokar sample runs/gen save=[npz]", no_room(50_000)),
        Mistake("no form at all", "tokar sample runs/gen save=[]"),
        Mistake("text instead of a list", "tokar sample runs/gen save=npz"),
        Mistake("nothing to draw", "tokar sample runs/gen count=0"),
        Mistake(
            "guidance schedule in a training run",
            "tokar train generator experiment=digits_llamagen sampling.guidance=strong name=new loop.duration=1",
            makes=("runs/new",),
        ),
        Mistake(
            "weights that diverged",
            "tokar sample model decode_with=runs/tok",
            both(run("tokar export runs/gen model"), not_a_number("model/model.safetensors")),
        ),
    ),
    "Evaluation": (
        Mistake("no weights for the features", "tokar evaluate runs/gen"),
        Mistake(
            "features of another image size",
            "tokar evaluate small.npz data=digits features.path=runs/judge",
            images("small.npz", size=16),
        ),
        Mistake("a tokenizer as judge", "tokar evaluate runs/gen features.path=runs/tok count=16"),
        Mistake(
            "an npz of numbers that are not uint8",
            "tokar evaluate floats.npz data=digits features.path=runs/judge",
            images("floats.npz", "float32"),
        ),
        Mistake(
            "a truncated npz",
            "tokar evaluate images.npz data=digits features.path=runs/judge",
            both(images("images.npz"), cut("images.npz")),
        ),
        Mistake(
            "an npz without images",
            "tokar evaluate images.npz data=digits features.path=runs/judge",
            archive("images.npz", **{"labels.npy": b""}),
        ),
        Mistake("a file that is no npz", "tokar evaluate notes data=digits features.path=runs/judge", write("notes", "x")),
        Mistake("an empty folder", "tokar evaluate pictures data=digits features.path=runs/judge", folder("pictures")),
        Mistake(
            "images of two sizes",
            "tokar evaluate pictures data=digits features.path=runs/judge",
            both(picture("pictures/0.png"), picture("pictures/1.png", 16)),
        ),
        Mistake(
            "one image is too few",
            "tokar evaluate pictures data=digits features.path=runs/judge",
            picture("pictures/0.png"),
        ),
        Mistake(
            "a broken image",
            "tokar evaluate pictures data=digits features.path=runs/judge",
            both(picture("pictures/0.png"), write("pictures/1.png", "x")),
        ),
        Mistake("images without reference data", "tokar evaluate images.npz features.path=runs/judge", images("images.npz")),
        Mistake("a reference split that is not there", "tokar evaluate runs/tok split=test"),
        Mistake("reference data that is gone", "tokar evaluate runs/tok", remove("datasets/digits")),
        Mistake(
            "Inception weights that are something else",
            "tokar evaluate runs/gen features.name=inception features.path=runs/judge",
            None,
        ),
        Mistake(
            "Inception weights of another file",
            "tokar evaluate runs/gen features.name=inception features.path=w.safetensors count=8",
            tensors("w.safetensors", a=(2,)),
        ),
        Mistake(
            "a DINOv2 folder without weights",
            "tokar evaluate runs/gen features.name=dinov2 features.path=dino count=8",
            folder("dino"),
        ),
        Mistake(
            "Inception weights other than those named",
            "tokar evaluate runs/gen features.name=inception features.path=w.safetensors features.sha256=00 count=8",
            tensors("w.safetensors", a=(2,)),
        ),
        Mistake("a protocol that is not there", "tokar evaluate runs/gen protocol=gfid50"),
        Mistake("a tokenizer by a protocol of samples", "tokar evaluate runs/tok protocol=gfid-50k"),
        Mistake("samples by a protocol of tokenizers", "tokar evaluate runs/gen protocol=rfid-val"),
        Mistake("a protocol without weights", "tokar evaluate runs/gen protocol=gfid-50k"),
        Mistake("other features than the protocol's", "tokar evaluate runs/gen protocol=gfid-50k features.name=dinov2"),
        Mistake("fewer images than the protocol wants", "tokar evaluate images.npz protocol=gfid-50k", images("images.npz")),
        Mistake("samples without captions", "tokar evaluate runs/gen protocol=clip-score count=8"),
        Mistake(
            "statistics of other features",
            "tokar evaluate images.npz features.path=runs/judge reference=s.npz",
            both(images("images.npz"), statistics("s.npz", 3)),
        ),
        Mistake(
            "statistics without the images that a measure needs",
            "tokar evaluate images.npz features.path=runs/judge reference=s.npz protocol=classifier "
            "protocol.measures=[kid,frechet] protocol.subset_size=4",
            both(images("images.npz"), statistics("s.npz", 64)),
        ),
        Mistake("a protocol for a probe", "tokar evaluate runs/tok protocol=classifier probe=linear"),
        Mistake("a reference for a tokenizer", "tokar evaluate runs/tok reference=s.npz"),
        Mistake("LPIPS weights that are not there", "tokar evaluate runs/tok lpips_weights=vgg.pt count=8"),
        Mistake(
            "LPIPS weights of something else",
            "tokar evaluate runs/tok lpips_weights=w.safetensors count=8",
            tensors("w.safetensors", a=(2,)),
        ),
        Mistake(
            "a damaged result in a report",
            "tokar report runs/judge",
            both(run("tokar evaluate runs/judge"), replace_result("runs/judge", cut)),
            code=0,
            makes=("runs/judge/report.html",),
        ),
        Mistake(
            "a result edited by hand, in a report",
            "tokar report runs/judge",
            both(run("tokar evaluate runs/judge"), replace_result("runs/judge", lambda path: edit(path, protocol={}))),
            code=0,
            makes=("runs/judge/report.html",),
        ),
    ),
    "Weights": (
        Mistake("a checkpoint that is not there", "tokar convert vq.pt"),
        Mistake(
            "weights of no known family",
            "tokar convert w.safetensors",
            tensors("w.safetensors", a__weight=(2, 2), b__bias=(2,)),
        ),
        Mistake(
            "truncated safetensors",
            "tokar convert w.safetensors models/w",
            both(tensors("w.safetensors", a=(99,)), cut("w.safetensors")),
        ),
        Mistake("a truncated torch file", "tokar convert w.pt models/w", write("w.pt", "PK\x03\x04")),
        Mistake("a pickle with code in it", "tokar convert w.pt models/w", pickled("w.pt")),
        Mistake(
            "a family that there is not", "tokar convert w.safetensors --family llamagen", tensors("w.safetensors", a=(2,))
        ),
        Mistake(
            "another family than the file's",
            "tokar convert w.safetensors --family llamagen_gpt",
            run("tokar convert runs/tok w.safetensors --family llamagen_vq"),
        ),
        Mistake(
            "LlamaGen's text-to-image model",
            "tokar convert t2i.safetensors",
            both(
                run("tokar convert runs/gen t2i.safetensors --family llamagen_gpt"),
                add_key("t2i.safetensors", "cls_embedding.cap_proj.fc1.weight"),
            ),
        ),
        Mistake(
            "a TiTok without codes",
            "tokar convert vae.safetensors",
            tensors(
                "vae.safetensors",
                latent_tokens=(2, 8),
                encoder__latent_token_positional_embedding=(2, 8),
                decoder__latent_token_positional_embedding=(2, 8),
            ),
        ),
        Mistake("a file that is no parity file", "tokar parity w.safetensors", tensors("w.safetensors", a=(2,))),
        Mistake("a parity file that is not there", "tokar parity vq.safetensors"),
        Mistake(
            "a model config that names other code",
            "tokar encode model out=datasets/new",
            both(
                run("tokar export runs/tok model"),
                edit("model/config.json", model={"_target_": "os.system", "command": "true"}),
            ),
        ),
        Mistake(
            "a model config that names no class",
            "tokar encode model out=datasets/new",
            both(run("tokar export runs/tok model"), edit("model/config.json", model={"_target_": "tokar.models.vit.VIT"})),
        ),
        Mistake(
            "a model config without its arguments",
            "tokar encode model out=datasets/new",
            both(
                run("tokar export runs/tok model"),
                edit("model/config.json", model={"_target_": "tokar.models.classifier.Classifier"}),
            ),
        ),
        Mistake(
            "a model folder without weights",
            "tokar encode model out=datasets/new",
            both(run("tokar export runs/tok model"), remove("model/model.safetensors")),
        ),
    ),
    "Interrupted files": (
        Mistake(
            "a half-written code shard",
            ENCODE,
            both(cut(f"{CODES}/codes-000001.npy"), remove(f"{CODES}/manifest.json")),
            code=0,
            makes=("datasets/digits-codes/",),
        ),
        Mistake("a marker of a code shard cut short", ENCODE, cut(f"{CODES}/shard-000001.json")),
        Mistake(
            "a torn last line of metrics",
            TOKENIZER,
            append("runs/tok/metrics.jsonl", '{"step": 5, "sam'),
            code=0,
            makes=("runs/tok/",),
        ),
        Mistake(
            "a torn last line of metrics, in a report",
            "tokar report runs/tok",
            append("runs/tok/metrics.jsonl", '{"step": 5, "sam'),
            code=0,
            makes=("runs/tok/",),
        ),
        Mistake(
            "metrics that are no lines of JSON objects",
            TOKENIZER,
            append("runs/tok/metrics.jsonl", "3\n"),
            code=0,
            makes=("runs/tok/",),
        ),
        Mistake(
            "a shard cut short while preparing",
            PREPARE,
            both(cut(SHARD), remove("datasets/digits/train/manifest.json")),
            code=0,
            makes=("datasets/digits/",),
        ),
        Mistake("settings cut short while preparing", PREPARE, cut("datasets/digits/train/settings.json")),
        Mistake(
            "a leftover of a killed preparation",
            PREPARE,
            write("datasets/digits/train/.shard-000001.tar.77.tmp", "x"),
            code=0,
            makes=("datasets/digits/",),
        ),
    ),
}
