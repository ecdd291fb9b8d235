"""parallel/shard.py, beside full tensors of which every element holds its own number."""

import itertools

import pytest
import torch
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split

from parallel.shard import Shard, local, shard_of, shard_of_shard, sharded


def numbered(shape):
    """Every element is its own index in the tensor, so a shard tells where it was cut out."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def by_hand(global_shape, offsets, shape):
    """The numbers a shard of numbered(global_shape) must hold: an index of each element, one by
    one."""
    found = torch.empty(shape, dtype=torch.int64)
    for at in itertools.product(*map(range, shape)):
        index = 0
        for size, offset, i in zip(global_shape, offsets, at):
            index = index * size + offset + i
        found[at] = index
    return found


SHARDS = [
    ((7,), (3,), (2,)),
    ((4, 6), (0, 3), (4, 3)),
    ((4, 6), (2, 0), (2, 6)),
    ((5, 4, 3), (1, 2, 0), (3, 2, 3)),
    ((4, 6), (0, 0), (4, 6)),
    ((4, 6), (4, 0), (0, 6)),  # of a rank that has nothing
    ((4, 6), (6, 0), (0, 6)),  # where ranks before it have nothing either
    ((), (), ()),
]


@pytest.mark.parametrize(("global_shape", "offsets", "shape"), SHARDS)
def test_a_shard_is_the_elements_its_offsets_say(global_shape, offsets, shape):
    full = numbered(global_shape)
    found = Shard(global_shape, offsets).narrow(full, shape)
    assert torch.equal(found, by_hand(global_shape, offsets, shape))
    found.fill_(-1)  # a view: what is written into it is in the full tensor
    assert (full == -1).sum() == found.numel()


def test_a_shard_is_of_a_tensor_of_its_global_shape_alone():
    with pytest.raises(AssertionError):
        Shard((4, 6), (0, 3)).narrow(numbered((4, 3)), (4, 3))
    with pytest.raises(RuntimeError):
        Shard((4, 6), (0, 4)).narrow(numbered((4, 6)), (4, 3))


def test_a_shard_of_a_shard_lies_where_both_offsets_lead():
    full = numbered((6, 8))
    outer, inner = Shard((6, 8), (0, 4)), Shard((6, 4), (3, 2))
    shard = shard_of_shard(outer, inner)
    assert shard == Shard((6, 8), (3, 6))
    expected = inner.narrow(outer.narrow(full, (6, 4)), (2, 2))
    assert torch.equal(shard.narrow(full, (2, 2)), expected)
    assert torch.equal(expected, by_hand((6, 8), (3, 6), (2, 2)))


def test_a_plain_tensor_is_a_full_one():
    for shape in ((), (3,), (2, 5)):
        assert shard_of(torch.zeros(shape)) == Shard(shape, (0,) * len(shape))


def test_a_source_of_full_tensors_gives_shards_to_those_who_ask_with_their_shape():
    asked = []

    def source(name, shape):
        asked.append((name, shape))
        return numbered(shape)

    weights = sharded(source, {"w": Shard((4, 6), (0, 3))})
    assert torch.equal(weights("w", torch.Size((4, 3))), by_hand((4, 6), (0, 3), (4, 3)))
    assert torch.equal(weights("w", (4, 6)), numbered((4, 6)))
    assert torch.equal(weights("bias", (3,)), numbered((3,)))
    assert asked == [("w", (4, 6)), ("w", (4, 6)), ("bias", (3,))]


# ---- DTensors ------------------------------------------------------------------------------------
PLACEMENTS = {
    "rows": ((4,), [Split(0)], (8, 3)),
    "columns": ((4,), [Split(1)], (3, 8)),
    "uneven": ((4,), [Split(0)], (5, 3)),  # 2, 2, 1 and no rows
    "few": ((4,), [Split(0)], (2, 3)),
    "hybrid": ((2, 2), [Replicate(), Split(0)], (5, 3)),
    "both": ((2, 2), [Split(0), Split(1)], (5, 3)),
    "twice": ((2, 2), [Split(0), Split(0)], (8, 3)),
}
FSDP_OVER_TP = (8, 6, 5, 3)  # rows


def dtensors(rank, world):
    found = {}
    for name, (grid, placements, shape) in PLACEMENTS.items():
        mesh = init_device_mesh("cpu", grid)
        p = distribute_tensor(numbered(shape), mesh, placements)
        found[name] = shard_of(p), local(p)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for rows in FSDP_OVER_TP:
        by_rows = distribute_tensor(numbered((rows, 3)).double(), mesh["tp"], [Split(0)])
        model = torch.nn.Linear(3, rows, bias=False, dtype=torch.float64)
        model.weight = torch.nn.Parameter(by_rows)
        fully_shard(model, mesh=mesh["dp"])  # each tp rank's rows over two ranks again
        found[rows] = shard_of(model.weight), local(model.weight).detach().long()
    return found


def test_the_shard_of_a_dtensor_is_where_torch_put_its_numbers():
    ranks = run_ranks(4, dtensors)
    shapes = {name: shape for name, (_, _, shape) in PLACEMENTS.items()}
    shapes |= {rows: (rows, 3) for rows in FSDP_OVER_TP}
    for name, shape in shapes.items():
        seen = torch.zeros(shape, dtype=torch.int64)
        for found in ranks:
            shard, here = found[name]
            assert shard.global_shape == shape
            assert torch.equal(here, by_hand(shape, shard.offsets, here.shape)), name
            seen.flatten()[here.flatten()] += 1
        assert (seen == (2 if name == "hybrid" else 1)).all(), name  # nothing is missing
