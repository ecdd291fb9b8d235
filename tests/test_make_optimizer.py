"""make_optimizer under everybody else's tools, on fully_shard'ed models, against one process in
float64."""

import copy
import pickle

import pytest
import torch
import torch._dynamo  # imported before the ranks are forked, or each of them spends a second on it
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor
from harness import run_ranks
from test_optim_contract import CASES
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from optim.adamw import AdamW
from optim.lamb import LAMB
from optim.muon import Muon
from optim.schedule_free import AdamWScheduleFree
from optim.sgd import SGD
from optim.soap import SOAP
from parallel.replicas import refuse_coupled
from parallel.sharded_optimizer import make_optimizer

CLASSES = [*CASES, torch.optim.AdamW]
OPTIONS = {cls: arguments for cls, (arguments, *_) in CASES.items()} | {torch.optim.AdamW: {}}
OPTIONS[SOAP] = OPTIONS[SOAP] | {"eps": 1e-2}  # tiny values magnify rounding
FULL = StateDictOptions(full_state_dict=True)
# Of each kind one; the others are slow
SOME = (AdamW, Muon, SOAP, AdamWScheduleFree, torch.optim.AdamW)
every = pytest.mark.parametrize(
    "cls",
    [cls if cls in SOME else pytest.param(cls, marks=pytest.mark.slow) for cls in CLASSES],
    ids=lambda cls: f"{cls.__module__}.{cls.__name__}",
)


class Net(nn.Module):
    """Matrices that four ranks cut unevenly, and a vector of which some ranks have nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 5).double(), nn.Linear(5, 2).double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def sharded() -> Net:
    """On one rank the plain net."""
    model = Net()
    if dist.is_initialized() and dist.get_world_size() > 1:
        fully_shard(model.a)
        fully_shard(model)
    return model


def groups_of(cls, model: nn.Module):
    if not getattr(cls, "matrices_only", False):
        return model.parameters()
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) is yes] for yes in (True, False)
    )
    return [{"params": matrices}, {"params": vectors, "use_muon": False}]


def made(cls, model: nn.Module):
    optimizer = make_optimizer(cls, groups_of(cls, model), **OPTIONS[cls])
    getattr(optimizer, "train", lambda: None)()
    return optimizer


def backward(model: nn.Module, step: int) -> None:
    """The same batch on every rank: FSDP's mean is what one process gets."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.double)
    model(x).square().mean().backward()


def train(model: nn.Module, optimizer, steps) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def whole(tensors) -> list[torch.Tensor]:
    return [(x.full_tensor() if isinstance(x, DTensor) else x).detach() for x in tensors]


def alone(cls, steps=range(6)) -> list[torch.Tensor]:
    model = Net()
    train(model, made(cls, model), steps)
    return whole(model.parameters())


def close(found, expected, atol=1e-12) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=atol)


# ---- checkpoints ---------------------------------------------------------------------------------
def saved_and_loaded(rank, world, full):
    """Three steps, state and weights into a fresh model and optimizer by
    torch.distributed.checkpoint, three more."""
    results = []
    for cls in CLASSES:
        options = FULL if full else StateDictOptions()
        model = sharded()
        optimizer = made(cls, model)
        train(model, optimizer, range(3))
        state = get_optimizer_state_dict(model, optimizer, options=options)
        weights = {n: p.full_tensor() for n, p in model.state_dict().items()}
        fresh = sharded()
        resumed = made(cls, fresh)
        set_model_state_dict(fresh, weights, options=FULL)
        set_optimizer_state_dict(fresh, resumed, copy.deepcopy(state), options=options)
        train(fresh, resumed, range(3, 6))
        kept = {
            k: x.full_tensor() if isinstance(x, DTensor) else x
            for entries in [state["state"].get("a.weight", {})]
            for k, x in entries.items()
        }
        results.append((whole(fresh.parameters()), kept))
    return results


@pytest.mark.parametrize("world, full", [(2, True), pytest.param(4, False, marks=pytest.mark.slow)])
def test_state_goes_through_torchs_distributed_checkpoint(world, full):
    for results in run_ranks(world, saved_and_loaded, full):
        for cls, (weights, state) in zip(CLASSES, results, strict=True):
            close(weights, alone(cls))
            model = Net()
            optimizer = made(cls, model)
            train(model, optimizer, range(3))
            for name, x in optimizer.state[model.a.weight].items():
                assert name in state
                if torch.is_tensor(x):
                    close([state[name]], [x])


