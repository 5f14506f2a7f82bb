"""The report page in a real browser: opened from disk, drawn, clicked, sorted, turned dark, at phone and desktop width."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from tokar.evaluate.images import Picture, save_grid
from tokar.evaluate.protocol import Result
from tokar.evaluate.report.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=4000")  # fmt: skip
TALL = 4800
"""Pixels of a screenshot: all but the end of the page at desktop width."""
CONFIG = """# resolved
stage: {stage}
seed: {seed}
data: {{source: digits, image_size: 32}}
loop:
  duration: 2000
  batch_size: 64
optim:
  lr: {lr}
"""
FEATURES = {"name": "classifier", "dim": 128, "input_size": 32, "resize": "none", "weights_sha256": "9f" * 32}


def wobble(step, seed):
    return math.sin(step * 0.7 + seed) * 0.5 + math.sin(step * 1.9 + 2 * seed) * 0.5


def metric_row(stage, step, seed):
    t = step / 2000
    row = {
        "step": step,
        "samples": step * 64,
        "train/loss": (2.2 + 0.2 * seed) * math.exp(-4 * t) + 0.4 + 0.03 * wobble(step, seed),
    }
    row["optim/lr"] = 3e-4 * min(1, step / 200) * (0.5 + 0.5 * math.cos(math.pi * t))
    if stage == "tokenizer":
        row |= {"train/reconstruction": 0.3 * math.exp(-3 * t) + 0.04, "train/commitment": 0.02 + 0.01 * wobble(step, 3)}
        row |= {"train/codebook_usage": min(1, 0.1 + t), "train/codebook_perplexity": 20 + 300 * t}
        row |= {"train/adversarial": 0.1 * wobble(step, 5)} if step > 800 else {}
    if step % 400 == 0:
        row["val/loss"] = row["train/loss"] * 1.04
        row |= (
            {"val/psnr": 14 + 9 * t, "val/ssim": 0.5 + 0.4 * t}
            if stage == "tokenizer"
            else {"val/class_accuracy": 0.4 + 0.55 * t}
        )
    return row


def digits(count):
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().images[:count] * 15.9).byte()
    return pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].expand(-1, -1, -1, 3)


def draw(folder, stage):
    clean = digits(32).float()
    for step in range(400, 2001, 400):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(step)) * (120 * math.exp(-step / 500))
        name = "reconstruction" if stage == "tokenizer" else "samples"
        save_grid((clean + noise).clamp(0, 255).byte(), folder / "samples" / f"step-{step:08d}-{name}.png", columns=8)


def make_run(folder, stage, seed=0, lr=3e-4):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(stage=stage, seed=seed, lr=lr))
    versions = {"python": "3.11.7", "torch": "2.13.0", "tokar": "0.1.0"}
    environment = {
        "versions": versions,
        "commit": f"4be1c0{seed}",
        "command": f"tokar train {stage} seed={seed}",
        "started": "2025-06-01T10:12:30",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    rows = [metric_row(stage, step, seed) for step in range(20, 2001, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    speed = [
        {"step": s, "images_per_s": 900 + 40 * wobble(s, seed), "data_wait": 0.01, "step_ms": 70 + 5 * wobble(s, 9)}
        for s in range(20, 2001, 20)
    ]
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in speed))
    if stage != "classifier":
        draw(folder, stage)
        describe(folder, stage)
    evaluate(folder, stage, seed)
    return folder


def describe(folder, stage):
    """What a tokenizer or a generator leaves for the page: use of the codes, order of the tokens, images building up."""
    if stage == "tokenizer":
        counts = np.arange(256) % 9 * 3
        np.savez(folder / "codes.npz", codes=counts, codes_scale0=counts // 5, codes_scale1=counts - counts // 5)
    else:
        streams = [{"name": "patch", "grid": [4, 4], "revealed_at": [number // 4 for number in range(16)]}]
        (folder / "plan.json").write_text(json.dumps({"format": 1, "n_units": 4, "streams": streams}))
    Picture(digits(12), ["4", "8", "12", "16"]).save(folder / "samples" / "step-00002000-partial.png")


def evaluate(folder, stage, seed):
    data = {"source": "digits", "split": "val", "crop": "center", "content": "5c0ffee5"}
    if stage == "tokenizer":
        numbers = {
            "psnr": 22.41 + seed,
            "ssim": 0.914,
            "fd_classifier": 3.2 - seed / 3,
            "codebook_usage": 0.93,
            "codebook_perplexity": 311.4,
        }
        results = [
            Result(
                "reconstruction", numbers, {"data": data, "count": 360, "features": FEATURES}, {"target": f"runs/{folder.name}"}
            ),
            Result("prefixes", {f"first {k}/psnr": 10 + k + seed for k in (1, 4, 16)}, {"data": data, "count": 360}),
        ]
    elif stage == "generator":
        protocol = {"count": 1437, "features": FEATURES, "reference": {"data": {**data, "split": "train"}, "count": 1437}}
        results = [
            Result(
                "generation",
                {"fd_classifier": fd, "class_accuracy": accuracy, "network_calls": calls, "seconds_per_image": calls / 400},
                {**protocol, "count": count},
                {"guidance": g, "seed": 0},
            )
            for g, fd, accuracy, count, calls in [
                (1.0, 9.74, 0.812, 1437, 16),
                (2.0, 5.13, 0.941, 1437, 32),
                (4.0, 11.9, 0.978, 1437, 8),
                (2.0, 8.31, 0.95, 360, 16),
            ]
        ]
    else:
        results = [Result("classification", {"accuracy": 0.9917}, {"data": data, "count": 360})]
    for index, result in enumerate(results):
        result.save(folder / "evaluation" / f"{result.name}-{index}.json")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / "digits-vqgan", "tokenizer"), make_run(root / "digits-vqgan-wide", "tokenizer", 1, 1e-3)]
    runs += [make_run(root / "digits-gpt", "generator"), make_run(root / "digits-judge", "classifier")]
    return write_report(runs, root / "report.html")


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return found


def run_browser(browser, page, tmp_path, *flags):
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def opened(browser, report, tmp_path, then="", *flags):
    """The page's DOM after its script ran and, behind it, `then`."""
    page = tmp_path / "page.html"
    page.write_text(report.read_text().replace("</body>", f"<script>{then}</script></body>"))
    dom = run_browser(browser, page, tmp_path, "--dump-dom", *flags)
    assert 'data-ready="true"' in dom
    assert "data-error" not in dom
    return dom


