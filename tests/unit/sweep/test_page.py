"""The page of a sweep: what it holds, and that it is drawn in a real browser."""

import json
import re
import shutil
import subprocess

import pytest
from tokar.conf.space import Dimension
from tokar.errors import UserError
from tokar.sweep.folder import FAILED, FINISHED, PRUNED
from tokar.sweep.page import axis, write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--virtual-time-budget=4000", "--dump-dom")  # fmt: skip


@pytest.fixture
def sweep(make, log):
    made = make(6)
    for number, state in enumerate([FINISHED] * 4 + [PRUNED, FAILED]):
        log(made, number, 3.0, 2.0, 1.0 + (number - 2) ** 2)
        made.write(made.point(number), state=state, tail=("<b>no disk</b>",) if state == FAILED else ())
    return made


def data(page):
    return json.loads(re.search(r'id="sweep-data">(.*?)</script>', page, re.DOTALL)[1])


def test_points_axes_and_failures(sweep, tmp_path):
    page = write_page(sweep.path, tmp_path / "out" / "page.html").read_text()
    assert re.findall(r"<h2>(\w+)</h2>", page) == ["Parameters", "Curves", "Points", "Failures"]
    seed, loss = data(page)["axes"]
    assert (seed["name"], seed["low"], seed["high"], seed["ticks"]) == ("seed", 0, 5, [0, 1, 2, 3, 4, 5])
    assert (loss["name"], loss["low"], loss["high"], loss["down"]) == ("val/loss", 1, 5, True)
    points = {point["number"]: point for point in data(page)["points"]}
    assert points[2] == {"number": 2, "colour": 0, "values": [2.0, 1.0]}
    assert points[4] == {"number": 4, "colour": None, "values": [4.0, None]}
    assert re.findall(r'<tr data-point="(\d)"', page) == ["2", "1", "3", "0", "4", "5"]
    assert "best of 4, by last val/loss" in page
    assert "&lt;b&gt;no disk&lt;/b&gt;" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)


def test_axes_are_logarithmic_where_numbers_span_much_and_lists_where_they_are_none():
    assert axis(Dimension("x", low=1e-4, high=1e-1), [0.001, 0.01])["log"]
    assert (axis(Dimension("x", low=1e-4, high=1e-1), [0.001])["low"], axis(Dimension("x"), [1.0, 2.0])["log"]) == (1e-4, False)
    assert axis(Dimension("x"), ["adam", 3.0]) == {"name": "x", "options": ["3.0", "adam"]}


def test_a_sweep_without_points(make, tmp_path):
    with pytest.raises(UserError, match="no points yet"):
        write_page(make(0).path, tmp_path / "page.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_draws_and_filters_it(sweep, tmp_path):
    page = write_page(sweep.path, tmp_path / "page.html")
    act = """
      const say = (name, value) => { document.body.dataset[name] = value; };
      const axes = document.querySelectorAll('#parallel .hit'), box = axes[1].getBoundingClientRect();
      axes[1].setPointerCapture = () => {};
      const fire = (kind, clientY) => axes[1].dispatchEvent(new PointerEvent(kind, { clientX: box.left + 10, clientY }));
      fire('pointerdown', box.top); fire('pointermove', box.top + 20); fire('pointerup', box.top + 20);
      say('kept', [...document.querySelectorAll('tr[data-point]')].filter((r) => !r.hidden).map((r) => r.dataset.point).join());
      fire('pointerdown', box.top + 9); fire('pointerup', box.top + 9);
      say('back', [...document.querySelectorAll('tr[data-point]')].filter((r) => !r.hidden).length);
      document.querySelector('tr[data-point="3"]').dispatchEvent(new PointerEvent('pointerenter'));
      say('chosen', document.querySelectorAll('path.chosen').length);
      say('wide', document.documentElement.scrollWidth > innerWidth);
    """
    page.write_text(page.read_text().replace("</body>", f"<script>{act}</script></body>"))
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert 'data-ready="true"' in dom
    assert "data-error" not in dom
    assert 'data-lines="6"' in dom
    assert "NaN" not in re.search(r'<div id="parallel".*?</svg>', dom, re.DOTALL)[0]
    seen = dict(re.findall(r' data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom)[0]))
    assert seen == {"kept": "2", "back": "6", "chosen": "1", "wide": "false"}
