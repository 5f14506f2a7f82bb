import json
import math
import re

import numpy as np
import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate.images import Picture, save_grid
from tokar.evaluate.protocol import Result
from tokar.evaluate.report import buildup, curves, gallery, heat, names, orders, pictures, plane, tables, usage
from tokar.evaluate.report.markup import Markup, tag
from tokar.evaluate.report.page import write_report
from tokar.evaluate.report.runs import read_run, read_runs


def make(folder, stage="tokenizer", rows=3, extra=""):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"stage: {stage}\noptim: {{lr: 0.1}}\n{extra}")
    lines = [
        {"step": 10 * i, "samples": 640 * i, "train/loss": 1.0 / i, "val/loss": 2.0 / i, "optim/lr": 0.1}
        for i in range(1, rows + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def data_of(page):
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)[1])


# ---- reading ----


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"is no run folder; give a folder"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="no run to report on"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_names_are_as_short_as_they_can_be(tmp_path):
    runs = read_runs([make(tmp_path / "a" / "seed0"), make(tmp_path / "b" / "seed0"), make(tmp_path / "b" / "seed1")])
    assert [run.name for run in runs] == ["a/seed0", "b/seed0", "b/seed1"]
    with pytest.raises(UserError, match="given twice"):
        read_runs([tmp_path / "a" / "seed0"] * 2)


def test_colours_tell_runs_of_one_stage_and_all_that_sample_apart(tmp_path):
    stages = ["tokenizer", "generator", "tokenizer", "distill", "dd2"]
    runs = read_runs([make(tmp_path / f"{number}", stage) for number, stage in enumerate(stages)])
    assert [run.colour for run in runs] == [0, 0, 1, 1, 2]


def test_a_resumed_run_counts_each_step_once_and_tells_of_broken_lines(tmp_path):
    folder = make(tmp_path / "run", rows=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "train/loss": 7.0}\n{"step": 30, "train/loss": 0.3}\n{"step": 40, "tra')
    run = read_run(folder)
    assert [(row["step"], row["train/loss"]) for row in run.metrics] == [(10, 1.0), (20, 7.0), (30, 0.3)]
    assert run.notes == ["1 unreadable line of metrics.jsonl left out"]


def test_what_cannot_be_read_is_said_on_the_page(tmp_path):
    folder = make(tmp_path / "run", extra="broken: [")
    (folder / "environment.json").write_text("{")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "old.json").write_text("{}")
    (folder / "samples").mkdir()
    (folder / "samples" / "step-00000010-samples.png").write_bytes(b"no image")
    page = write_report([folder], tmp_path / "report.html").read_text()
    for note in (
        "config.yaml is shown as text",
        "environment.json left out",
        "evaluation/old.json left out",
        "step-00000010-samples.png left out",
    ):
        assert note in page


