"""What goes into a score, and how often, when starts are killed anywhere and go on with another number of ranks."""

import numpy as np
import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate import ranks
from tokar.evaluate.ranks import Pace, accumulate


class Seen:
    """How often each image came, and their sum."""

    def __init__(self):
        self.times, self.total = torch.zeros(50, dtype=torch.int64), 0.0

    def update(self, batch):
        self.times[batch["index"]] += 1
        self.total += batch["image"].double().sum().item()

    def state_dict(self):
        return {"times": self.times.clone(), "total": self.total}

    def merge(self, state):
        self.times += state["times"]
        self.total += state["total"]


class Killed(Exception):
    pass


TOLD = {}
"""What the first rank of a start told the others."""


def source(limit=None, asked=None):
    """Images that are their numbers; the start dies when it wants more than `limit` batches."""

    def give(batches):
        for count, numbers in enumerate(batches):
            if limit is not None and count == limit:
                raise Killed
            if asked is not None:
                asked.extend(numbers)
            yield {"image": torch.from_numpy(numbers)}

    return give


def run(folder, rank=0, world=1, limit=None, monkeypatch=None, asked=None, wanted=None):
    """One rank of a start, alone: what it would have given the others, it returns."""
    monkeypatch.setattr(ranks, "this_rank", lambda: (rank, world))
    monkeypatch.setattr(ranks, "_as_first", lambda held: TOLD.update({0: held.copy()}) or held if rank == 0 else TOLD[0])
    monkeypatch.setattr(ranks, "merge_ranks", lambda make, score: score)
    return accumulate(Seen, source(limit, asked), 50, Seen.update, Pace(4, 10, folder), wanted)


@pytest.mark.parametrize("limit", [0, 1, 3, 7, 12])
def test_a_start_that_was_killed_goes_on(tmp_path, monkeypatch, limit):
    with pytest.raises(Killed):
        run(tmp_path, limit=limit, monkeypatch=monkeypatch)
    asked = []
    total = run(tmp_path, monkeypatch=monkeypatch, asked=asked)
    assert (total.times == 1).all()
    assert total.total == sum(range(50))
    assert len(asked) == 50 - 10 * (limit // 3)  # parts of ten images are three batches
    assert run(tmp_path, limit=0, monkeypatch=monkeypatch).total == total.total  # no image is asked for again


def test_another_number_of_ranks_goes_on(tmp_path, monkeypatch):
    """Three ranks, two of them killed somewhere; two, both killed; then one."""
    for rank, limit in ((0, 3), (1, 2)):
        with pytest.raises(Killed):
            run(tmp_path, rank, 3, limit, monkeypatch)
    run(tmp_path, 2, 3, None, monkeypatch)
    assert len(list(tmp_path.iterdir())) == 2  # the second had finished no part
    with pytest.raises(Killed):
        run(tmp_path, 0, 2, 0, monkeypatch)  # rank 0 has merged and written; the old file of rank 2 is still there
    with pytest.raises(Killed):
        run(tmp_path, 1, 2, 1, monkeypatch)
    total = run(tmp_path, monkeypatch=monkeypatch)
    assert (total.times == 1).all()
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00000.pt"]


def test_a_rank_goes_by_what_the_first_has_found_though_its_node_sees_another_folder(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run(tmp_path / "one", limit=3, monkeypatch=monkeypatch)
    here, there = [], []
    first = run(tmp_path / "one", 0, 2, monkeypatch=monkeypatch, asked=here)
    second = run(tmp_path / "other", 1, 2, monkeypatch=monkeypatch, asked=there)
    assert here + there == [*range(10, 20), *range(30, 40), *range(20, 30), *range(40, 50)]
    assert (first.times + second.times == 1).all()


def test_only_wanted_images_are_asked_for(tmp_path, monkeypatch):
    wanted, asked = np.arange(50) % 5 == 2, []
    total = run(tmp_path, monkeypatch=monkeypatch, asked=asked, wanted=wanted)
    assert asked == list(range(2, 50, 5))
    assert torch.equal(total.times.bool(), torch.from_numpy(wanted))
    assert run(tmp_path, limit=0, monkeypatch=monkeypatch, wanted=wanted).total == total.total


def test_states_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="a state of 50 images, not 60"):
        accumulate(Seen, source(), 60, Seen.update, Pace(4, 10, tmp_path))
    (tmp_path / "rank-00000.pt").write_bytes(b"PK broken")
    with pytest.raises(UserError, match=r"rank-00000\.pt: no readable state of an evaluation; delete the file"):
        run(tmp_path, monkeypatch=monkeypatch)
