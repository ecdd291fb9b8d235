"""Schedule-Free beyond its formula: late parameters, a moved β₁, half precision, older states, and
what else of torch people put around it. The formula itself: test_optim_oracles.py."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # before the ranks fork
from harness import run_ranks
from test_optim_contract import give_gradients, parameters, steps
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from optim.param_groups import evaluation_weights
from optim.schedule_free import AdamWScheduleFree, SGDScheduleFree

both = pytest.mark.parametrize(
    "cls", [AdamWScheduleFree, SGDScheduleFree], ids=lambda cls: cls.__name__
)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
F64 = torch.float64
OPTIONS = dict(lr=0.1, weight_decay=0.01, warmup_steps=7, r=0.5)


def made(cls, params, **options):
    optimizer = cls(params, **{**OPTIONS, **options})
    optimizer.train()
    return optimizer


def set_beta1(optimizer, beta1):
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (beta1, *group["betas"][1:])
        else:
            group["momentum"] = beta1


def everything(params, optimizer):
    """Weights, state and groups, to compare bit for bit."""
    groups = [{k: x for k, x in g.items() if k != "params"} for g in optimizer.param_groups]
    states = [copy.deepcopy(optimizer.state.get(p)) for p in params]
    return [p.detach().clone() for p in params], states, groups


def same(a, b) -> bool:
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- counts --------------------------------------------------------------------------------------
@both
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_a_late_parameter_moves_exactly_as_in_a_new_optimizer(cls, dtype):
    params, alone = parameters(dtype, ((4, 3), (5,))), parameters(dtype, ((4, 3), (5,)))[1:]
    optimizer, fresh = made(cls, params), made(cls, alone)
    for t in range(40):
        give_gradients(params, t)
        if t >= 20:
            alone[0].grad = params[1].grad.clone()
            fresh.step()
        else:
            params[1].grad = None
        optimizer.step()
        if t in (25, 30):
            optimizer.eval(), fresh.eval()
            assert torch.equal(params[1], alone[0])
            optimizer.train(), fresh.train()
        assert torch.equal(params[1], alone[0])
    assert same(optimizer.state[params[1]], fresh.state[alone[0]])
    assert optimizer.state[params[1]]["step"] == 20 and optimizer.state[params[0]]["step"] == 40


@both
def test_the_group_has_the_largest_counts_of_its_parameters(cls):
    params = parameters(F64)
    optimizer = made(cls, [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}])
    for t in range(9):
        give_gradients(params, t)
        params[1].grad = params[1].grad if t > 5 else None
        params[3].grad = None
        optimizer.step()
    for group in optimizer.param_groups:
        counts = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
        for of_group, own in ("k", "step"), ("lr_max", "lr_max"), ("weight_sum", "weight_sum"):
            assert group[of_group] == max(state[own] for state in counts) > 0
    assert optimizer.param_groups[0]["k"] == 9 and params[3] not in optimizer.state


# ---- states from before --------------------------------------------------------------------------
def as_saved_before(saved, theirs=False):
    """As these classes once saved it: counts in the group alone. theirs: as the authors'
    package."""
    saved = copy.deepcopy(saved)
    for state in saved["state"].values():
        for name in ("step", "lr_max", "weight_sum", "beta1"):
            del state[name]
    for group in saved["param_groups"] if theirs else ():
        group.update(scheduled_lr=0.1, foreach=True)
    return saved


@both
@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_state_with_counts_in_the_group_goes_on_exactly(cls, theirs, mode):
    params = parameters(F64)
    optimizer = made(cls, params)
    steps(optimizer, params, range(5))
    getattr(optimizer, mode)()
    file = io.BytesIO()
    torch.save(as_saved_before(optimizer.state_dict(), theirs), file)
    file.seek(0)
    resumed = [p.detach().clone().requires_grad_() for p in params]
    other = cls(resumed)  # a new one, in eval mode, with the defaults
    other.load_state_dict(torch.load(file, weights_only=True))
    for o, ps in (optimizer, params), (other, resumed):
        o.train()
        steps(o, ps, range(5, 15))
        o.eval()
    for group in other.param_groups if theirs else ():
        assert group.pop("scheduled_lr") == 0.1 and group.pop("foreach")
    assert same(everything(params, optimizer), everything(resumed, other))


@both
@pytest.mark.parametrize(
    "key",
    [
        "k",
        "lr_max",
        "weight_sum",
        "train_mode",
        "r",
        "warmup_steps",
        "eps",
        "betas",
        "momentum",
        "weight_decay",
        "weight_lr_power",
        "lr",
    ],
)
def test_what_a_saved_group_does_not_say_stays_as_it_is(cls, key):
    params = parameters(F64)
    optimizer = made(cls, params)
    steps(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].pop(key, None)
    other = made(cls, copies := [p.detach().clone().requires_grad_() for p in params])
    expected = other.param_groups[0].get(key)
    other.load_state_dict(saved)
    assert other.param_groups[0].get(key) == expected
    for o, ps in (optimizer, params), (other, copies):
        steps(o, ps, range(3, 6))
    assert key in ("k", "lr_max", "weight_sum") or all(map(torch.equal, params, copies))


@both
def test_a_saved_list_of_groups_of_another_length_is_refused(cls):
    params = parameters()
    saved = made(cls, [{"params": params[:1]}, {"params": params[1:]}]).state_dict()
    other = made(cls, params)
    before = everything(params, other)
    with pytest.raises(ValueError, match="number of parameter groups"):
        other.load_state_dict(saved)
    assert same(before, everything(params, other))
    assert not other._optimizer_load_state_dict_pre_hooks
    assert not other._optimizer_load_state_dict_post_hooks


@both
def test_hooks_of_load_state_dict_are_obeyed_and_what_was_given_is_left_alone(cls):
    params = parameters(torch.bfloat16, ((4, 4), (4, 4)))
    optimizer, seen = made(cls, params), []
    steps(optimizer, params, range(4))
    saved = optimizer.state_dict()
    given = copy.deepcopy(saved)

    def exchange(_, state_dict):
        state = state_dict["state"]
        return {**state_dict, "state": {0: state[1], 1: state[0]}}

    def look(other):
        seen.extend(x.dtype for s in other.state.values() for x in s.values() if torch.is_tensor(x))

    other = made(cls, copies := parameters(torch.bfloat16, ((4, 4), (4, 4))))
    other.register_load_state_dict_pre_hook(exchange)
    other.register_load_state_dict_post_hook(look)
    other.load_state_dict(given)
    assert all(same(other.state[p], saved["state"][1 - i]) for i, p in enumerate(copies))
    assert set(seen) == {torch.float32}
    steps(other, copies, range(2))
    assert same(given, saved)
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


@both
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_and_a_pickle_go_on_bit_for_bit(cls, older, how):
    params = parameters(torch.bfloat16)
    optimizer = made(cls, params)
    steps(optimizer, params, range(4))
    if older:  # the object as it was before each parameter had counts
        plain = cls(params, **OPTIONS)
        plain.param_groups = optimizer.param_groups
        for p, state in optimizer.state.items():
            plain.state[p] = {k: x for k, x in state.items() if torch.is_tensor(x)}
        other = how(plain)
    else:
        other = how(optimizer)
    copies = other.param_groups[0]["params"]
    for o, ps in (optimizer, params), (other, copies):
        steps(o, ps, range(4, 8))
    assert copies[0] is not params[0]
    assert same(everything(params, optimizer), everything(copies, other))


# ---- a scheduler that moves β₁ -------------------------------------------------------------------
def one_cycle(optimizer, n):
    lr = optimizer.param_groups[0]["lr"]
    return OneCycleLR(optimizer, max_lr=lr, total_steps=n + 1, base_momentum=0.6, max_momentum=0.97)


def cyclic(optimizer, n):
    return CyclicLR(
        optimizer, base_lr=0.01, max_lr=0.2, step_size_up=7, base_momentum=0.5, max_momentum=0.9
    )


@both
@pytest.mark.parametrize("scheduler", [None, one_cycle, cyclic])
@pytest.mark.parametrize("looking", [False, True])
def test_the_evaluated_weights_are_the_mean_of_z_whatever_moves_beta1(cls, scheduler, looking):
    n, params = 60, parameters(F64, ((4, 3), (5,), ()))
    optimizer = made(cls, params, warmup_steps=0, r=0.0)
    moves = scheduler and scheduler(optimizer, n)
    zs, ws = [[] for _ in params], [[] for _ in params]
    for t in range(n):
        give_gradients(params, t)
        for i, p in enumerate(params):
            p.grad = None if t % 7 == i + 1 else p.grad
        before = everything(params, optimizer)
        optimizer.step()
        for i, p in enumerate(params):
            if p.grad is None:
                assert same(before[0][i], p.detach()) and same(before[1][i], optimizer.state.get(p))
            else:
                zs[i].append(optimizer.state[p]["z"].clone())
                ws[i].append(optimizer.state[p]["lr_max"] ** 2)
        if moves:
            moves.step()
        if looking and t % 3 == 0:  # with the β₁ of the next step already set
            optimizer.eval(), optimizer.train()
    y, beta1 = [p.detach().clone() for p in params], [optimizer.state[p]["beta1"] for p in params]
    optimizer.eval()
    for p, y, b, z, w in zip(params, y, beta1, zs, ws):
        w = torch.tensor(w, dtype=F64).view(-1, *[1] * p.ndim)
        mean = (torch.stack(z) * w).sum(0) / w.sum()
        assert (p - mean).abs().max() < 1e-12
        assert (y - (1 - b) * z[-1] - b * mean).abs().max() < 1e-12  # the definition of y


@both
def test_a_moved_beta1_is_a_step_from_the_y_of_the_new_one(cls):
    """Another optimizer gets the same z and x, but a y made with the new β₁ in the first place."""
    params = parameters(F64)
    optimizer = made(cls, params)
    steps(optimizer, params, range(5))
    other = made(cls, copies := [p.detach().clone().requires_grad_() for p in params])
    other.load_state_dict(optimizer.state_dict())
    other.eval()
    for o in (optimizer, other):
        set_beta1(o, 0.6)
        for group in o.param_groups:
            group["weight_decay"] = 0.0  # it is taken where the gradient was, at the y of before
    for p in copies:
        other.state[p]["beta1"] = 0.6
    other.train()
    assert not torch.allclose(params[0], copies[0])
    for o, ps in (optimizer, params), (other, copies):
        steps(o, ps, [5, 6])
    assert all(torch.allclose(p, q, rtol=1e-12, atol=1e-12) for p, q in zip(params, copies))


# ---- half precision ------------------------------------------------------------------------------
@both
@halves
def test_half_precision_is_the_float32_run_rounded_once_when_written(cls, dtype):
    half, full = parameters(dtype), [p.detach().float().requires_grad_() for p in parameters(dtype)]
    a, b = made(cls, half, lr=1e-3), made(cls, full, lr=1e-3)  # most steps are too small for bf16
    for t in range(60):
        give_gradients(half, t)
        for p, q in zip(half, full):
            p.grad = None if t % 5 == 2 and p.ndim == 1 else p.grad
            q.grad = None if p.grad is None else p.grad.float()
        a.step(), b.step()
        if t == 30:
            set_beta1(a, 0.8), set_beta1(b, 0.8)
        for change in ("eval", "train") if t % 4 == 0 else ():
            getattr(a, change)(), getattr(b, change)()
            assert all(torch.equal(p, q.to(dtype)) for p, q in zip(half, full))
        for p, q in zip(half, full):
            assert torch.equal(p, q.to(dtype))
            assert a.state[p]["lost"].dtype == torch.float32
            assert torch.equal(p.float() + a.state[p]["lost"], q)
    assert not any("lost" in state for state in b.state.values())


@both
@halves
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_weights_that_somebody_loads_into_p_count(cls, dtype, mode):
    params = parameters(dtype)
    optimizer = made(cls, params)
    steps(optimizer, params, range(4))
    getattr(optimizer, mode)()
    with torch.no_grad():
        for p in params:
            p.view(-1)[::2] = 0  # in place, some numbers alone
    other = made(cls, copies := [p.detach().clone().requires_grad_() for p in params])
    other.load_state_dict(optimizer.state_dict())
    for q in copies:
        other.state[q]["lost"].view(-1)[::2] = 0
    for o, ps in (optimizer, params), (other, copies):
        o.train()
        steps(o, ps, range(4, 7))
        o.eval()
    assert same(everything(params, optimizer), everything(copies, other))


@both
@halves
@pytest.mark.parametrize("already", [False, True])
def test_looking_puts_back_the_very_bits_and_what_was_lost(cls, dtype, already):
    params = parameters(dtype, ((60, 50), (5,), ()))
    optimizer = made(
        cls, [{"params": params[:2], "names": ["a", "b"]}, {"params": params[2:], "names": ["c"]}]
    )
    steps(optimizer, params[:2], range(20))  # the last one has no state yet
    if already:
        optimizer.eval()
    before, held = everything(params, optimizer), {p: s["lost"] for p, s in optimizer.state.items()}
    kept = {p: x.clone() for p, x in held.items()}
    with evaluation_weights(optimizer) as training:
        assert set(training) == (set() if already else set("abc"))
        assert not any(g["train_mode"] for g in optimizer.param_groups)
        assert all(torch.equal(x, kept[p]) for p, x in held.items())  # a save holds y's
    assert same(before, everything(params, optimizer))


@both
@halves
def test_half_precision_weights_learn(cls, dtype):
    """A small regression of which a small lr loses every single step to rounding."""
    torch.manual_seed(0)
    inputs, target = torch.randn(64, 8), torch.randn(1, 8)
    for kept in (dtype, torch.float32):
        w = (target + 0.5).to(kept).requires_grad_()
        optimizer = made(cls, [w], lr=1e-3 if cls is AdamWScheduleFree else 3e-3, warmup_steps=0)
        losses = []
        for t in range(400):
            if t % 399 == 0:
                optimizer.eval()
                losses.append((inputs @ (w.detach().float() - target).T).square().mean().item())
                optimizer.train()
            w.grad = ((w.detach().float() - target) @ (inputs.T @ inputs) / 64).to(kept)
            optimizer.step()
        assert losses[1] < 0.75 * losses[0]
        assert kept == torch.float32 or (ends := losses[1])
    assert abs(ends - losses[1]) < 0.02 * losses[1]


@both
@pytest.mark.parametrize(
    "dtype, more", [(torch.float32, 0), (F64, 0), (torch.bfloat16, 4), (torch.float16, 4)]
)
def test_state_bytes_are_those_of_the_docstring(cls, dtype, more):
    w = torch.randn(16, 8).to(dtype).requires_grad_()
    optimizer = made(cls, [w])
    steps(optimizer, [w], range(2))
    optimizer.eval()
    n = sum(x.nbytes for x in optimizer.state[w].values() if torch.is_tensor(x)) / w.numel()
    assert n == (8 if cls is AdamWScheduleFree else 4) * (2 if dtype == F64 else 1) + more


# ---- no half steps -------------------------------------------------------------------------------
@both
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_group_added_at_any_time_takes_the_mode_of_the_others(cls, mode):
    params = parameters(F64)
    optimizer = made(cls, params[:2])
    steps(optimizer, params, range(3))
    getattr(optimizer, mode)()
    group = {"params": params[2:4], "lr": 0.02}
    optimizer.add_param_group(group)
    assert "k" not in group  # the caller's own, for another optimizer perhaps
    optimizer.add_param_group({**optimizer.param_groups[0], "params": params[4:]})  # with counts
    assert [g["train_mode"] for g in optimizer.param_groups] == [mode == "train"] * 3
    assert [g["k"] for g in optimizer.param_groups] == [3, 0, 0]
    optimizer.train()
    late, fresh = [p.detach().clone().requires_grad_() for p in params[2:]], None
    fresh = made(cls, [{"params": late[:2], "lr": 0.02}, {"params": late[2:]}])
    for t in range(3, 6):
        give_gradients(params, t)
        for p, q in zip(params[2:], late):
            q.grad = p.grad.clone()
        optimizer.step(), fresh.step()
    optimizer.eval(), fresh.eval()
    assert all(map(torch.equal, params[2:], late))


def break_mode(optimizer, p):
    optimizer.param_groups[1]["train_mode"] = False


def break_sparse(optimizer, p):
    p.grad = torch.eye(3, dtype=p.dtype).to_sparse()


def break_beta1(optimizer, p):
    optimizer.param_groups[1].update(betas=(1.0, 0.9), momentum=0.0)


@both
@pytest.mark.parametrize(
    "fault, error, words",
    [
        (break_mode, RuntimeError, "train"),
        (break_sparse, RuntimeError, "dense"),
        (None, RuntimeError, "real"),
        (break_beta1, ValueError, r"beta1 \(momentum\) [10].0.*\(0, 1\)"),
    ],
)
def test_an_error_comes_before_anything_has_changed(cls, fault, error, words):
    params = parameters(F64, ((3, 3), (3, 3)))
    if fault is None:
        params[1] = torch.zeros(3, 3, dtype=torch.complex64, requires_grad=True)
    optimizer, calls = made(cls, [{"params": params[:1]}, {"params": params[1:]}]), []
    if fault is not None:
        steps(optimizer, params, range(2))
    give_gradients(params, 2)
    if fault is not None:
        fault(optimizer, params[1])
    before = everything(params, optimizer)
    with pytest.raises(error, match=words):
        optimizer.step(lambda: calls.append("closure"))
    assert same(before, everything(params, optimizer)) and len(calls) == (fault is not break_mode)


# ---- what else of torch people put around it -----------------------------------------------------
@both
def test_named_parameters_work(cls):
    runs = []
    for named in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(3, 2, dtype=F64)
        optimizer = made(cls, net.named_parameters() if named else net.parameters())
        steps(optimizer, [*net.parameters()], range(3))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(optimizer, [*net.parameters()], range(3, 5))
        runs.append(everything([*net.parameters()], optimizer))
        names = optimizer.param_groups[0].get("param_names")
        assert names == (["weight", "bias"] if named else None)
    runs[1][2][0].pop("param_names")
    assert same(*runs)


@both
@pytest.mark.parametrize("cut", [True, False])
def test_parameters_without_elements_and_a_tensor_as_lr_work(cls, cut):
    params, plain = (parameters(shapes=((3, 0), (0,), (4, 3))) for _ in range(2))
    lr = torch.tensor(0.25)
    optimizer = made(cls, params, lr=lr, warmup_steps=0)
    reference = made(cls, plain, lr=0.25, warmup_steps=0)
    for t in range(6):
        steps(optimizer, params, [t]), steps(reference, plain, [t])
        if cut and t == 2:
            lr.fill_(0.125)  # in place, as torch's schedulers do
            reference.param_groups[0]["lr"] = 0.125
    for o in (optimizer, reference):
        o.eval(), o.train()
    state, expected = optimizer.state[params[2]], reference.state[plain[2]]
    assert same(state, expected) and torch.equal(params[2], plain[2])
    assert optimizer.param_groups[0]["lr_max"] == 0.25


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_the_step_changes_nothing(cls, dtype):
    runs = []
    for inside in (False, True):
        params = parameters(dtype)
        optimizer = made(cls, params)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            for t in range(4):
                steps(optimizer, params, [t])
                optimizer.eval(), optimizer.train()
        runs.append(everything(params, optimizer))
    assert same(*runs)


@both
def test_grad_scaler_skips_a_step_that_overflows_and_no_other(cls):
    params, plain = parameters(), parameters()
    optimizer, reference = made(cls, params), made(cls, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for t in range(5):
        give_gradients(params, t)
        give_gradients(plain, t)
        for p in params:
            p.grad.mul_(scaler.scale(torch.ones(())))
        if t == 2:
            params[0].grad.view(-1)[0] = torch.inf
        else:
            reference.step()
        before = everything(params, optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert same(before, everything(params, optimizer)) == (t == 2)
    assert same(everything(params, optimizer), everything(plain, reference))


@both
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_torch_compile_of_the_step_changes_nothing(cls, dtype):
    runs, shapes = [], ((4, 3), (5,))  # compiled, torch 2.13 loses what is done to 0-D float64
    for compiled in (False, True):
        torch._dynamo.reset()
        params = parameters(dtype, shapes)
        optimizer = made(cls, params)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for t in range(6):
            give_gradients(params, t)
            if t == 3:
                params[1].grad = None
                set_beta1(optimizer, 0.8)
            step()
            if t == 4:
                optimizer.eval(), optimizer.train()
        runs.append([*params, *(x for p in params for x in optimizer.state[p].values())])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@both
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_torchs_distributed_checkpoint_of_it_goes_on_bit_for_bit(cls, dtype):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)

    model, other = net(), net()
    optimizer, resumed = (made(cls, m.parameters()) for m in (model, other))
    steps(optimizer, [*model.parameters()], range(5))
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    other.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other, resumed, saved)
    pairs = [([*m.parameters()], o) for m, o in ((model, optimizer), (other, resumed))]
    for params, o in pairs:
        steps(o, params, range(5, 9))
        o.eval()
    assert same(*(everything(*pair) for pair in pairs))
    with pytest.raises(RuntimeError, match=r"eval mode; call train\(\) first"):  # it makes a step
        dcp.get_optimizer_state_dict(net(), cls(net().parameters()))


def spread(rank, world, cls, advice):
    """The final average; the losses of evaluations; how often eval() warned."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    if world > 1:
        fully_shard(model[0])
        fully_shard(model)
    optimizer = made(cls, model.parameters())
    x, losses = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double(), []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(6):
            optimizer.eval()
            with torch.no_grad():
                losses.append(float(model(x).square().mean()))
            if advice:
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()
            optimizer.train()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
    ends = [p.full_tensor() if world > 1 else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in ends]), losses, [str(w.message) for w in said]


@both
def test_fully_shard_with_evaluations_equals_one_process_if_one_does_what_eval_says(cls):
    weights, losses, said = spread(0, 1, cls, False)
    assert said == []
    for theirs, their_losses, said in run_ranks(2, spread, cls, True):
        assert (theirs - weights).abs().max() < 1e-12
        assert max(abs(a - b) for a, b in zip(losses, their_losses)) < 1e-12
        said = [text for text in said if "Schedule" in text]
        assert len(said) == 1 and "module.reshard()" in said[0] and "before train()" in said[0]


@pytest.mark.parametrize("optim", ["schedule_free", "schedule_free.SGDScheduleFree"])
def test_train_refuses_to_warm_up_the_momentum_of_an_average(optim, text, tmp_path):
    import train
    from settings import parse

    words = [
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=8",
        "--batch_size=4",
        "--steps=2",
        "--device=cpu",
        "--precision=fp32",
        "--momentum_warmup=5",
    ]
    with pytest.raises(ValueError, match="no momentum to warm up"):
        train.main(
            parse.parse(
                [f"--data={text}", f"--out_dir={tmp_path / 'out'}", f"--optim={optim}", *words]
            )
        )
