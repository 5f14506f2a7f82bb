import numpy as np
import pytest
import scipy.linalg
import torch
from tokar.errors import UserError
from tokar.evaluate.frechet import Gaussian, GaussianStatistics, cached_gaussian, frechet_distance


def features(count, dim, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing * scale + seed


def gaussian(rows):
    statistics = GaussianStatistics(rows.shape[1])
    statistics.update(rows)
    return statistics.gaussian()


def scipy_distance(a, b):
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    shift = (a.mean - b.mean).square().sum().item()
    return shift + (a.covariance.trace() + b.covariance.trace()).item() - 2 * np.trace(root)


@pytest.mark.parametrize("dim", [1, 8, 128])
def test_distance_agrees_with_scipy(dim):
    a, b = gaussian(features(4 * dim + 5, dim, seed=0)), gaussian(features(3 * dim + 5, dim, seed=1, scale=0.5))
    assert frechet_distance(a, b) == pytest.approx(scipy_distance(a, b), rel=1e-6)


def test_rank_deficient_covariances_have_the_exact_distance():
    """Covariances diagonal in one rotated basis, half their spectrum zero: the distance is known in closed form."""
    rotation, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    left, right = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    left[:32], right[16:48] = torch.linspace(1, 4, 32, dtype=torch.float64), torch.linspace(2, 9, 32, dtype=torch.float64)
    a = Gaussian(torch.zeros(64).double(), rotation @ left.diag() @ rotation.T, 100)
    b = Gaussian(torch.ones(64).double(), rotation @ right.diag() @ rotation.T, 100)
    expected = 64 + (left.sqrt() - right.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_features_give_zero_to_themselves():
    few = gaussian(features(10, 64, seed=0))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9 * few.covariance.trace().item())


def test_a_distance_needs_no_spread():
    still = gaussian(torch.ones(3, 4))
    assert frechet_distance(still, gaussian(torch.zeros(3, 4))) == 4


def test_statistics_agree_with_numpy_far_from_the_origin():
    rows = features(200, 6, seed=2) + 1e6
    statistics = GaussianStatistics(6)
    for part in rows.split(17):
        statistics.update(part)
    result = statistics.gaussian()
    np.testing.assert_allclose(result.mean, rows.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-8)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_merge_to_the_whole(ranks):
    rows = features(50, 5, seed=3)
    total = GaussianStatistics(5)
    for rank in range(ranks):
        part = GaussianStatistics(5)
        part.update(rows[rank::ranks])
        total.merge(part)
    total.merge(GaussianStatistics(5))
    torch.testing.assert_close(total.gaussian().covariance, gaussian(rows).covariance, rtol=1e-12, atol=1e-12)
    assert total.count == 50


def test_an_interrupted_set_goes_on():
    rows = features(40, 5, seed=4)
    first, second, whole = GaussianStatistics(5), GaussianStatistics(5), GaussianStatistics(5)
    first.update(rows[:20])
    second.load_state_dict(first.state_dict())
    second.update(rows[20:])
    whole.update(rows[:20])
    whole.update(rows[20:])
    assert torch.equal(second.gaussian().covariance, whole.gaussian().covariance)


def test_saved_statistics_come_back(tmp_path):
    one = gaussian(features(20, 4, seed=5))
    path = Gaussian(one.mean, one.covariance, one.count, {"features": {"name": "x"}}).save(tmp_path / "ref.npz")
    back = Gaussian.load(path)
    assert torch.equal(back.mean, one.mean)
    assert torch.equal(back.covariance, one.covariance)
    assert (back.count, back.protocol) == (20, {"features": {"name": "x"}})


def test_a_published_file_is_known_by_its_hash(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(9))
    reference = Gaussian.load(tmp_path / "ref.npz")
    assert (reference.count, len(reference.protocol["sha256"])) == (0, 64)


def test_unreadable_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mean=np.zeros(3))
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.eye(4))
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 broken")
    for name, word in (("a", "no readable"), ("b", "do not fit"), ("c", "no readable"), ("d", "no readable")):
        with pytest.raises(UserError, match=word):
            Gaussian.load(tmp_path / f"{name}.npz")


def test_what_cannot_be_compared_is_refused():
    one, other = gaussian(features(9, 4, seed=0)), gaussian(features(9, 5, seed=0))
    with pytest.raises(UserError, match="4 and 5 wide"):
        frechet_distance(one, other)
    named = [Gaussian(one.mean, one.covariance, 9, {"features": {"weights_sha256": text}}) for text in ("a", "b")]
    with pytest.raises(UserError, match="weights_sha256"):
        frechet_distance(*named)
    with pytest.raises(UserError, match="at least two"):
        gaussian(torch.zeros(1, 4))
    with pytest.raises(UserError, match="not finite"):
        gaussian(torch.tensor([[0.0, torch.nan]]))


def test_statistics_are_cached_by_what_they_are_of(tmp_path):
    made = []

    def compute():
        made.append(1)
        return gaussian(features(9, 4, seed=len(made)))

    first = cached_gaussian(tmp_path, {"data": "a", "count": 9}, compute)
    again = cached_gaussian(tmp_path, {"count": 9, "data": "a"}, compute)
    other = cached_gaussian(tmp_path, {"data": "b", "count": 9}, compute)
    assert len(made) == 2
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)
