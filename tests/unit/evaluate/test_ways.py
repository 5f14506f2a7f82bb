"""What needs no training: frequencies of the teacher's samples, and a teacher that stops early."""

import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate.dependence import over_pairs, pair_information
from tokar.evaluate.ways import Frequencies, independent_way, skipping_way, teacher_way
from tokar.models.samplers.decode import Tally
from toy_teacher import TableTeacher, distance

SAMPLING = {"guidance": 1.0}


def test_tokens_come_from_samples_of_their_class():
    """Of class 1 the rows are [2, 3], [6, 7], [8, 9]: a number in [0, 1) points at one of them for each token."""
    codes, labels = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]), torch.tensor([0, 1, 0, 1, 1])
    frequencies = Frequencies(codes, labels, 2)
    numbers = torch.tensor([[0.0, 0.99], [0.4, 0.0], [0.5, 0.49]])
    assert frequencies.draw(torch.tensor([1, 1, 0]), numbers).tolist() == [[2, 9], [6, 3], [4, 1]]
    with pytest.raises(UserError, match="no sample of class 2 among 5"):
        Frequencies(codes, labels, 3)


def test_independent_tokens_have_the_teachers_marginals_and_nothing_else():
    teacher, count = TableTeacher(n_tokens=3), 20_000
    labels = torch.zeros(count, dtype=torch.int64)
    codes = teacher_way(teacher, SAMPLING, 1)(labels, range(count), Tally())
    tally = Tally()
    found = independent_way(Frequencies(codes, labels, 1), 3, 0)(labels, range(count), tally)
    assert (tally.calls, tally.evaluations, tally.batches) == (0, 0, 1)
    assert distance(teacher.share(found), teacher.independent()) < 0.03
    assert over_pairs(pair_information(found, labels, 4)) < 0.01 < 0.1 < over_pairs(pair_information(codes, labels, 4))


def test_a_teacher_that_stops_early():
    """The first tokens are its own, the others those that are guessed; its cost is theirs alone."""
    teacher, labels, ids = TableTeacher(n_tokens=4), torch.zeros(50, dtype=torch.int64), range(50)
    whole = teacher_way(teacher, SAMPLING, 0)(labels, ids, Tally())
    frequencies = Frequencies(torch.full((1, 4), 3), labels[:1], 1)
    tally = Tally()
    found = skipping_way(teacher, frequencies, SAMPLING, 0, 1)(labels, ids, tally)
    assert torch.equal(found[:, :3], whole[:, :3])
    assert found[:, 3].tolist() == [3] * 50
    assert (tally.calls, tally.batches) == (3, 1)
    for units in (0, 4):
        with pytest.raises(UserError, match="skip 1 to 3"):
            skipping_way(teacher, frequencies, SAMPLING, 0, units)
