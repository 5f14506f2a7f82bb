"""Every shipped recipe composes, builds and takes one step: small ones as they are, big ones with images and widths cut."""

import json
import re

import numpy as np
import pytest
from lpips_weights import random_lpips
from PIL import Image
from safetensors.torch import save_file
from text_encoders import write_clip_model, write_t5
from tokar.conf.compose import compose
from tokar.conf.overrides import ROOT
from tokar.data.prepare import prepare
from transformers import ConvNextConfig, ConvNextForImageClassification, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

COSTS = ("network_calls", "evaluations", "depth")
TEXTS = {path.stem: path.read_text() for path in sorted(ROOT.glob("experiment/*.yaml"))}
STAGES = {name: re.search(r"^stage: (\w+)", text, re.MULTILINE)[1] for name, text in TEXTS.items()}
TOKENIZERS = {
    "ar_probe": "digits_vqgan", "digits_llamagen": "digits_vqgan",
    **{f"llamagen_{size}": "llamagen_vq16" for size in ("b", "l", "xl", "xxl", "3b", "t2i_xl")},
    **{name: "gigatok_bl" for name in TEXTS if name.startswith(("gigatok_gpt_", "d_ar_"))},
    **{name: "var_vqvae" for name in TEXTS if name.startswith("var_d")},
    **{name: "ibq_1024" for name in TEXTS if name.startswith("rar_")},
    **{name: "llamagen_vq16" for name in TEXTS if name.startswith(("nar_", "par_"))},
    "digits_block4": "digits_vqgan",
    **{name: "llamagen_vq16" for name in TEXTS if name.startswith("block") and "llamagen" in name},
    **{name: "gigatok_bl" for name in TEXTS if name.startswith("block") and "gigatok" in name},
    **{name: "flexvar_tokenizer" for name in TEXTS if name.startswith("flexvar_d")},
    **dict.fromkeys(("cifar10_llamagen", "cifar10_teacher", "cifar10_next_scale", "cifar10_block"), "cifar10_multiscale"),
}  # fmt: skip
"""Whose codes each generator learns here."""


def named(key):
    """Which recipe's run each recipe names under a key."""
    found = {name: re.search(rf'\b{key}: "?\$\{{paths.runs\}}/(\w+)', text) for name, text in TEXTS.items()}
    return {name: match[1] for name, match in found.items() if match}


