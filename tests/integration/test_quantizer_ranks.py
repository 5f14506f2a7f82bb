"""Two ranks with different latents: one codebook, and the losses and gradients of one rank with all the latents."""

import pytest
import torch
import torch.multiprocessing as mp
from tokar.models.tokenizers.quantizers import (
    IBQ,
    LFQ,
    ClusteringVectorQuantizer,
    EMAVectorQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)

MAKE = {
    # These draw vectors at random: equal on all ranks, but not those that one rank alone would draw.
    "restart": lambda: VectorQuantizer(32, 4, restart_after=2),
    "kmeans": lambda: VectorQuantizer(32, 4, kmeans_batches=2, restart_after=2),
    "ema_kmeans": lambda: EMAVectorQuantizer(32, 4, kmeans_batches=1, restart_after=2),
    # These must be what one rank with all the vectors makes of them.
    "ema": lambda: EMAVectorQuantizer(8, 4, entropy_weight=0.1),
    "clustering": lambda: ClusteringVectorQuantizer(8, 4),
    "vq": lambda: VectorQuantizer(8, 4, entropy_weight=0.1),
    "ibq": lambda: IBQ(8, 4),
    "lfq": lambda: LFQ(4, group_bits=3),
    "residual": lambda: ResidualQuantizer({"a": EMAVectorQuantizer(8, 4, l2_normalize=False), "b": LFQ(4)}),
}
DRAWN = ("restart", "kmeans", "ema_kmeans")
STEPS = 6


def latents(step, rows=20):
    generator = torch.Generator().manual_seed(100 + step)
    return 0.1 * torch.randn(2, 4, rows, generator=generator)


def train(name, seed, part):
    """State, losses and gradients after some steps on `part` of each batch."""
    torch.manual_seed(0)
    quantizer = MAKE[name]()
    torch.manual_seed(seed)
    for step in range(STEPS):
        z = latents(step)[part].requires_grad_()
        losses = quantizer(z).losses
    parameters = [z, *quantizer.parameters()]
    gradients = torch.autograd.grad(sum(losses.values()), parameters)
    return {"state": quantizer.state_dict(), "losses": losses, "z": gradients[0], "gradients": gradients[1:]}


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {name: train(name, seed=rank, part=slice(rank, rank + 1)) for name in MAKE}
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (folder,), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", MAKE)
def test_all_ranks_have_one_codebook(ranks, name):
    first, second = (rank[name]["state"] for rank in ranks)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", DRAWN)
def test_codes_were_drawn(ranks, name):
    torch.manual_seed(0)
    assert not torch.equal(ranks[0][name]["state"]["codebook"], MAKE[name]().codebook)


def test_vectors_of_every_rank_are_drawn(ranks):
    """The codes restarted in the last step lie on latents of both ranks."""
    state = ranks[0]["restart"]["state"]
    everything = torch.nn.functional.normalize(torch.cat([latents(step) for step in range(STEPS)], dim=2), dim=1)
    for rank in range(2):
        distance = torch.cdist(state["codebook"], everything[rank].t()).min(-1).values
        assert (distance < 1e-4).any()


@pytest.mark.parametrize("name", [name for name in MAKE if name not in DRAWN])
def test_two_ranks_are_one_with_all_latents(ranks, name):
    alone = train(name, 0, slice(None))
    for key, value in ranks[0][name]["state"].items():
        torch.testing.assert_close(value, alone["state"][key])
    for loss, value in alone["losses"].items():
        torch.testing.assert_close(sum(rank[name]["losses"][loss] for rank in ranks) / 2, value)
    # Data-parallel training averages gradients over ranks; that of a latent belongs to one of them.
    for ours, whole in zip(zip(*(rank[name]["gradients"] for rank in ranks), strict=True), alone["gradients"], strict=True):
        torch.testing.assert_close(sum(ours) / 2, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([rank[name]["z"] for rank in ranks]) / 2, alone["z"], rtol=1e-4, atol=1e-6)
