"""parallel/shard.py, beside full tensors of which every element holds its own number."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.owners import holders_of, shard_held
from parallel.replicas import fill
from parallel.shard import Shard, local, shard_at, shard_of, shard_of_shard, sharded


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


def test_a_source_that_can_give_shards_is_asked_for_no_full_tensor():
    asked = []

    class Source:
        def __call__(self, name, shape):
            return self.shard(name, (shape, (0,) * len(shape)), shape)

        def shard(self, name, where, shape):
            asked.append(tuple(shape))
            # As a checkpoint does, it refuses what reaches beyond the tensor.
            assert all(o + n <= size for size, o, n in zip(*where, shape, strict=True))
            return Shard(*where).narrow(numbered(where[0]), shape)

        def fill(self, out, name, where):
            out.copy_(self.shard(name, where, out.shape))

    weights = sharded(Source(), {"w": Shard((4, 6), (0, 3))})
    assert torch.equal(weights("w", (4, 3)), by_hand((4, 6), (0, 3), (4, 3)))
    # Rows of this rank's columns, of the full tensor, and of one that is not divided.
    for name, shape, first, n in [("w", (4, 3), 2, 1), ("w", (4, 6), 1, 2), ("bias", (3,), 2, 1)]:
        rows = torch.zeros(n, *shape[1:], dtype=numbered((1,)).dtype)
        fill(rows, weights, name, torch.Size(shape), first)
        assert torch.equal(rows, weights(name, shape)[first : first + n])
        assert asked[-2:] == [(n, *shape[1:]), shape]
        plain = sharded(lambda name, shape: numbered(shape), {"w": ((4, 6), (0, 3))})
        fill(again := torch.zeros_like(rows), plain, name, shape, first)
        assert torch.equal(again, rows)
        fill(again := torch.zeros_like(rows), lambda _, size: numbered(size), name, shape, first)
        assert torch.equal(again, numbered(shape)[first : first + n])
    # The last ranks of many have no rows, and would begin past the end.
    fill(torch.empty(0, 3), weights, "w", (4, 3), 6)
    assert asked[-1] == (0, 3)


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


def strided():
    """Rows -> a weight whose rows each tp rank has cut over two ranks again (_StridedShard)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    weights = {}
    for rows in FSDP_OVER_TP:
        by_rows = distribute_tensor(numbered((rows, 3)).double(), mesh["tp"], [Split(0)])
        model = torch.nn.Linear(3, rows, bias=False, dtype=torch.float64)
        model.weight = torch.nn.Parameter(by_rows)
        fully_shard(model, mesh=mesh["dp"])
        weights[rows] = model.weight
    return weights


def dtensors(rank, world):
    found = {}
    for name, (grid, placements, shape) in PLACEMENTS.items():
        mesh = init_device_mesh("cpu", grid)
        p = distribute_tensor(numbered(shape), mesh, placements)
        found[name] = shard_of(p), local(p)
    for rows, weight in strided().items():
        found[rows] = shard_of(weight), local(weight).detach().long()
    return found


def both(rank, world):
    return dtensors(rank, world), told_and_computed(rank, world)


@pytest.fixture(scope="module")
def of_ranks():
    """What four ranks found; started once for the tests of this file."""
    return run_ranks(4, both)


def test_the_shard_of_a_dtensor_is_where_torch_put_its_numbers(of_ranks):
    ranks = [found for found, _ in of_ranks]
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


# ---- the shards of other ranks -------------------------------------------------------------------
# Mesh of ranks, placements, full shape; beside those of PLACEMENTS.
MORE = {
    "permuted": ([3, 1, 0, 2], [Split(0)], (5, 3)),
    "copies of columns": ([[0, 2], [1, 3]], [Split(1), Replicate()], (2, 7)),
    "one number": ([0, 1, 2, 3], [Split(0)], (1,)),
}


def told_and_computed(rank, world):
    """What the ranks tell each other of their shards, and what each computes of all."""
    pairs, tp_group = [], None
    for ranks in ([0, 1], [2, 3]):
        group = dist.new_group(ranks)
        if rank in ranks:
            tp_group = group
    cases = [(torch.arange(4).view(grid), *rest) for grid, *rest in PLACEMENTS.values()]
    cases += [(torch.tensor(ranks), *rest) for ranks, *rest in MORE.values()]
    weights = []
    for ranks, placements, shape in cases:
        mesh = DeviceMesh("cpu", ranks)
        weights.append((distribute_tensor(numbered(shape), mesh, placements), None))
    weights += [(p, None) for p in strided().values()]
    # Rows of each tp rank, over two data-parallel ranks again; 7 rows of 14 are 4 and 3.
    dp_mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))["dp"]
    for full, dim in ((14, 3), 0), ((3, 6), 1), ((2, 2), 0):
        shape = list(full)
        shape[dim] //= 2
        offsets = [0, 0]
        offsets[dim] = rank % 2 * shape[dim]
        tp_shard = Shard(full, tuple(offsets))
        weights.append((torch.zeros(shape), tp_shard))
        weights.append((distribute_tensor(torch.zeros(shape), dp_mesh, [Split(0)]), tp_shard))
    for p, tp_shard in weights:
        group_of_p = None if tp_shard is None else tp_group
        shard = shard_of(p) if tp_shard is None else shard_of_shard(tp_shard, shard_of(p))
        told = [None] * world
        dist.all_gather_object(told, (shard, tuple(local(p).shape)))
        holders = holders_of(p, group_of_p)
        assert list(holders) == sorted(holders)
        computed = [shard_held(p, tp_shard, group_of_p, *holder) for holder in holders.values()]
        pairs.append(([told[other] for other in holders], computed))
        if hasattr(p, "placements"):
            by_torch = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            here = shard_at(p, p.device_mesh.get_coordinate())
            assert by_torch == (here[1], here[0].offsets)
    return pairs


def test_a_rank_computes_where_the_shards_of_all_others_lie(of_ranks):
    sizes = set()
    for _, pairs in of_ranks:
        for told, computed in pairs:
            assert told == computed
            full = told[0][0].global_shape
            # Together they are the tensor once.
            assert sum(math.prod(shape) for _, shape in computed) == math.prod(full)
            sizes.add(len(computed))
    assert sizes == {2, 4}


def test_tp_shards_that_are_no_equal_parts_are_refused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda _: 2)
        patch.setattr(dist, "get_rank", lambda _: 1)
        p = torch.zeros(2, 3)
        right = Shard((4, 3), (2, 0))
        assert shard_held(p, right, None, None, 0) == (Shard((4, 3), (0, 0)), (2, 3))
        for wrong in Shard((5, 3), (3, 0)), Shard((4, 3), (0, 0)), Shard((4, 6), (2, 3)):
            with pytest.raises(ValueError, match="none of 2 equal parts"):
                shard_held(p, wrong, None, None, 0)