def test_everything_is_drawn(browser, report, tmp_path):
    dom = opened(browser, report, tmp_path)
    charts = int(re.search(r'data-charts="(\d+)"', dom)[1])
    assert charts == dom.count('class="chart"') == 26
    assert dom.count("<svg") == charts + dom.count('class="plane"') + dom.count('class="order-figure"') == charts + 2
    assert not re.search(r'd="[^"]*NaN', dom)
    headings = [
        "Results",
        "Speed and quality",
        "Curves",
        "Images",
        "Build-up",
        "Order",
        "Codebook",
        "Configuration",
        "Environment",
    ]
    assert re.findall(r"<h2>([^<]+)</h2>", dom) == headings
    assert len(re.findall(r'class="mark ', dom)) == 3
    assert 'class="name"' in dom


def test_tables_sort_best_first_and_back(browser, report, tmp_path):
    """By a click on a head and by the keyboard, which reaches it since it is a button; readers are told the order."""
    sort = """
      const table = [...document.querySelectorAll('table.results')].find((t) => t.textContent.includes('Class accuracy'));
      const head = [...table.querySelectorAll('th button')].find((b) => b.textContent.includes('FD'));
      const say = (name) => {
        const read = [...table.tBodies[0].rows].map((r) => r.querySelectorAll('td.number')[1].textContent).join(' ');
        document.body.dataset[name] = `${head.closest('th').getAttribute('aria-sort')}: ${read}`;
      };
      head.click(); say('once'); head.click(); say('twice');
      const reached = (button) => { button.focus(); return document.activeElement === button; };
      document.body.dataset.reached = [...table.querySelectorAll('th button')].every(reached);
    """
    dom = opened(browser, report, tmp_path, sort)
    assert 'data-once="ascending: 5.130 8.310 9.740 11.900"' in dom
    assert 'data-twice="descending: 11.900 9.740 8.310 5.130"' in dom
    assert 'data-reached="true"' in dom


