"""Plain optimizers on DTensors against the same optimizers on whole tensors, in float64."""

import pytest
import torch
import torch._dynamo  # imported before the ranks are forked, or each of them spends a second on it
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor
from harness import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optim.adafactor import Adafactor
from optim.adamw import AdamW
from optim.lamb import LAMB
from optim.muon import Muon
from optim.sgd import SGD
from parallel.replicas import owners_by_size
from parallel.sharded_optimizer import Adapter, make_optimizer

SHAPES = [(6, 4), (6, 4), (5, 3), (7,), (1, 2), (3, 5), (8, 8), (2,)]
STEPS = 3


def tensors(seed: int, dtype=torch.double) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.double).to(dtype) for shape in SHAPES
    ]


def groups_of(cls, params) -> list[dict]:
    if cls is torch.optim.Muon:
        return [p for p in params if p.ndim == 2]
    if cls is Muon:
        is_matrix = [p.ndim == 2 for p in params]
        return [
            dict(
                params=[p for p, m in zip(params, is_matrix) if m is matrix],
                use_muon=matrix,
                lr=0.1,
            )
            for matrix in (True, False)
        ]
    return [dict(params=params[:4], lr=0.1), dict(params=params[4:], lr=0.05)]


def alone(cls, dtype=torch.double, skipped=()) -> list[torch.Tensor]:
    params = [nn.Parameter(x) for x in tensors(0, dtype)]
    optimizer = cls(groups_of(cls, params))
    for step in range(STEPS):
        for i, (p, g) in enumerate(zip(params, tensors(1 + step, dtype))):
            p.grad = None if i in skipped else g
        optimizer.step()
    return [p.detach() for p in params]


MESHES = {  # sizes of the mesh's dimensions, and a placement along each
    "rows": ((4,), [Shard(0)]),
    "columns": ((2,), [Shard(-1)]),
    "replicas": ((2,), [Replicate()]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "both": ((2, 2), [Shard(0), Shard(-1)]),
    "uneven": ((3,), [Shard(0)]),
}


def stepped(rank, world, layout, classes, dtype=torch.double, skipped=()):
    sizes, placements = MESHES[layout]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple("ab"[: len(sizes)]))

    def spread(x):
        here = [Shard(x.ndim - 1) if p == Shard(-1) else p for p in placements]
        if layout == "both" and x.ndim == 1:
            here[1] = Replicate()
        return distribute_tensor(x, mesh, here)

    results = []
    for cls in classes:
        params = [nn.Parameter(spread(x)) for x in tensors(0, dtype)]
        optimizer = make_optimizer(cls, groups_of(cls, params))
        assert isinstance(optimizer, cls)
        for p in (p for group in optimizer.inner.param_groups for p in group["params"]):
            assert p.numel() and not isinstance(p, DTensor)  # nothing to step is not there at all
        for step in range(STEPS):
            for i, (p, g) in enumerate(zip(params, tensors(1 + step, dtype))):
                p.grad = None if i in skipped else spread(g)
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in params if p.ndim == 2)
        results.append([p.full_tensor().detach() for p in params])
    return results


CLASSES = [
    SGD,
    AdamW,
    Muon,
    Adafactor,
    LAMB,
    torch.optim.AdamW,
    torch.optim.Adafactor,
    torch.optim.Muon,
]


@pytest.mark.parametrize(
    "layout",
    [
        (
            pytest.param(layout, marks=pytest.mark.slow)
            if layout in ("hybrid", "uneven", "rows", "columns")
            else layout
        )
        for layout in MESHES
    ],
)
def test_every_sharding_equals_whole_tensors(layout):
    world = torch.tensor(MESHES[layout][0]).prod().item()
    for results in run_ranks(world, stepped, layout, CLASSES):
        for cls, found in zip(CLASSES, results):
            for x, expected in zip(found, alone(cls)):
                torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_travels_unchanged():
    for (found,) in run_ranks(2, stepped, "columns", [LAMB], torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(found, alone(LAMB, torch.bfloat16)))


