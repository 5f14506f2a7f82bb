"""How metrics are called on the page, and which direction is better."""

from __future__ import annotations

LABELS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "mse": "MSE",
    "fd_inception": "FID",
    "fd_dinov2": "FD-DINOv2",
    "sfid": "sFID",
    "kid": "KID",
    "kid_std": "KID, spread over subsets",
    "inception_score": "Inception score",
    "inception_score_std": "Inception score, spread over parts",
    "clip_score": "CLIP score",
    "fd_classifier": "FD, classifier",
    "bits_per_token": "bits / token",
    "bits_per_image": "bits / image",
    "bits_per_token_error": "standard error, bits / token",
    "bits_per_image_error": "standard error, bits / image",
    "top5_accuracy": "top-5 accuracy",
    "train_top5_accuracy": "train top-5 accuracy",
    "lr": "learning rate",
    "lr_factor": "learning rate factor",
    "memory_mib": "memory, MiB",
    "memory_now_mib": "memory now, MiB",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "save_stall_ms": "save stall, ms",
    "tv_bound": "total variation, at most",
    "teacher_nll": "nats / token under the teacher",
    "codes/usage": "codebook usage",
    "codes/perplexity": "codebook perplexity",
    "images_per_s": "images / s",
    "step_ms": "step, ms",
    "data_wait": "data wait",
    "seconds_per_image": "seconds / image",
    "network_calls": "network calls / image",
    "evaluations": "network evaluations / image",
    "pair_information": "information of pairs, nats",
    "pair_information_error": "its error, nats",
    "ms_1": "ms, 1 at once",
    "ms_32": "ms, 32 at once",
    "depth": "sequential depth",
}
COSTS = ("evaluations", "network_calls", "depth", "seconds", "ms_")
"""Parts of the names of what an image costs."""
SPEEDS = ("images_per_s", "times_as_fast")
LOWER = (
    "fd_", "sfid", "kid", "lpips", "mse", "loss", "error", "cross_entropy", "bits_per", "data_wait", "step_ms", "tv_bound",
    "teacher_nll", "code_distance", *COSTS,
)  # fmt: skip
TELLING = ("psnr", "accuracy", "fd_", "ssim", "usage", "loss")
HIGHER = (
    "psnr", "ssim", "accuracy", "usage", "perplexity", "inception_score", "precision", "recall", "clip_score", *SPEEDS,
)  # fmt: skip


def label(key: str) -> str:
    """A metric's name for people: the last part of its key, spelled out where it is a known abbreviation."""
    key = key.removeprefix("optim/").removeprefix("codes_")
    *scope, name = [key] if key in LABELS else key.split("/")
    words = LABELS.get(name, name.replace("_", " "))
    words = f"{' '.join(scope).replace('_', ' ')}: {words}" if scope else words
    return words[:1].upper() + words[1:]


def better(key: str) -> str:
    """`"↑"`, `"↓"`, or nothing where neither end is the good one."""
    name = key.rsplit("/", 1)[-1]
    if name.endswith("_std"):
        return ""
    if any(part in name for part in HIGHER):
        return "↑"
    return "↓" if any(part in name for part in LOWER) else ""


def is_cost(key: str) -> bool:
    """Whether a metric says what an image costs."""
    return any(part in key.rsplit("/", 1)[-1] for part in COSTS)


def is_quality(key: str) -> bool:
    """Whether a metric says how good images are, and which end is the good one."""
    return bool(better(key)) and not is_cost(key) and not any(part in key for part in SPEEDS)


def rank(key: str) -> int:
    """How early a metric belongs among the headlines of a run."""
    return next((place for place, part in enumerate(TELLING) if part in key), len(TELLING))
