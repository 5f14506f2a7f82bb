import numpy as np
import pytest
import scipy.linalg
import torch
from tokar.errors import UserError
from tokar.evaluate.frechet import Gaussian, GaussianStatistics, frechet_distance, load_gaussians, save_gaussians


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
    a = Gaussian(torch.zeros(64).double(), rotation @ left.diag() @ rotation.T)
    b = Gaussian(torch.ones(64).double(), rotation @ right.diag() @ rotation.T)
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
        total.merge(part.state_dict())
    total.merge(GaussianStatistics(5).state_dict())
    torch.testing.assert_close(total.gaussian().covariance, gaussian(rows).covariance, rtol=1e-12, atol=1e-12)
    assert total.count == 50


def test_an_interrupted_set_goes_on():
    rows = features(40, 5, seed=4)
    first, second, whole = GaussianStatistics(5), GaussianStatistics(5), GaussianStatistics(5)
    first.update(rows[:20])
    second.merge(first.state_dict())
    second.update(rows[20:])
    whole.update(rows[:20])
    whole.update(rows[20:])
    assert torch.equal(second.gaussian().covariance, whole.gaussian().covariance)


def test_statistics_are_written_in_the_usual_layout(tmp_path):
    pooled, spatial = gaussian(features(20, 4, seed=5)), gaussian(features(20, 3, seed=6))
    path = save_gaussians({"frechet": pooled, "spatial_frechet": spatial}, tmp_path / "ref.npz")
    assert sorted(np.load(path)) == ["mu", "mu_s", "sigma", "sigma_s"]
    back = load_gaussians(path)
    assert torch.equal(back["frechet"].mean, pooled.mean)
    assert torch.equal(back["spatial_frechet"].covariance, spatial.covariance)


def test_a_file_gives_what_it_has(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32), arr_0=np.zeros(9))
    assert list(load_gaussians(tmp_path / "a.npz")) == ["frechet"]
    np.savez(tmp_path / "b.npz", arr_0=np.zeros(9))
    assert load_gaussians(tmp_path / "b.npz") == {}


def test_unreadable_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(4))
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 broken")
    for name, word in (("a", "do not fit"), ("b", "no readable"), ("c", "no readable")):
        with pytest.raises(UserError, match=word):
            load_gaussians(tmp_path / f"{name}.npz")


def test_what_cannot_be_compared_is_refused():
    one, other = gaussian(features(9, 4, seed=0)), gaussian(features(9, 5, seed=0))
    with pytest.raises(UserError, match="4 and 5 wide"):
        frechet_distance(one, other)
    with pytest.raises(UserError, match="at least two"):
        gaussian(torch.zeros(1, 4))
    with pytest.raises(UserError, match="not finite"):
        gaussian(torch.tensor([[0.0, torch.nan]]))
