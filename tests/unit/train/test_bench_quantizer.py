import pytest
from tokar.train.bench_quantizer import bench_quantizer


def test_search_holds_no_more_than_a_chunk():
    measured = bench_quantizer(0.0, rows=4096, codebook_size=2048)
    assert set(measured) == {"search_ms", "plain_ms", "ratio", "search_mib", "plain_mib"}
    assert all(value > 0 for value in measured.values())
    assert measured["plain_mib"] >= 4096 * 2048 * 4 / 2**20, "all scores"
    assert measured["search_mib"] < 2, "1 MiB of scores, the result, and little else"
    assert measured["ratio"] == pytest.approx(measured["plain_ms"] / measured["search_ms"])
