import torch
from tokar.train.pieces import Piece, share, take_stock, trained, whole_pieces
from torch import nn


def test_a_piece_reads_and_writes_its_elements_in_any_memory_format():
    torch.manual_seed(0)
    value = torch.randn(4, 3, 2, 2)
    whole = Piece("w", value.shape, 0, value.numel(), 0)
    stored = value.to(memory_format=torch.channels_last)
    assert torch.equal(whole.read(stored), value)
    target = torch.zeros_like(stored)
    whole.write(target, value.flatten())
    assert torch.equal(target, value)
    assert target.is_contiguous(memory_format=torch.channels_last)


def test_a_piece_of_a_flat_master():
    flat = torch.arange(10.0)
    piece = Piece("w", torch.Size([3, 4]), 5, 4, 0, 2)
    assert piece.key == "w@5"
    assert piece.read(flat).tolist() == [2, 3, 4, 5]
    piece.write(flat, torch.zeros(4))
    assert flat.tolist() == [0, 1, 0, 0, 0, 0, 6, 7, 8, 9]


def test_a_whole_parameter_in_a_flat_master_has_its_shape():
    piece = Piece("w", torch.Size([2, 2]), 0, 4, 0, 3)
    assert piece.key == "w"
    assert piece.read(torch.arange(8.0)).tolist() == [[3, 4], [5, 6]]


def test_ranks_share_what_each_of_them_holds():
    pieces = whole_pieces(nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))))
    for world in (1, 2, 4, 7):
        shares = [share(pieces, rank, world) for rank in range(world)]
        assert [piece for part in shares for piece in part] == pieces
        assert max(sum(piece.count for piece in part) for part in shares) <= sum(p.count for p in pieces) / world + 64


def test_stock_is_taken_of_tied_weights_and_of_what_is_not_trained():
    module = nn.ModuleDict({"one": nn.Linear(3, 3, bias=False), "two": nn.Linear(3, 3, bias=False), "norm": nn.BatchNorm1d(3)})
    module["two"].weight = module["one"].weight
    module["norm"].weight.requires_grad_(False)
    stock = take_stock(module)
    assert stock.names == {"one.weight": ["one.weight", "two.weight"], "norm.bias": ["norm.bias"]}
    assert stock.shapes["norm.running_mean"] == torch.Size([3])
    assert [name for name, _ in trained(module)] == ["one.weight", "norm.bias"]
