"""Our data parallel against one process and against torch's, in float64."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn

from parallel import mesh as meshes
from parallel.ddp import DDP
from parallel.mesh import make_mesh
from parallel.replicas import make_buckets

CPU = torch.device("cpu")


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()


def data(n=8):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def gradients(rank, world, micro_batches, bucket_mb, group="world"):
    model = net()
    replicas = DDP(dist.group.WORLD if group == "world" else None, CPU, bucket_mb)
    model = replicas.parallelize(model)
    for _ in range(2):  # the second step must not remember the first
        model.zero_grad(set_to_none=True)
        parts = data().chunk(world)[rank].chunk(micro_batches)
        for i, part in enumerate(parts):
            replicas.last_micro_batch(i == len(parts) - 1)
            model(part).square().sum().backward()
        replicas.finish_gradients()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def alone():
    model = net()
    model(data()).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "world, micro_batches, bucket_mb",
    [(2, 1, 25), (2, 4, 25), (4, 2, 25), (2, 2, 1e-4), (4, 1, 1e-4)],
)
def test_ddp_equals_single_process(alone, world, micro_batches, bucket_mb):
    for grads in run_ranks(world, gradients, micro_batches, bucket_mb):
        for g, expected in zip(grads, alone):
            torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12)


def test_without_a_group_nothing_happens(alone):
    for g, expected in zip(gradients(0, 1, 1, 25, group=None), alone):
        assert torch.equal(g, expected)


def count_bytes(rank, world, micro_batches):
    summed, said = [], []
    plain, finish = dist.all_reduce, DDP.finish_gradients
    dist.all_reduce = lambda x, *args, **kwargs: (
        summed.append(x.nbytes),
        plain(x, *args, **kwargs),
    )[1]
    DDP.finish_gradients = lambda self: (finish(self), said.append(self.sent_bytes))
    gradients(rank, world, micro_batches, 1e-4)
    dist.all_reduce, DDP.finish_gradients = plain, finish
    return summed, said


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_the_formula_and_do_not_grow_with_micro_batches(world):
    size = sum(p.nbytes + 1 for p in net().parameters())  # 1: the roll call
    for micro_batches in (1, 2):
        for summed, said in run_ranks(world, count_bytes, micro_batches):
            assert sum(summed) == 2 * size and len(summed) > 4  # two steps, several buckets
            assert said == pytest.approx([2 * (world - 1) * size / world] * 2, abs=len(summed))


def unused(rank, world):
    model = net()
    extra = nn.Parameter(torch.ones(3, dtype=torch.double))
    model.register_parameter("extra", extra)
    replicas = DDP(dist.group.WORLD, CPU)
    replicas.parallelize(model)
    for used in (True, rank == 0, False, True):  # everywhere, on rank 0 alone, nowhere
        model.zero_grad(set_to_none=True)
        out = model(data()).sum() + (extra.sum() if used else 0)
        out.backward()
        replicas.finish_gradients()
        yield extra.grad if extra.grad is None else extra.grad[0].item()


def unused_list(rank, world):
    return list(unused(rank, world))


def test_a_parameter_unused_on_one_rank_gets_the_sum_and_one_that_nobody_uses_gets_none():
    assert run_ranks(2, unused_list) == [[2.0, 1.0, None, 2.0]] * 2


def overlap(rank, world):
    """The order of events: when each bucket's all-reduce starts, when each gradient arrives."""
    model, events = net(), []
    replicas = DDP(dist.group.WORLD, CPU, bucket_mb=1e-4)
    arrived, reduce = replicas.arrived, dist.all_reduce
    replicas.arrived = lambda p, b, v: (events.append("grad"), arrived(p, b, v))[1]
    dist.all_reduce = lambda *a, **k: (events.append("send"), reduce(*a, **k))[1]
    replicas.parallelize(model)
    model(data()).sum().backward()
    replicas.finish_gradients()
    dist.all_reduce = reduce
    return events


def test_sending_starts_before_backward_ends():
    for events in run_ranks(2, overlap):
        assert events.index("send") < len(events) - 1 - events[::-1].index("grad")