def from_one_process(rank, world, cls, saved, weights, then):
    """Loads the state of one process and goes on; gives its own state, whole, for one process to
    load."""
    model = sharded()
    optimizer = made(cls, model)
    set_model_state_dict(model, weights, options=FULL)
    optimizer.load_state_dict(saved)
    train(model, optimizer, then)
    state = optimizer.state_dict()
    for entries in state["state"].values():
        entries.update((k, x.full_tensor()) for k, x in entries.items() if isinstance(x, DTensor))
    return whole(model.parameters()), state


@every
def test_one_process_and_four_ranks_load_each_others_state(cls):
    model = Net()
    optimizer = made(cls, model)
    train(model, optimizer, range(2))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    found, state = run_ranks(4, from_one_process, cls, saved, weights, range(2, 4))[0]
    close(found, alone(cls, range(4)))
    back = Net()
    with torch.no_grad():
        for p, x in zip(back.parameters(), found, strict=True):
            p.copy_(x)
    resumed = made(cls, back)
    resumed.load_state_dict(state)
    train(back, resumed, range(4, 6))
    close(whole(back.parameters()), alone(cls))


def loaded_with_hooks(rank, world, cls):
    model = sharded()
    optimizer = made(cls, model)
    train(model, optimizer, range(2))
    saved, seen = optimizer.state_dict(), []

    def swap(_, given):
        seen.append("pre")
        given = {**given, "state": dict(given["state"])}
        given["state"][0], given["state"][2] = given["state"][2], given["state"][0]
        return given

    optimizer.register_load_state_dict_pre_hook(swap)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    with pytest.raises(Exception, match="shape|size|box|part|differ"):  # (5, 6) for (2, 5)
        optimizer.load_state_dict(saved)
        train(model, optimizer, [2])
    return seen


def test_load_hooks_run_once_and_are_obeyed():
    assert run_ranks(2, loaded_with_hooks, AdamW)[0][0] == "pre"


# ---- weights that somebody else changes ----------------------------------------------------------
def by_set_state(model, new):
    set_model_state_dict(model, new, options=FULL)


def by_copy(model, new):
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(distribute_tensor(new[n], p.device_mesh, p.placements))


def by_data(model, new):
    for n, p in model.named_parameters():
        p.data.copy_(distribute_tensor(new[n], p.device_mesh, p.placements))


def by_shard(model, new):
    with torch.no_grad():
        for n, p in model.named_parameters():
            # Sends nothing
            here = distribute_tensor(new[n], p.device_mesh, p.placements, src_data_rank=None)
            p.to_local().copy_(here.to_local())


def by_one_rank_alone(model, new):
    if dist.get_rank() == 1:
        by_shard(model, new)