def test_a_parameter_without_gradient_stays_as_it_is():
    """Not even weight decay may move it."""
    for results in run_ranks(4, stepped, "rows", [AdamW, LAMB], torch.double, (0, 3)):
        for cls, found in zip((AdamW, LAMB), results):
            for x, expected in zip(found, alone(cls, skipped=(0, 3))):
                torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(found[0], tensors(0)[0])


# ---- models sharded by others --------------------------------------------------------------------
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3)
    ).double()


def losses(model, optimizer, part):
    x, found = (
        torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double),
        [],
    )
    for _ in range(4):
        loss = model(x[part]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


OUTSIDE = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"elementwise": True, "fused": True}),
    (torch.optim.AdamW, {"elementwise": True, "foreach": True}),
    (torch.optim.Adafactor, {}),
    (torch.optim.NAdam, {"foreach": True}),
]


def with_fsdp(rank, world):
    results = []
    for cls, arguments in OUTSIDE:
        model = net()
        for layer in (model[0], model[2], model):
            fully_shard(layer)
        optimizer = make_optimizer(cls, model.parameters(), lr=0.1, **arguments)
        model._apply(torch.clone)  # the shards have moved to other memory
        results.append(
            losses(model, optimizer, slice(rank * 12 // world, (rank + 1) * 12 // world))
        )
    return results


def test_torchs_optimizers_on_a_model_of_fully_shard():
    ranks = run_ranks(4, with_fsdp)
    for (cls, arguments), *found in zip(OUTSIDE, *ranks):
        model = net()
        arguments = {k: v for k, v in arguments.items() if k != "elementwise"}
        expected = losses(model, cls(model.parameters(), lr=0.1, **arguments), slice(None))
        for several, one in zip(zip(*found), expected):
            assert abs(sum(several) / len(several) - one) < 1e-12


def with_tensor_parallel(rank, world):
    """FSDP over a tensor-parallel model: weights cut by two meshes' dimensions, even along the same
    one."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = make_optimizer(LAMB, model.parameters(), lr=0.1)
    dp = mesh["dp"].get_local_rank()
    found = losses(model, optimizer, slice(dp * 6, dp * 6 + 6))
    return found, [p.full_tensor().detach() for p in model.parameters()]


def test_fsdp_over_tensor_parallel_equals_one_process():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    losses(model, LAMB(model.parameters(), lr=0.1), slice(None))
    for _, weights in run_ranks(4, with_tensor_parallel):
        for p, expected in zip(weights, model.parameters()):
            torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)


# ---- what is where, what is sent -----------------------------------------------------------------
class Collectives(TorchDispatchMode):
    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def account(rank, world, dtypes):
    mesh = init_device_mesh("cpu", (world,))
    params = [
        nn.Parameter(distribute_tensor(x.to(dtype), mesh, [Shard(0)]))
        for dtype in dtypes
        for x in tensors(0)
    ]
    names = [str(i) for i in range(len(params))]
    half = len(params) // 2
    groups = [
        dict(params=params[:half], names=names[:half]),
        dict(params=params[half:], names=names[half:]),
    ]
    adapter = Adapter(LAMB, groups)
    for p in params:
        p.grad = torch.ones_like(p.detach())
    with Collectives() as collectives:
        adapter.optimizer.step()
    state = {
        name: adapter.optimizer.state[p]["exp_avg"].shape
        for g in adapter.optimizer.param_groups
        for p, name in zip(g["params"], g["names"])
    }
    held = sum(p.to_local().nbytes for p in params)
    return collectives.seen, state, adapter.sent_bytes, held, adapter.shards


@pytest.mark.parametrize("dtypes", [[torch.double], [torch.double, torch.float]])
def test_two_collectives_a_step_and_state_at_the_owner_alone(dtypes):
    ranks = run_ranks(3, account, dtypes)
    owned = {}
    for seen, state, _, _, shards in ranks:
        assert len(seen) == 2 * len(dtypes) and all("alltoall" in name for name in seen)
        assert not state.keys() & owned.keys() and shards == {}
        owned |= state
    assert owned == {str(i): shape for i, shape in enumerate(SHAPES * len(dtypes))}
    sent, held = sum(r[2] for r in ranks), sum(r[3] for r in ranks)
    assert 0.4 * held < sent < 2 * held  # 4/3 on average


def test_owners_share_the_work():
    shapes = [(100, 10)] + [(8, 8)] * 6 + [(8, 2)] * 4 + [(3,)]
    owners = owners_by_size(shapes, 3)
    assert sorted(owners[1:7].count(r) for r in range(3)) == [0, 3, 3]  # the big one counts as work
    owners = owners_by_size([(8, 8)] * 6 + [(4, 16)] * 3, 3)
    assert all(owners[:6].count(r) == 2 and owners[6:].count(r) == 1 for r in range(3))


def after_loading(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    params = [
        nn.Parameter(distribute_tensor(torch.zeros_like(x), mesh, [Shard(0)])) for x in tensors(0)
    ]
    adapter = Adapter(LAMB, params, lr=0.1)
    with torch.no_grad():
        for p, x in zip(params, tensors(0)):
            p.copy_(distribute_tensor(x, mesh, [Shard(0)]))
    adapter.gather_weights()
    for p, x in zip(params, tensors(1)):
        p.grad = distribute_tensor(x, mesh, [Shard(0)])
    adapter.optimizer.step()
    with pytest.raises(ValueError, match="loss.backward"):
        adapter.optimizer.step(lambda: 0.0)
    whole = [p.full_tensor().detach() for p in params]
    with torch.no_grad():  # what a method's eval() may do
        for group in adapter.optimizer.param_groups:
            for p in group["params"]:
                p.mul_(2)
    adapter.broadcast_weights()
    return whole, [p.full_tensor().detach() for p in params]


def test_weights_loaded_later_reach_the_owners_and_changed_ones_the_model():
    params = [nn.Parameter(x) for x in tensors(0)]
    optimizer = LAMB(params, lr=0.1)
    for p, g in zip(params, tensors(1)):
        p.grad = g
    optimizer.step()
    for whole, doubled in run_ranks(3, after_loading):
        for x, y, p in zip(whole, doubled, params):
            torch.testing.assert_close(x, p.detach(), rtol=1e-12, atol=1e-12)
            assert torch.equal(2 * x, y)


def test_plain_tensors_need_no_process_group():
    params = [nn.Parameter(x) for x in tensors(0)]
    optimizer = make_optimizer(SGD, params, lr=0.1)
    assert not dist.is_initialized() and optimizer.param_groups[0]["params"] == params
    params[0].sum().backward()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), tensors(0)[0] - 0.1)


# ---- what the ranks tell each other --------------------------------------------------------------
class Rich(SGD):
    """SGD whose state is more than tensors and numbers."""

    extra = ([torch.arange(3.0)], (1, None, "text"), float("inf"))
    elementwise = True

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["extra"] = self.extra


class Stranger:
    pass


def rich_state(rank, world, elementwise):
    mesh = init_device_mesh("cpu", (world,))
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in tensors(0)]
    optimizer = make_optimizer(Rich, params, elementwise=elementwise, lr=0.1)
    optimizer.step()
    found = [state["extra"] for state in optimizer.state_dict()["state"].values()]
    # Neither one that would be loaded by code, nor one that cannot even be saved.
    for extra, why in ((Stranger(), "Stranger"), ([lambda: 0], "lambda")):
        Rich.extra = extra
        optimizer.step()
        with pytest.raises(TypeError, match=f"(?s)plain containers.*{why}"):
            optimizer.state_dict()
    return found


@pytest.mark.parametrize("elementwise", [True, False])
def test_lists_of_a_state_reach_all_ranks_and_what_could_run_code_none(elementwise):
    for found in run_ranks(2, rich_state, elementwise):
        assert len(found) == len(SHAPES)
        for [x], *others in found:
            assert torch.equal(x, torch.arange(3.0)) and tuple(others) == Rich.extra[1:]