def test_buckets_keep_order_and_types_apart():
    params = [
        (name, nn.Parameter(torch.zeros(10, dtype=d)))
        for name, d in zip("abcd", (torch.float32, torch.float32, torch.bfloat16, torch.float32))
    ]
    buckets = make_buckets(params, 1e9)
    assert [len(b) for b in buckets] == [2, 1, 1]
    assert [p for b in make_buckets(params, 40) for p in b] == params and len(
        make_buckets(params, 40)
    ) == 4


def axes(rank, world):
    mesh = make_mesh(CPU, tp=2, pp=2)
    me = [torch.tensor([float(rank)]) for _ in range(4)]
    for x, axis in zip(me, ("pp", "dp", "cp", "tp")):
        if mesh.groups[axis] is not None:
            dist.all_reduce(x, group=mesh.groups[axis])
    return mesh.coords, [x.item() for x in me], mesh.sum(rank, 1), mesh.agree(rank + 7)


def test_mesh_groups_differ_in_one_coordinate():
    for rank, (coords, sums, total, agreed) in enumerate(run_ranks(4, axes)):
        assert coords == dict(pp=rank // 2, dp=0, cp=0, tp=rank % 2)
        assert sums == [(rank % 2) * 2 + 2, rank, rank, (rank // 2) * 4 + 1]
        assert total == [6.0, 4.0] and agreed == 7


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 1), (2, 3, 1), (1, 2, 2), (2, 1, 12), (24, 1, 1)]
)
def test_a_rank_makes_its_own_groups_alone(monkeypatch, shape):
    """Against the table of all ranks; in one order on all of them, so that no ring can wait."""
    tp, cp, pp = shape
    world = 24
    table = torch.arange(world).view(pp, -1, cp, tp)
    asked = []

    def new_group(ranks, _):
        asked.append(ranks)
        return tuple(ranks)

    monkeypatch.setattr(meshes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(meshes.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(meshes, "new_group", new_group)
    sizes_asked = set()
    for rank in range(world):
        asked.clear()
        monkeypatch.setattr(meshes.dist, "get_rank", lambda rank=rank: rank)
        mesh = make_mesh(CPU, *shape)
        pp_i, dp_i, cp_i, tp_i = mesh.coords.values()
        own = {
            "pp": table[:, dp_i, cp_i, tp_i],
            "dp": table[pp_i, :, cp_i, tp_i],
            "cp": table[pp_i, dp_i, :, tp_i],
            "tp": table[pp_i, dp_i, cp_i],
            "dp_cp": table[pp_i, :, :, tp_i].flatten(),
        }
        for name, ranks in own.items():
            assert mesh.groups[name] == (tuple(ranks.tolist()) if len(ranks) > 1 else None)
        assert table[pp_i, dp_i, cp_i, tp_i] == rank
        # Two names of the same ranks are one group.
        made = {tuple(ranks.tolist()) for ranks in own.values() if len(ranks) > 1}
        assert sorted(map(tuple, asked)) == sorted(made)
        # All ranks make groups of the same sizes in the same order.
        sizes_asked.add(tuple(len(ranks) for ranks in asked))
    assert len(sizes_asked) == 1


def test_one_process_needs_no_process_group():
    mesh = make_mesh(CPU)
    assert mesh.sizes == dict(pp=1, dp=1, cp=1, tp=1) and set(mesh.groups.values()) == {None}
    assert mesh.sum(2, 3) == [2.0, 3.0] and mesh.agree(5) == 5
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=2"):
        make_mesh(CPU, tp=2)


def filled(rank, world):
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight  # tied
    replicas = DDP(dist.group.WORLD, CPU)
    model = replicas.parallelize(model)
    replicas.init_weights(lambda name, shape: torch.full(shape, 7.0))
    names = [name for name, _ in model.named_parameters()]
    return names, model[1].weight.sum().item(), len(replicas.weights())


def test_weights_are_allocated_once_and_saved_by_one_rank():
    for rank, (names, total, saved) in enumerate(run_ranks(2, filled)):
        assert names == ["0.weight"] and total == 7 * 15 and saved == (rank == 0)
