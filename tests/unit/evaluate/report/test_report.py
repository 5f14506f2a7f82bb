import json
import re

import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate.images import save_grid
from tokar.evaluate.protocol import Result
from tokar.evaluate.report import curves, names, pictures, tables, write_report
from tokar.evaluate.report.markup import Markup, tag
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


def test_colours_tell_runs_of_one_stage_apart(tmp_path):
    runs = read_runs(
        [make(tmp_path / name, stage) for name, stage in (("a", "tokenizer"), ("b", "generator"), ("c", "tokenizer"))]
    )
    assert [run.colour for run in runs] == [0, 0, 1]


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
    uri, size = pictures.embed(save_grid(noise, tmp_path / "large.png"))
    assert uri.startswith("data:image/jpeg;base64,")
    assert size == (500, 500)