REFERENCES, TEACHERS, AFTER = named("reference"), named("model"), named("after")
"""Where each fine-tuning begins, whose trajectories a student learns here (drawn on the fly), which run a run goes on from."""
TOKENIZERS |= {name: TOKENIZERS[reference] for name, reference in REFERENCES.items()}
FINE_TUNING = {"cca": "contrast", "adapt": "adapt"}
THIN = ["tokenizer.encoder.width=32", "tokenizer.encoder.blocks=1", "tokenizer.decoder.blocks=1"]
CUT = {
    "llamagen_vq": [*THIN, "tokenizer.quantizer.codebook_size=64"],
    "var_vqvae": [
        *THIN, "tokenizer.quantizer.codebook_size=64", "tokenizer.quantizer.scales=[1,2,3,4]",
    ],
    "gigatok": [
        *THIN, "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=64",
        "tokenizer.token_encoder.width=32", "tokenizer.token_encoder.layers=1", "tokenizer.token_encoder.heads=2",
        "tokenizer.token_decoder.width=32", "tokenizer.token_decoder.layers=1", "tokenizer.token_decoder.heads=2",
        "tokenizer.semantic.depth=1",
    ],
    r"gigatok_\w+(?<!_2d)$": ["tokenizer.token_encoder.tokens=32"],
    "gigatok_bl_dino": ["losses.adversarial_start=0"],
    "titok": [
        "tokenizer.quantizer.codebook_size=64", "tokenizer.token_encoder.width=32", "tokenizer.token_encoder.layers=1",
        "tokenizer.token_encoder.heads=2", "tokenizer.token_decoder.width=32", "tokenizer.token_decoder.layers=1",
        "tokenizer.token_decoder.heads=2", "losses.adversarial_start=0",
    ],
    "ibq": [*THIN, "tokenizer.quantizer.codebook_size=64"],
    "magvit2": THIN,
    "flexvar_tokenizer": [
        *THIN, "tokenizer.quantizer.codebook_size=64", "tokenizer.scales=[1,2,3,4]",
    ],
    "flexvar_d": [
        "generator.dim=64", "generator.layers=2", "generator.heads=2", "generator.groups=[[1,2,2],[3,3,1]]",
        "generator.map_size=8",
    ],
    "rar_": ["generator.dim=64", "generator.layers=2", "generator.heads=2", "generator.hidden=128"],
    "nar_": ["generator.dim=64", "generator.layers=2", "generator.heads=2", "generator.multiple_of=32"],
    "par_": ["generator.dim=64", "generator.layers=2", "generator.heads=2", "generator.multiple_of=32"],
    "dd1_var": ["student.timesteps=[0,2]", "student.split=2"],
    "dd1_llamagen": ["student.timesteps=[0,5]", "student.split=9"],
    "var_d": ["generator.dim=64", "generator.layers=2", "generator.heads=2"],
    "diffusion_": ["fit_steps=2"],
    "diffusion_var": ["fit_steps=2", "width=64"],
    "diffusion_llamagen": ["fit_steps=2", "width=64"],
    "adapt_llamagen": [
        "generator.dim=64", "generator.layers=2", "generator.heads=2", "generator.multiple_of=32", "adapt.fit_steps=2",
    ],
    "cca_var": ["generator.dim=64", "generator.layers=2", "generator.heads=2"],
    "cca_llamagen": ["generator.dim=64", "generator.layers=2", "generator.heads=2", "generator.multiple_of=32"],
    "block": ["generator.dim=64", "generator.layers=2", "generator.heads=2", "generator.multiple_of=32"],
    **{
        start: ["generator.dim=64", "generator.layers=2", "generator.heads=2", "generator.multiple_of=32"]
        for start in ("llamagen_b", "llamagen_l", "llamagen_x", "llamagen_3", "llamagen_t", "gigatok_gpt", "d_ar")
    },
    "llamagen_t2i": ["generator.condition.features=12"],
}  # fmt: skip
"""By a pattern of the name's beginning: what makes a recipe small while its shape, losses and optimizers stay."""
SMALL_SIDE, CUT_SIDE = 32, 64
"""Pixels of the images: of the small recipes, and of those that stand for ImageNet's."""


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """Shards of two classes of noise, by image size."""

    def make(size):
        source = tmp_path_factory.mktemp(f"noise{size}")
        random = np.random.default_rng(0)
        for place in ("train/a", "train/b", "val/a", "val/b"):
            (source / place).mkdir(parents=True)
            for number in range(2):
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(source / place / f"{number}.png")
        prepare(str(source), source / "shards")
        return source / "shards"

    return {size: make(size) for size in (SMALL_SIDE, CUT_SIDE)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    save_file(random_lpips(), folder / "lpips.safetensors")
    config = Dinov2Config(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, patch_size=14, image_size=224)
    Dinov2Model(config).save_pretrained(folder / "dinov2")
    config = ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=5)
    ConvNextForImageClassification(config).save_pretrained(folder / "convnext")
    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=2, image_size=224)
    ViTModel(config).save_pretrained(folder / "dino")
    write_clip_model(folder / "clip")
    return folder