def test_controls_answer(browser, report, tmp_path):
    use = """
      const say = (name, value) => { document.body.dataset[name] = value; };
      const lines = () => document.querySelectorAll('.chart path.line').length;
      const before = lines();
      document.querySelector('[data-run="1"]').click(); say('hidden', before - lines());
      document.querySelector('[data-run="1"]').click(); say('back', before - lines());
      document.querySelector('[data-axis="samples"]').click();
      say('axis', [...document.querySelectorAll('.chart text')].some((t) => t.textContent === '100k'));
      document.querySelector('#log').click();
      const smooth = document.querySelector('#smooth');
      smooth.value = 80; smooth.dispatchEvent(new Event('input')); say('raw', document.querySelectorAll('.raw').length > 10);
      const book = document.querySelector('.flipbook'), slider = book.querySelector('input');
      const last = book.querySelector('img').src;
      slider.value = 0; slider.dispatchEvent(new Event('input'));
      say('step', book.querySelector('output').textContent); say('turned', book.querySelector('img').src !== last);
      say('together', new Set([...book.parentElement.querySelectorAll('output')].map((o) => o.textContent)).size);
      const plane = document.querySelector('.plane'), marks = () => plane.querySelector('.mark').getAttribute('transform');
      const first = marks(), title = () => [...plane.querySelectorAll('.axis-title')].map((t) => t.textContent).join(' / ');
      say('axes', title());
      plane.querySelector('[data-of=x] [data-metric="1"]').click();
      plane.querySelector('[data-of=y] [data-metric="1"]').click();
      say('other', title()); say('moved', marks() !== first);
      const near = plane.querySelector('.mark').getBoundingClientRect();
      const at = { clientX: near.left + 4, clientY: near.top + 4 };
      plane.querySelector('svg').dispatchEvent(new PointerEvent('pointermove', at));
      say('point', plane.querySelector('.tip').textContent);
      const dark = () => getComputedStyle(document.body).backgroundColor;
      const light = dark(), theme = document.querySelector('#theme');
      theme.click(); say('dark', dark() !== light); say('theme', document.documentElement.dataset.theme);
      say('offer', theme.getAttribute('aria-label')); theme.click(); say('again', dark() === light);
      document.querySelector('.protocol-id').click(); say('open', document.querySelectorAll('.protocol[open]').length);
      const svg = document.querySelector('.chart svg'), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', { clientX: box.right, clientY: box.top + 50 }));
      say('tip', document.querySelector('.chart .tip').textContent);
    """
    dom = opened(browser, report, tmp_path, use)
    seen = dict(re.findall(r' data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom)[0]))
    assert int(seen["hidden"]) >= 10
    assert seen["back"] == "0"
    assert (seen["axis"], seen["raw"], seen["turned"], seen["open"]) == ("true", "true", "true", "1")
    assert (seen["step"], seen["together"]) == ("step 400", "1")
    assert (seen["dark"], seen["theme"], seen["offer"], seen["again"]) == ("true", "dark", "switch to light", "true")
    assert seen["axes"] == "FD, classifier ↓ lower is better / Seconds / image →"
    assert (seen["other"], seen["moved"]) == ("Class accuracy ↑ higher is better / Network calls / image →", "true")
    assert seen["point"].startswith("digits-gpt · guidance 1")
    assert seen["tip"].startswith("samples 128\u2009000")
    assert "digits-vqgan-wide" in seen["tip"]


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_and_can_be_looked_at(browser, report, tmp_path, width, dark):
    """A frame of the wanted width (a window cannot be as narrow as a phone): nothing sticks out, and it is no blank."""
    from PIL import Image

    page = tmp_path / "frame.html"
    style = f"body{{margin:0}}iframe{{border:0;width:{width}px;height:{TALL}px}}"
    page.write_text(f'<style>{style}</style><iframe src="{report.as_uri()}"></iframe>')
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    run_browser(browser, page, tmp_path, f"--screenshot={shot}", f"--window-size={width},{TALL}", *scheme)
    with Image.open(shot) as picture:
        pixels = picture.convert("L").crop((0, 0, width, TALL))
    assert (pixels.getpixel((3, 300)) < 60) == dark
    for top in range(0, TALL, TALL // 4):
        part = pixels.crop((0, top, width, top + TALL // 4)).resize((100, 300))
        assert len(set(part.get_flattened_data())) > 30, f"hardly anything is seen below {top}"
    check = "document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;"
    inner = tmp_path / "inner.html"
    inner.write_text(
        report.read_text().replace(
            "</body>", f"<script>{check} parent.postMessage(document.body.dataset.wide, '*')</script></body>"
        )
    )
    page.write_text(
        f"<style>{style}</style><script>onmessage = (e) => {{ document.documentElement.dataset.wide = e.data; }}</script>"
        f'<iframe src="{inner.as_uri()}"></iframe>'
    )
    assert 'data-wide="false"' in run_browser(browser, page, tmp_path, "--dump-dom", f"--window-size={width},900")


def test_nothing_is_fetched(report):
    text = report.read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "@import" not in text
    assert "url(" not in text