def test_a_run_with_a_config_alone_makes_a_page(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    page = write_report([folder], tmp_path / "out" / "report.html").read_text()
    assert re.findall(r"<h2>(\w+)</h2>", page) == ["Configuration"]


# ---- curves ----


def test_train_and_val_and_peers_share_a_chart_and_stages_do_not(tmp_path):
    runs = read_runs(
        [make(tmp_path / name, stage) for name, stage in (("a", "tokenizer"), ("b", "tokenizer"), ("c", "generator"))]
    )
    found = {(chart["stage"], chart["key"]): [(s["run"], s["split"]) for s in chart["series"]] for chart in curves.charts(runs)}
    assert found[("tokenizer", "loss")] == [(0, "train"), (0, "val"), (1, "train"), (1, "val")]
    assert found[("generator", "loss")] == [(2, "train"), (2, "val")]
    assert found[("tokenizer", "optim/lr")] == [(0, ""), (1, "")]


def test_values_that_are_not_finite_numbers_are_left_out(tmp_path):
    folder = make(tmp_path / "run", rows=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "train/loss": NaN}\n{"step": 30, "train/loss": "text"}\n{"step": 40, "train/loss": 0.5}\n')
    series = curves.charts(read_runs([folder]))[0]["series"][0]
    assert (series["step"], series["y"], series["samples"]) == ([10, 40], [1.0, 0.5], [640, None])
    assert data_of(write_report([folder], tmp_path / "report.html").read_text())["charts"]


def test_thinning_keeps_spikes_and_ends():
    points = [(i, None, float(i % 7)) for i in range(10_000)]
    points[4321] = (4321, None, 99.0)
    points[8765] = (8765, None, -99.0)
    kept = curves.thin(points, most=200)
    assert len(kept) <= 202
    assert {points[0], points[-1], points[4321], points[8765]} <= set(kept)
    assert kept == sorted(kept)
    assert curves.thin(points[:150], most=200) == points[:150]


@pytest.mark.parametrize(
    ("key", "name", "direction"),
    [
        ("psnr", "PSNR, dB", "↑"),
        ("fd_inception", "FID", "↓"),
        ("optim/lr", "Learning rate", ""),
        ("codes/usage", "Codebook usage", "↑"),
        ("class_accuracy", "Class accuracy", "↑"),
    ],
)
def test_metrics_have_names_and_directions(key, name, direction):
    assert (names.label(key), names.better(key)) == (name, direction)


# ---- tables ----


def result(value, count=100, **subject):
    return Result("generation", {"fd_classifier": value, "class_accuracy": 0.5}, {"count": count}, subject)


def with_results(folder, *results):
    for index, each in enumerate(results):
        each.save(folder / "evaluation" / f"{index}.json")
    return folder


def test_the_best_is_marked_within_its_protocol_only(tmp_path):
    folder = with_results(
        make(tmp_path / "run"), result(3.0, guidance=1.0), result(2.0, guidance=2.0), result(1.0, count=50, guidance=3.0)
    )
    html = tables.results(read_runs([folder]))
    assert re.findall(r"<strong[^>]*>([\d.]+)</strong>", html) == ["2"]
    assert "2 protocols: compare numbers of one only." in html
    assert html.count('<tr class="differs">') == 0
    assert html.count('class="differs"><dt>count') == 2


def test_columns_show_what_tells_rows_apart(tmp_path):
    facts = {"model": "ema", "weights": "ab" * 8}
    folder = with_results(make(tmp_path / "run"), result(3.0, guidance=1.0, **facts), result(2.0, guidance=2.0, **facts))
    html = tables.results(read_runs([folder]))
    heads = re.findall(r'<th scope="col"[^>]*><button type="button">([^<]*)', html)
    assert heads == ["Run", "Guidance", "FD, classifier", "Class accuracy", "Images", "Protocol"]


def test_rows_that_look_alike_name_their_file(tmp_path):
    html = tables.results(read_runs([with_results(make(tmp_path / "run"), result(3.0), result(2.0))]))
    assert "File" in html
    assert "<td>1</td>" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (22.4123, "22.41"),
        (0.91, "0.9100"),
        (311.42, "311.4"),
        (0.0, "0"),
        (12.0, "12"),
        (1.23e-7, "1.230e-07"),
        (float("nan"), "–"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert tables.number(value) == text


def test_differing_configs_are_set_side_by_side(tmp_path):
    runs = read_runs(
        [make(tmp_path / "a", extra="seed: 1"), make(tmp_path / "b", extra="seed: 2"), make(tmp_path / "c", "generator")]
    )
    html = tables.config_differences(runs)
    assert "tokenizer runs differ in" in html
    assert re.findall(r'<th scope="row">([\w.]+)</th><td>(\w+)</td><td>(\w+)</td>', html) == [("seed", "1", "2")]


# ---- the page ----


def test_events_are_a_table_and_no_curve(tmp_path):
    folder = make(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(31, 31 + tables.MOST_EVENTS + 2):
            file.write(json.dumps({"step": step, "samples": 9, "event": "skip", "reason": "the loss is <nan>", "to": 3}) + "\n")
    run = read_run(folder)
    assert (run.last_step, len(run.events)) == (30, tables.MOST_EVENTS + 2)
    html = write_report([folder], tmp_path / "report.html").read_text()
    assert "<td>skip</td><td>the loss is &lt;nan&gt;</td>" in html
    assert "<td>32</td>" not in html
    assert "<td>33</td>" in html
    assert "the newest 50 of 52" in html
    assert {chart["key"] for chart in data_of(html)["charts"]} == {"loss", "optim/lr"}
    assert ">Events</h2>" not in write_report([make(tmp_path / "calm")], tmp_path / "calm.html").read_text()


def test_text_from_outside_is_never_markup(tmp_path):
    evil = "</script><script>alert(1)</script>"
    folder = make(tmp_path / "run", extra=f'name: "{evil}"')
    (folder / "environment.json").write_text(json.dumps({"command": evil}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 50, evil: 1.0}) + "\n")
    page = write_report([with_results(folder, Result(evil, {evil: 1.0}, {"x": evil}))], tmp_path / "report.html").read_text()
    assert evil not in page
    assert any(chart["key"] == evil for chart in data_of(page)["charts"])
    assert tag("p", "<b>", Markup("<i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i></p>'


def test_the_same_runs_give_the_same_bytes(tmp_path):
    folder = with_results(make(tmp_path / "run"), result(3.0))
    one, two = (write_report([folder], tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert one == two


def test_pictures_are_ordered_thinned_and_carried_along(tmp_path):
    folder = make(tmp_path / "run")
    tile = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    for step in range(100, 4100, 100):
        save_grid(tile, folder / "samples" / f"step-{step:08d}-samples.png")
    save_grid(tile, folder / "samples" / "final_grid.png")
    found = pictures.series(read_run(folder))
    steps = [step for step, _ in found["samples"]]
    assert (len(steps), steps[0], steps[-1]) == (24, "100", "4000")
    assert steps == sorted(steps, key=int)
    assert [step for step, _ in found["final grid"]] == [""]
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 25


def test_a_large_picture_becomes_a_jpeg(tmp_path):
    noise = torch.randint(0, 256, (1, 500, 500, 3), dtype=torch.uint8)
    picture = Picture(noise, columns=["<all>"], note="noise").save(tmp_path / "large.png")
    uri, size, told = pictures.embed(picture)
    assert uri.startswith("data:image/jpeg;base64,")
    assert size == (500, 500)
    assert told == {"columns": ["<all>"], "note": "noise"}


# ---- build-up, orders, codebooks, the plane ----


def test_pictures_of_one_name_stand_together_and_say_what_may_be_compared(tmp_path):
    tile = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    folders = [make(tmp_path / name, "generator", extra="seed: 3\nsampling: {guidance: 2.0}") for name in ("a", "b")]
    for folder in folders:
        save_grid(tile, folder / "samples" / "step-00000010-samples.png")
        Picture(tile, ["4 · scale0", "<20>"], "grey: to come").save(folder / "samples" / "step-00000010-partial.png")
    found = gallery.groups(read_runs(folders))
    whole, parts = gallery.finished(found), gallery.partial(found, Markup("curves"))
    assert "the same classes and seed (3) in the same places" in whole
    assert (whole.count("<figure"), parts.count("<figure")) == (2, 2)
    assert "<span>4 · scale0</span><span>&lt;20&gt;</span>" in parts
    assert "grey: to come" in parts
    assert parts.endswith("curves")
    assert gallery.partial({}, Markup("")) == ""


def test_prefixes_are_rows_of_a_table_and_a_curve_over_tokens(tmp_path):
    numbers = {f"first {k}/{metric}": value * k for k in (1, 4, 16) for metric, value in (("psnr", 2.0), ("ssim", 0.01))}
    runs = read_runs([with_results(make(tmp_path / "run"), Result("prefixes", numbers, {"count": 9}))])
    charts = buildup.charts(runs)
    assert [(chart["key"], chart["x"], chart["series"][0]["step"]) for chart in charts] == [
        ("psnr", "tokens", [1, 4, 16]),
        ("ssim", "tokens", [1, 4, 16]),
    ]
    html = tables.results(runs)
    assert re.findall(r"<td>(first \d+)</td>", html) == ["first 1", "first 4", "first 16"]
    assert "9 images" not in html
    assert re.findall(r"<h2>([\w-]+)</h2>", write_report([tmp_path / "run"], tmp_path / "r.html").read_text())[2] == "Build-up"


def test_an_order_is_drawn_with_the_step_of_each_token(tmp_path):
    folder = make(tmp_path / "run", "generator")
    streams = [{"name": "patch", "grid": [2, 3], "revealed_at": [0, 2, 1, 0, 2, 1]}]
    (folder / "plan.json").write_text(json.dumps({"format": 1, "n_units": 3, "streams": streams}))
    row = {"name": "row", "grid": None, "revealed_at": list(range(40))}
    (make(tmp_path / "other", "generator") / "plan.json").write_text(json.dumps({"format": 1, "n_units": 40, "streams": [row]}))
    html = orders.section(read_runs([folder, tmp_path / "other"]))
    first, second = html.split("</figure>")[:2]
    assert re.findall(r">(\d+)</text>", first) == ["1", "3", "2", "1", "3", "2"]
    assert "3 steps for 6 tokens" in first
    assert len(re.findall("<rect", second)) == 40
    assert "40 tokens in a row" in second
    (folder / "plan.json").write_text('{"format": 1, "n_units": "many", "streams": []}')
    assert read_run(folder).notes == ["plan.json left out: no readable plan"]


def test_a_codebook_map_shows_what_is_never_used(tmp_path):
    folder = make(tmp_path / "run")
    counts = np.array([0, 8, 8, 16, 0])
    np.savez(
        folder / "codes.npz", codes=counts, codes_scale0=np.array([0, 0, 0, 4, 0]), codes_scale1=np.array([0, 8, 8, 12, 0])
    )
    run = read_run(folder)
    pixels = usage.codebook_map(usage.pooled(run.counts)).reshape(-1, 4)
    unused = [tuple(pixel[:3]) == heat.UNUSED for pixel in pixels]
    assert unused == [True, False, False, False, True, False]
    assert pixels[:, 3].tolist() == [255] * 5 + [0]
    assert usage.statistics(counts) == (0.6, pytest.approx(math.exp(1.5 * math.log(2))))
    (chart,) = usage.charts([run])
    assert chart["series"][0] | {"samples": 0} == {
        "run": 0, "split": "", "step": [0.2, 0.4, 0.6], "samples": 0, "y": [2.5, 1.25, 1.25]
    }  # fmt: skip
    html = usage.section([run], Markup(""))
    assert "3 of 5 codes" in html
    assert re.findall(r"width:([\d.]+)%", html) == ["20.0", "60.0"]
    (folder / "codes.npz").write_bytes(b"no archive")
    assert read_run(folder).notes == ["codes.npz left out: no readable counts"]


def test_every_sampler_and_student_is_a_point_of_its_protocol(tmp_path):
    generator = with_results(
        make(tmp_path / "gpt", "generator"),
        *(Result("generation", {"fd_classifier": 9.0 / g, "network_calls": 16}, {"count": 9}, {"guidance": g}) for g in (1, 2)),
        Result("generation", {"fd_classifier": 5.0, "network_calls": 16}, {"count": 5}),
    )
    ways = [("teacher", 1.0, 32), ("DD1, 1 step", 3.0, 1), ("free", 4.0, 0)]
    student = with_results(
        make(tmp_path / "student", "distill"),
        *(
            Result(
                "distillation", {"fd_classifier": fd, "evaluations": calls, "times_as_fast": 2.0}, {"count": 7}, {"way": way}
            )
            for way, fd, calls in ways
        ),
        Result("table", {f"{way}/{key}": 1.0 for way in ("a", "b") for key in ("class_accuracy", "ms_1")}, {"count": 8}),
    )
    found = plane.planes(read_runs([generator, student]))
    assert [[(point["name"], point["colour"]) for point in each["points"]] for each in found] == [
        [("gpt · guidance 1", 0), ("gpt · guidance 2", 0)],
        [("teacher", 0), ("DD1, 1 step", 1)],  # what costs nothing has no place on a logarithmic axis
        [("a", 0), ("b", 1)],
    ]
    assert found[0]["x"] == [{"key": "network_calls", "title": "Network calls / image"}]
    assert [metric["better"] for each in found for metric in each["y"]] == ["↓", "↓", "↑"]


def test_the_plane_takes_time_where_all_points_have_it_from_one_device(tmp_path):
    def axes(name, *speeds):
        numbers = {"fd_classifier": 9.0, "network_calls": 16, "evaluations": 32}
        told = ({"seconds_per_image": 0.5, "device": device, "threads": 1} if device else {} for device in speeds)
        results = (Result("generation", numbers, {}, {"guidance": g}, speed=speed) for g, speed in enumerate(told))
        (found,) = plane.planes(read_runs([with_results(make(tmp_path / name, "generator"), *results)]))
        return [metric["key"] for metric in found["x"]]

    assert axes("one", "CPU a", "CPU a") == ["seconds_per_image", "evaluations", "network_calls"]
    assert axes("two", "CPU a", "GPU b") == axes("some", "CPU a", None) == ["evaluations", "network_calls"]