def changed(rank, world, cls, how, when):
    model = sharded()
    optimizer = made(cls, model)
    train(model, optimizer, range(when))
    generator = torch.Generator().manual_seed(7)
    new = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.double)
        for n, p in model.named_parameters()
    }
    how(model, new)
    after = whole(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    train(model, optimizer, [9])
    return after, whole(model.parameters())


@pytest.mark.parametrize("how", [by_set_state, by_copy, by_data, by_shard, by_one_rank_alone])
@pytest.mark.parametrize("when", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "cls",
    [AdamW, Muon, *(pytest.param(c, marks=pytest.mark.slow) for c in (LAMB, torch.optim.AdamW))],
)
def test_weights_changed_after_it_was_made_stay_changed(how, when, cls):
    for after, later in run_ranks(2, changed, cls, how, when):
        close(later, after)


# ---- gradients -----------------------------------------------------------------------------------
def lacking(rank, world, cls, lacks):
    """Parameters sharded by hand, whose gradients only some ranks have; lacks: ranks without, by
    parameter."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(4, 4, generator=generator, dtype=torch.double) for _ in lacks]
    params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in wholes]
    optimizer = make_optimizer(cls, params, **OPTIONS[cls])
    getattr(optimizer, "train", lambda: None)()
    for step in range(3):
        for p, without in zip(params, lacks):
            shard = torch.full((4 // world, 4), 1.0 + step, dtype=torch.double)
            p.grad = (
                None
                if rank in without
                else DTensor.from_local(shard, mesh, [Shard(0)], run_check=False)
            )
        optimizer.step()
        assert [p.grad is None for p in params] == [rank in without for without in lacks]
    counted = [len(optimizer.state_dict()["state"].get(i, {})) for i in range(len(params))]
    return whole(params), counted


@every
def test_a_gradient_that_some_ranks_lack_is_zero_there_and_one_that_all_lack_is_none(cls):
    lacks = [(), (0,), (1,), (0, 1)]
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.double)) for _ in lacks
    ]
    optimizer = make_optimizer(cls, params, **OPTIONS[cls])
    getattr(optimizer, "train", lambda: None)()
    for step in range(3):
        for p, without in zip(params, lacks):
            p.grad = torch.full((4, 4), 1.0 + step, dtype=torch.double)
            for rank in without:
                p.grad[2 * rank : 2 * rank + 2] = 0
        params[3].grad = None
        optimizer.step()
    for found, counted in run_ranks(2, lacking, cls, lacks):
        close(found, [p.detach() for p in params], 1e-8 if cls is SOAP else 1e-12)
        assert counted[0] > 0 or cls is SGD
        assert counted[3] == 0


def scaled_by_torch(rank, world):
    """GradScaler alone, without unscale_: a fused kernel would be asked to unscale."""
    model = sharded()
    optimizer = make_optimizer(
        torch.optim.AdamW,
        [{"params": model.parameters()}],
        lr=0.1,
        eps=1e-2,
        fused=True,
        **({"elementwise": True} if world > 1 else {}),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.double)
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    return whole(model.parameters())


def test_gradscaler_unscales_for_a_fused_kernel_and_a_generator_in_a_group_is_read_once():
    expected = scaled_by_torch(0, 1)
    assert (expected[0] - Net().a.weight).abs().max() > 0.1
    for found in run_ranks(2, scaled_by_torch):
        close(found, expected)


def clipped(rank, world, cls, scaled):
    model = sharded()
    optimizer = made(cls, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    norms = []
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.double)
        loss = model(x).square().mean()
        scaler.scale(loss * (torch.inf if scaled and step == 2 and rank == 0 else 1)).backward()
        scaler.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(params, 0.05)
        norms.append(whole([norm])[0])
        scaler.step(optimizer)
        scaler.update()
    return whole(model.parameters()), norms


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("cls", [AdamW, LAMB, Muon, AdamWScheduleFree, torch.optim.AdamW])
def test_clipping_and_gradscaler_see_the_gradients(cls, scaled):
    expected, norms = clipped(0, 1, cls, scaled)
    for found, seen in run_ranks(2, clipped, cls, scaled):
        close(found, expected)
        close([n for n in seen if n.isfinite()], [n for n in norms if n.isfinite()])
        assert min(n for n in seen) > 0


def with_closure(rank, world, cls):
    model = sharded()
    optimizer = made(cls, model)
    losses = []
    for step in range(4):

        def closure(step=step):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.double)
            loss = model(x).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())
    return whole(model.parameters()), losses


@pytest.mark.parametrize("cls", [AdamW, Muon])
def test_a_closure_is_evaluated_before_the_step(cls):
    expected, losses = with_closure(0, 1, cls)
    for found, seen in run_ranks(2, with_closure, cls):
        close(found, expected)
        close(seen, losses)


# ---- groups --------------------------------------------------------------------------------------
def grown(rank, world, cls):
    """A second group after three steps; named parameters, a scheduler, a group's own lr."""
    model = sharded()
    named = list(model.named_parameters())
    first, late = ([(n, p) for n, p in named if n.startswith(k)] for k in "ab")
    if getattr(cls, "matrices_only", False):
        first, late = ([(n, p) for n, p in part if p.ndim > 1] for part in (first, late))
    optimizer = make_optimizer(cls, first, **OPTIONS[cls])
    getattr(optimizer, "train", lambda: None)()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": late, "lr": 0.01})
            with pytest.raises(ValueError, match="more than one parameter group"):
                optimizer.add_param_group({"params": first})
            assert len(optimizer.param_groups) == 2
        for p in model.parameters():
            p.grad = None
        backward(model, step)
        optimizer.step()
        schedule.step()
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    return whole(model.parameters()), [group["lr"] for group in optimizer.param_groups], names


@every
def test_named_parameters_late_groups_and_schedulers(cls):
    expected, lrs, names = grown(0, 1, cls)
    for found, rates, seen in run_ranks(2, grown, cls):
        close(found, expected)
        assert rates == lrs and seen == names


# ---- refusals, each when it can be known ---------------------------------------------------------
class Coupled(torch.optim.Optimizer):
    """Scales every gradient by the norm of all: another method as soon as the parameters are dealt
    out."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.sub_(p.grad / norm, alpha=self.param_groups[0]["lr"])


class Estimating(torch.optim.Optimizer):
    """As Prodigy, a step size from all parameters together, which shows only once it has grown."""

    def __init__(self, params, d0=1e-6):
        super().__init__(params, {"d": d0})

    @torch.no_grad()
    def step(self, closure=None):
        above, below = 0.0, 0.0
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(start=p.clone(), sum=torch.zeros_like(p))
                above += float(group["d"] * (p.grad * (state["start"] - p)).sum())
                state["sum"] += group["d"] * p.grad
                below += float(state["sum"].abs().sum())
        for group in self.param_groups:
            group["d"] = max(group["d"], above / below if below else 0.0)
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["d"])


@pytest.mark.parametrize("cls", [Coupled, Estimating, torch.optim.LBFGS])
def test_methods_that_couple_parameters_are_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} looks at all parameters together.*ddp"):
        refuse_coupled(cls, [{}], {})


@pytest.mark.parametrize(
    "cls", [*CLASSES, torch.optim.Adafactor, torch.optim.NAdam, torch.optim.Rprop, torch.optim.ASGD]
)
def test_methods_that_do_not_are_not_and_nobodys_random_numbers_are_drawn(cls):
    before = torch.random.get_rng_state()
    refuse_coupled(cls, [{"params": [], "names": []}], OPTIONS.get(cls, {}))
    assert torch.equal(before, torch.random.get_rng_state())


def refused(rank, world):
    model, said = sharded(), []
    for cls in (Coupled, torch.optim.LBFGS):
        with pytest.raises(ValueError, match="looks at all parameters together"):
            make_optimizer(cls, model.parameters())
    optimizer = made(AdamW, model)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="process groups.*state_dict"):
            attempt(optimizer)
    with torch.no_grad():
        model(torch.ones(2, 6, dtype=torch.double))  # leaves the root's weights gathered
    with pytest.raises(ValueError, match=r"plain tensor.*reshard\(\)"):
        made(AdamW, model)
    model.reshard()
    late = made(AdamW, model)
    with pytest.raises(ValueError, match="plain tensor"):
        late.add_param_group({"params": nn.Parameter(torch.zeros(2))})
    assert len(late.param_groups) == 1
    with pytest.raises(TypeError):
        make_optimizer(AdamW, next(model.parameters()))
    with pytest.warns(UserWarning, match="reshard"):
        made(AdamWScheduleFree, model).eval()
    with pytest.raises(ValueError, match="use_muon=False"):
        make_optimizer(Muon, model.parameters())
    return said


def test_what_cannot_work_is_said_when_it_can_be_known():
    run_ranks(2, refused)


def run_with(rank, world, text, out, cls, flags):
    import train
    from run import optimizers
    from settings import parse

    optimizers.find_optimizer = lambda name: cls
    words = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=8",
        "--batch_size=4",
        "--steps=2",
        "--eval_every=0",
        "--sample_tokens=0",
        "--plot=false",
        "--precision=fp32",
        "--device=cpu",
        "--save_every=0",
    ]
    try:
        return train.main(parse.parse([f"--data={text}", f"--out_dir={out}", *words, *flags]))[
            "step"
        ]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "flags",
    [
        ["--data_parallel=zero1"],
        ["--data_parallel=zero3"],
        ["--data_parallel=fsdp"],
        ["--tp=2"],
        ["--pp=2"],
        ["--data_parallel=ddp"],
    ],
    ids=lambda flags: flags[0],
)
def test_train_refuses_methods_that_couple_parameters_but_for_ddp(flags, text, tmp_path):
    found = run_ranks(2, run_with, text, tmp_path / "out", Coupled, flags)
    if flags == ["--data_parallel=ddp"]:
        assert found == [2, 2]
    else:
        assert all("looks at all parameters together" in str(said) for said in found)


@pytest.mark.parametrize("flag", ["--offload=cpu", "--precision=bf16_sr"])
def test_so_do_offloading_and_stochastic_rounding_in_one_process(flag, text, tmp_path, monkeypatch):
    from run import optimizers

    monkeypatch.setattr(optimizers, "find_optimizer", None)
    assert "looks at all parameters together" in run_with(
        0, 1, text, tmp_path / "out", Coupled, [flag]
    )


def evaluated(rank, world, cls, looks):
    model = sharded()
    optimizer = made(cls, model)
    for step in range(6):
        if looks:
            optimizer.eval()
            with torch.no_grad():
                backwards = model(torch.ones(2, 6, dtype=torch.double))
            assert backwards.isfinite().all()
            if world > 1:
                model.reshard()
                model.a.reshard()
            optimizer.train()
        train(model, optimizer, [step])
    optimizer.eval()
    return whole(model.parameters())


@pytest.mark.filterwarnings("ignore:fully_shard keeps")
@pytest.mark.parametrize("cls", [cls for cls in CASES if hasattr(cls, "eval")])
def test_schedule_free_with_evaluations_and_reshard_equals_one_process(cls):
    expected = evaluated(0, 1, cls, False)
    for found in run_ranks(2, evaluated, cls, True):
        close(found, expected)
