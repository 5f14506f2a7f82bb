"""The same images through one process and through three: the same numbers on every rank."""

import json

import pytest
import torch
import torch.multiprocessing as mp
from tokar.evaluate.features import ClassifierFeatures
from tokar.evaluate.generation import evaluate_generation, gaussian_of
from tokar.models.build import save_model
from tokar.models.classifier import Classifier

WORLD = 3


def measure(folder, rank, world):
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, 256, (40, 16, 16, 3), dtype=torch.uint8, generator=generator) // part for part in (1, 2))
    network = ClassifierFeatures(folder)
    across = {"across_ranks": world > 1}
    reference = gaussian_of([{"image": real[rank::world]}], network, **across)
    samples = [{"image": fake[rank::world], "label": (torch.arange(40) % 4)[rank::world]}]
    return evaluate_generation(samples, reference, network, judge=network, **across).to_dict()


def worker(rank, folder, port):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD)
    result = measure(folder, rank, WORLD)
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_three_ranks_measure_what_one_does(tmp_path):
    node = {"_target_": "tokar.models.classifier.Classifier", "image_size": 16, "num_classes": 4, "width": 8}
    torch.manual_seed(0)
    save_model(tmp_path, node, Classifier(16, 4, width=8).state_dict())
    alone = measure(tmp_path, 0, 1)
    mp.start_processes(worker, (tmp_path, free_port()), nprocs=WORLD, start_method="fork")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(WORLD)]
    assert ranks[0] == ranks[1] == ranks[2]
    assert ranks[0]["numbers"] == pytest.approx(alone["numbers"], rel=1e-6)
    assert ranks[0]["protocol_id"] == alone["protocol_id"]
