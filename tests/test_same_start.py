"""Layouts around somebody's model: all replicas start from rank 0's weights, wherever its layers
are, and then train as one process does. In float64."""

import functools
import tempfile

import pytest
import torch
import torch._dynamo  # imported before the ranks are forked, or each of them spends a second on it
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from harness import run_ranks, same_here, weights_here
from test_protocol import Collectives
from torch import nn

from parallel import compression
from parallel.ddp import DDP
from parallel.diloco import DiLoCo
from parallel.fsdp import FSDP
from parallel.replicas import broadcast_start, named_groups
from parallel.shard import Shard
from parallel.zero import ZeRO

CPU = torch.device("cpu")
STEPS = 3
LAYOUTS = {
    "ddp": DDP,
    "topk": lambda *where: DDP(*where, reduce=compression.topk(fraction=1.0)),
    **{
        f"zero{stage}": functools.partial(ZeRO, stage=stage, blocks="layers") for stage in (1, 2, 3)
    },
    "zero3 cpu": functools.partial(ZeRO, stage=3, blocks="layers", offload_params="cpu"),
    "fsdp": functools.partial(FSDP, blocks="layers"),
    "fsdp cpu": functools.partial(FSDP, blocks="layers", offload_params="cpu"),
    # With these it is the plain run.
    "diloco": functools.partial(DiLoCo, every=1, lr=1.0, momentum=0.0),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 1)
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)
        self.register_buffer("mean", torch.rand(6))
        self.register_buffer("mask", torch.rand(6) > 0.5)
        self.register_buffer("count", torch.randint(100, ()))

    def forward(self, x):
        x = self.first((x - self.mean) * self.mask)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.last(x) * self.frozen.sum()


def net(seed):
    torch.manual_seed(seed)
    return Net().double()


def rows(step, n=12):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 6, generator=generator, dtype=torch.float64)


def train(model, replicas, optimizer, rank, world):
    for step in range(STEPS):
        for i, x in enumerate(rows(step).chunk(world)[rank].chunk(2)):
            replicas.last_micro_batch(i == 1)
            (model(x).square().sum() / 12).backward()
        replicas.finish_gradients()
        optimizer.step()
        model.zero_grad()


def started(rank, world, name):
    """Weights at the start and at the end, of a model that each rank has drawn with its own seed;
    its buffers; how many collectives each way to start takes."""
    replicas = LAYOUTS[name](dist.group.WORLD, CPU)
    model = net(seed=rank)
    given = [id(p) for p in model.parameters()]
    with Collectives() as seen:
        model = replicas.parallelize(model)
    n_real = seen.n
    is_same = [id(p) for p in model.parameters()] == given
    start = weights_here(replicas)
    groups = [p for p in model.parameters() if p.requires_grad]
    optimizer = replicas.make_optimizer(torch.optim.SGD, groups, lr=0.05, momentum=0.9)
    train(model, replicas, optimizer, rank, world)

    on_meta = LAYOUTS[name](dist.group.WORLD, CPU)
    with torch.device("meta"):
        shapes = Net().double()
    for key, buffer in net(seed=0).named_buffers():
        setattr(shapes, key, buffer)  # no layout makes buffers
    with Collectives() as seen:
        shapes = on_meta.parallelize(shapes)
        on_meta.init_weights(lambda key, shape: start_weights()[key])
    n_meta = seen.n
    assert same_here(weights_here(on_meta), start_weights())
    buffers = dict(model.named_buffers())
    return start, weights_here(replicas), buffers, n_real, n_meta, is_same


@functools.cache
def start_weights():
    return {name: p.detach().clone() for name, p in net(seed=0).named_parameters()}


@functools.cache
def alone():
    model = net(seed=0)
    groups = [p for p in model.parameters() if p.requires_grad]
    train(model, DDP(None, CPU), torch.optim.SGD(groups, lr=0.05, momentum=0.9), 0, 1)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_replicas_with_different_seeds_train_as_rank_0_would_alone(name):
    ranks = run_ranks(2, started, name)
    assert set().union(*(r[0] for r in ranks)) == start_weights().keys()
    for start, end, buffers, n_real, n_meta, is_same in ranks:
        assert same_here(start, start_weights())
        for key, (w, *where) in end.items():
            expected = Shard(*where).narrow(alone()[key].detach(), w.shape)
            torch.testing.assert_close(w, expected, rtol=1e-12, atol=1e-12)
        for key, buffer in net(seed=0).named_buffers():
            assert torch.equal(buffers[key], buffer), key
        assert n_real > 0 and n_meta == 0
        # An optimizer that was made before parallelize() holds the right ones.
        assert is_same == (not name.startswith("fsdp"))


