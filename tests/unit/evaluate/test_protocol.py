import json
import math

import pytest
from tokar.errors import UserError
from tokar.evaluate.protocol import Result, versions

PROTOCOL = {"features": {"name": "classifier", "weights_sha256": "ab"}, "count": 100}


def test_a_result_survives_the_disk(tmp_path):
    result = Result("generation", {"fd_classifier": 1 / 3, "psnr": math.nan}, PROTOCOL, {"run": "a", "guidance": 2.0})
    loaded = Result.load(result.save(tmp_path / "evaluation" / "x.json"))
    assert loaded.numbers["fd_classifier"] == 1 / 3
    assert math.isnan(loaded.numbers["psnr"])
    assert (loaded.protocol_id, loaded.subject, loaded.environment) == (result.protocol_id, result.subject, versions())
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["x.json"]


def test_the_file_is_strict_json(tmp_path):
    path = Result("generation", {"psnr": math.inf}, PROTOCOL).save(tmp_path / "x.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["numbers"] == {"psnr": None}


def test_another_protocol_has_another_id_and_another_subject_has_not():
    one = Result("generation", {}, PROTOCOL, {"run": "a"})
    assert one.protocol_id == Result("generation", {}, dict(reversed(PROTOCOL.items())), {"run": "b"}).protocol_id
    assert one.protocol_id != Result("generation", {}, {**PROTOCOL, "count": 101}).protocol_id


@pytest.mark.parametrize("content", ["", "[]", '{"name": "x"}', '{"numbers": []}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match="no readable result"):
        Result.load(path)


def test_an_edited_protocol_is_refused(tmp_path):
    path = Result("generation", {"psnr": 1.0}, PROTOCOL).save(tmp_path / "x.json")
    path.write_text(path.read_text().replace('"count": 100', '"count": 50000'))
    with pytest.raises(UserError, match="does not match its id"):
        Result.load(path)
