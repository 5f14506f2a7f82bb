import torch
from tokar.train.randomness import sample_normals, sample_uniform, sample_uniforms, seed_step


def test_a_step_draws_the_same_numbers_whenever_it_is_reached():
    seed_step(3, 17, 0)
    first = torch.rand(4)
    torch.rand(100)
    seed_step(3, 17, 0)
    assert torch.equal(torch.rand(4), first)


def test_steps_ranks_and_seeds_draw_different_numbers():
    drawn = set()
    for seed, step, rank in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]:
        seed_step(seed, step, rank)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 6


def test_a_samples_number_does_not_depend_on_its_batch():
    index, epoch = torch.arange(1000), torch.full((1000,), 5)
    whole = sample_uniform(7, epoch, index, salt=1)
    parts = torch.cat([sample_uniform(7, epoch[a:b], index[a:b], salt=1) for a, b in ((0, 300), (300, 1000))])
    assert torch.equal(whole, parts)


def test_sample_numbers_are_uniform_and_change_with_everything():
    index, epoch = torch.arange(20000), torch.zeros(20000, dtype=torch.long)
    base = sample_uniform(0, epoch, index, salt=1)
    assert base.min() >= 0
    assert base.max() < 1
    assert torch.allclose(torch.histc(base, 10, 0, 1) / 20000, torch.full((10,), 0.1), atol=0.01)
    others = [sample_uniform(1, epoch, index, 1), sample_uniform(0, epoch + 1, index, 1), sample_uniform(0, epoch, index, 2)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert abs(correlation) < 0.03


def test_several_numbers_of_a_sample_are_its_own_and_independent():
    index, epoch = torch.arange(5000), torch.full((5000,), 3)
    drawn = sample_uniforms(7, epoch, index, 2, 4)
    assert torch.equal(drawn[100:103], sample_uniforms(7, epoch[100:103], index[100:103], 2, 4))
    assert torch.equal(drawn[:, :2], sample_uniforms(7, epoch, index, 2, 2))
    assert 0 <= drawn.min() <= drawn.max() < 1
    neighbours = torch.stack((drawn[:-1, 0], drawn[1:, 0]))
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 0.06
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.06
    assert not torch.equal(drawn, sample_uniforms(7, epoch + 1, index, 2, 4))


def test_normal_numbers_of_a_sample_are_its_own_and_normal():
    index, epoch = torch.arange(4000), torch.full((4000,), 3)
    drawn = sample_normals(7, epoch, index, 2, 5)
    assert torch.equal(drawn[100:103], sample_normals(7, epoch[100:103], index[100:103], 2, 5))
    assert (torch.corrcoef(drawn.T) - torch.eye(5)).abs().max() < 0.06
    inside = [(drawn.abs() < limit).double().mean() for limit in (0.5, 1, 2, 3)]
    expected = torch.tensor([0.38292, 0.68269, 0.95450, 0.99730], dtype=torch.float64)
    assert (torch.stack(inside) - expected).abs().max() < 0.012