def on_disk(rank, world, folder):
    found = []
    for kind in (functools.partial(FSDP), functools.partial(ZeRO, stage=3)):
        replicas = kind(
            dist.group.WORLD,
            CPU,
            blocks="layers",
            offload_params="disk",
            folder=f"{folder}/{kind.func.__name__}-{rank}",
        )
        replicas.parallelize(net(seed=rank))
        found.append(weights_here(replicas))
    return found


def test_weights_in_files_start_from_rank_0_too():
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(2, on_disk, folder)
    for i in range(2):
        assert {*ranks[0][i], *ranks[1][i]} == start_weights().keys()
        assert all(same_here(found[i], start_weights()) for found in ranks)


def messages(rank, world):
    """The bytes of each broadcast of a model with tensors of many kinds."""
    sizes = []
    plain = dist.broadcast
    dist.broadcast = lambda x, **options: (sizes.append(x.nbytes), plain(x, **options))[1]
    try:
        broadcast_start(net(seed=rank), dist.group.WORLD, CPU)
    finally:
        dist.broadcast = plain
    return sizes


def test_tensors_of_one_kind_travel_together():
    model = net(seed=0)
    weights = sum(p.nbytes for p in model.parameters())
    for sizes in run_ranks(2, messages):
        # The float64 buffer beside the weights, then bool and int64.
        assert sizes == [weights + model.mean.nbytes, 6, 8]


# ---- where the layers are, and which groups ------------------------------------------------------
def sequential(rank, world):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)]
    found = []
    for make in (
        lambda group: DDP(group, CPU),
        lambda group: ZeRO(group, CPU, 3, blocks=""),
        lambda group: FSDP(group, CPU, blocks=""),
    ):
        torch.manual_seed(0)
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        model = nn.Sequential(*(type(x)(*size(x)) for x in layers)).double()
        replicas = make(dist.group.WORLD)
        model = replicas.parallelize(model)
        optimizer = replicas.make_optimizer(torch.optim.SGD, model.named_parameters(), lr=0.05)
        train(model, replicas, optimizer, rank, world)
        found.append(weights_here(replicas))
    return found


def size(layer):
    return (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else ()


def test_a_sequential_is_its_own_list_of_layers():
    ranks = run_ranks(2, sequential)
    ddp = ranks[0][0]
    for i in (1, 2):
        assert {*ranks[0][i], *ranks[1][i]} == ddp.keys()
        for found in ranks:
            for key, (w, *where) in found[i].items():
                expected = Shard(*where).narrow(ddp[key][0], w.shape)
                torch.testing.assert_close(w, expected, rtol=1e-12, atol=1e-12)


def test_a_model_without_layers_there_is_refused_with_what_to_type():
    for blocks in ("blocks", "first", "layers.0"):
        with pytest.raises(ValueError, match=f"has no layers in '{blocks}'; give blocks="):
            ZeRO(None, CPU, 1, blocks=blocks).parallelize(Net())


def test_groups_are_named_however_they_are_given():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    every = ["0.weight", "0.bias", "1.weight", "1.bias"]
    for groups in (model.parameters(), model.named_parameters(), list(model.parameters())):
        [group] = named_groups(model, groups)
        assert group["names"] == every and len(group["params"]) == 4
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[1].weight}]
    first, second = named_groups(model, groups)
    assert first["names"] == every[:2] and first["lr"] == 1.0 and second["names"] == ["1.weight"]
    [given] = named_groups(model, [{"params": [model[0].weight], "names": ["mine"]}])
    assert given["names"] == ["mine"]
    with pytest.raises(ValueError, match="a parameter of shape .3,. is not the model's"):
        named_groups(model, [nn.Parameter(torch.zeros(3))])
