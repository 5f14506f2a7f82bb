import json

import pytest
from tokar.errors import UserError
from tokar.train.bench_table import columns_of, compared, overview


def result(path, **rows):
    path.write_text(json.dumps({"device": "CPU", "commit": path.stem, "threads": 1, "rows": rows}))
    return path


def test_rows_become_one_table_of_the_columns_that_they_share():
    rows = {"loader": {"images_per_s": 12345.6, "cpus": 2.0}, "student": {"images_per_s": 1.23456, "ratio": 0.5}}
    assert overview(rows) == [("", "images/s", "ratio"), ("loader", "12346", ""), ("student", "1.235", "0.5")]
    assert columns_of(overview(rows)).splitlines()[1:] == ["loader      12346       ", "student     1.235    0.5"]


def test_two_results_side_by_side(tmp_path):
    before = result(tmp_path / "a.json", loader={"images_per_s": 10.0, "gone": 1.0}, old={"ratio": 1.0}, zero={"x": 0.0})
    after = result(tmp_path / "b.json", loader={"images_per_s": 25.0}, zero={"x": 1.0})
    head, *rows = compared(before, after)
    assert head[2:] == (str(before), str(after), "second / first")
    assert rows == [
        ("commit", "", "a", "b", "differs"), ("device", "", "CPU", "CPU", ""), ("threads", "", "1", "1", ""),
        ("loader", "images_per_s", "10", "25", "2.500"), ("zero", "x", "0", "1", ""),
    ]  # fmt: skip


def test_what_cannot_be_compared_is_told(tmp_path):
    before = result(tmp_path / "a.json", loader={"images_per_s": 10.0})
    with pytest.raises(UserError, match="have no row in common"):
        compared(before, result(tmp_path / "b.json", sampler={"images_per_s": 1.0}))
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(UserError, match="no readable result of a bench; give two files"):
        compared(before, tmp_path / "c.json")