@pytest.fixture(scope="session")
def captioned(start, folder):
    """Encodes noise with a caption beside each image; returns the folder of the codes and of the captions' features."""

    def encode(tokenizer):
        random = np.random.default_rng(0)
        for split in ("train", "val"):
            (folder / f"texts-{split}").mkdir()
            for number in range(4):
                noise = random.integers(0, 256, (CUT_SIDE, CUT_SIDE, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"texts-{split}" / f"{number}.png")
                (folder / f"texts-{split}" / f"{number}.txt").write_text("a dog")
        prepare(str(folder / "texts-{split}"), folder / "captions")
        write_t5(folder / "t5")
        command = start(
            folder, "encode", str(tokenizer), "data=imagenet256", f"data.image_size={CUT_SIDE}", "data.path=captions",
            "text=t5", "text.path=t5", "out=captions-codes",
        )  # fmt: skip
        assert command.wait() == 0, command.log.read_text()
        return "captions-codes"

    return encode


@pytest.fixture(scope="session")
def take_step(start, noise, captioned, folder):
    """Runs one step of a recipe, once; returns its run folder."""
    done = {}

    def take(name):
        if name not in done:
            done[name] = folder / "runs" / name
            overrides = [f"experiment={name}", f"name={name}", *small(name, noise)]
            if "override /generator: llamagen_t2i" in TEXTS[name]:
                overrides.append(f"codes.path={captioned(take(TOKENIZERS[name]))}")
            elif name in TOKENIZERS:
                overrides += ["codes.path=null", f"codes.tokenizer={take(TOKENIZERS[name])}"]
            elif name in TEACHERS:
                overrides += ["pairs=null", "count=4", f"model={take(TEACHERS[name])}"]
            if STAGES[name] == "dd2":
                overrides.append(f"diffusion={take(name.removesuffix('_start').replace('dd2', 'diffusion'))}")
            if name in AFTER:
                overrides.append(f"after={take(AFTER[name])}")
            if name in REFERENCES:
                overrides.append(f"{FINE_TUNING[name.partition('_')[0]]}.reference={take(REFERENCES[name])}")
            if "perceptual_weight" in TEXTS[name]:
                overrides.append("losses.lpips_weights=lpips.safetensors")
            if "override /discriminator: dino" in TEXTS[name]:
                overrides.append("discriminator.path=dino")
            if "convnext_weight" in TEXTS[name]:
                overrides.append("losses.convnext_path=convnext")
            if "override /semantic" in TEXTS[name]:
                overrides.append("semantic.teacher.path=dinov2")
            command = start(folder, "train", STAGES[name], *overrides)
            assert command.wait() == 0, command.log.read_text()
        return done[name]

    return take


def small(name, noise):
    """Overrides for one step on noise."""
    side = CUT_SIDE if "imagenet256" in TEXTS[name] else SMALL_SIDE
    return [
        f"data.path={noise[side]}", f"data.image_size={side}", "data.train_split=train",
        "data.val_split=val", "data.workers=0", "loop.duration=1",
        "loop.batch_size=2", "loop.accumulate=1", "loop.eval_samples=2", "strategy.accelerator=cpu",
        *(
            override for start, overrides in CUT.items() if re.match(start, name) for override in overrides
            if STAGES[name] != "generator" or not override.startswith(("tokenizer.", "losses."))  # gigatok is both
        ),
    ]  # fmt: skip


def test_every_recipe_composes_as_shipped(tmp_path):
    """Nothing is cut; given are the files that it needs."""
    (tmp_path / "lpips.pth").touch()
    given = {"perceptual_weight": f"losses.lpips_weights={tmp_path}/lpips.pth", "override /semantic": "semantic.teacher.path=x",
             "override /discriminator: dino": "discriminator.path=x", "convnext_weight": "losses.convnext_path=x"}  # fmt: skip
    for name, stage in STAGES.items():
        own = ["codes.path=x"] if stage == "generator" else []
        own += [override for part, override in given.items() if part in TEXTS[name]]
        assert compose(stage, [f"experiment={name}", *own]).typed.experiment == name


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_recipe_takes_a_step(take_step, name):
    run = take_step(name)
    assert (run / "checkpoints" / "step-00000001" / "COMPLETE").exists()
    assert '"train/loss"' in (run / "metrics.jsonl").read_text()


def test_a_generator_of_texts_draws_prompts(take_step, start, folder):
    run = take_step("llamagen_t2i_xl")
    (folder / "prompts.txt").write_text("a dog\n\na red boat\n")
    for prompts in ("[a dog,a red boat]", "prompts.txt"):
        command = start(
            folder, "sample", str(run), f"prompts={prompts}", "count=3", "save=[codes]", "sampling.top_k=4", "out=drawn"
        )
        assert command.wait() == 0, command.log.read_text()
        assert np.load(folder / "drawn" / "codes.npy").shape == (3, 16)


@pytest.mark.parametrize(
    ("how", "numbers"),
    [
        (["features.name=dinov2", "features.path=dinov2"], {"fd_dinov2", *COSTS}),
        (["measure=likelihood"], {"cross_entropy", "bits_per_token", "bits_per_image"}),
        (["protocol=clip-score", "features.path=clip", "batch_size=1"], {"clip_score", *COSTS}),
    ],
)
def test_a_generator_of_texts_is_measured_by_captions(take_step, start, folder, how, numbers):
    data = ["data=imagenet256", f"data.image_size={CUT_SIDE}", "data.path=captions", "count=2", f"out=measured-{len(how)}"]
    command = start(folder, "evaluate", str(take_step("llamagen_t2i_xl")), *data, *how, "strategy.accelerator=cpu")
    assert command.wait() == 0, command.log.read_text()
    (path,) = (folder / f"measured-{len(how)}").glob("*.json")
    assert set(json.loads(path.read_text())["numbers"]) == numbers


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_recipe_says_how_to_run_it(name):
    assert re.search(rf"^#   tokar train {STAGES[name]} experiment={name}\b", TEXTS[name], re.MULTILINE)
