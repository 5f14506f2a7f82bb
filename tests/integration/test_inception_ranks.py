"""Images through Inception on three ranks, in small batches and after an interruption: the numbers of one process.

All measures that read it, against statistics from a file and the images beside them. `test_evaluate_ranks.py` has the commands.
"""

import hashlib
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from tokar.conf.protocols import Protocol
from tokar.errors import UserError
from tokar.evaluate.generation import evaluate_samples, score_of
from tokar.evaluate.inception import POOL_DIM, SPATIAL_DIM, FIDInception
from tokar.evaluate.inception_features import TensorFlowInceptionFeatures
from tokar.evaluate.protocols import Judging, reference_of
from tokar.evaluate.ranks import Pace

COUNT, REAL = 6, 5
PROTOCOL = {
    "name": "gfid-50k", "of": ["samples"], "features": "inception_tf1", "neighbours": 2, "split_size": 4, "subsets": 3,
    "subset_size": 4, "measures": ["frechet", "spatial_frechet", "inception_score", "precision_recall", "kid"],
}  # fmt: skip


class Interrupted(Exception):
    pass


def source(images, limit=COUNT):
    """Images by number, until `limit` batches were given."""

    def give(batches):
        for count, numbers in enumerate(batches):
            if count == limit:
                raise Interrupted
            yield {"image": images[numbers]}

    return give


def worker(rank, judging, images, folder):
    """Every rank is stopped after its first image, then all go on."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    pace = Pace(batch_size=1, save_every=1, folder=folder / "states")
    with suppress(Interrupted):
        score_of(lambda: judging.score(COUNT), source(images, limit=1), COUNT, pace)
    assert (pace.folder / f"rank-{rank:05d}.pt").exists()
    torch.distributed.barrier()
    score_of(lambda: judging.score(COUNT), source(images, limit=1), COUNT, pace)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_batches_and_interruptions_change_nothing(tmp_path):
    torch.manual_seed(0)
    network = FIDInception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # else the features of all images are nearly one
    weights = tmp_path / "inception.safetensors"
    save_file(network.state_dict(), weights)
    with pytest.raises(UserError, match=r"is not the published file; give pt_inception-2015-12-05-6726825d\.pth, or say"):
        TensorFlowInceptionFeatures(weights)
    features = TensorFlowInceptionFeatures(weights, hashlib.sha256(weights.read_bytes()).hexdigest())
    judging = Judging(Protocol.model_validate(PROTOCOL), features)

    random = np.random.default_rng(0)
    real, fake = random.integers(0, 256, (2, COUNT, 12, 12, 3), dtype=np.uint8)
    given = {"mu": np.zeros(POOL_DIM), "sigma": np.eye(POOL_DIM), "mu_s": np.zeros(SPATIAL_DIM), "sigma_s": np.eye(SPATIAL_DIM)}
    np.savez(tmp_path / "reference.npz", arr_0=real[:REAL], **given)
    reference = reference_of(judging, tmp_path / "reference.npz", pytest.fail, Pace())
    images = torch.from_numpy(fake // 2)

    whole = score_of(lambda: judging.score(COUNT), source(images), COUNT, Pace(batch_size=COUNT))
    mp.start_processes(worker, (judging, images, tmp_path), nprocs=3, start_method="fork")
    again = score_of(lambda: judging.score(COUNT), source(images, limit=0), COUNT, Pace(folder=tmp_path / "states"))

    expected, found = (evaluate_samples(score, COUNT, reference) for score in (whole, again))
    assert set(expected.numbers) == {
        "fd_inception", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std"
    }  # fmt: skip
    assert expected.numbers["fd_inception"] > 1
    assert expected.numbers["inception_score"] > 1
    assert found.numbers == pytest.approx(expected.numbers, rel=1e-6, abs=1e-6)
    assert found.protocol_id == expected.protocol_id
