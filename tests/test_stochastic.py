"""Stochastic rounding to bf16: right on average, reproducible in every layout, around every
optimizer."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from harness import fitted, gpu, joined, placed, run_ranks
from test_offload import with_counts
from test_optim_contract import CASES, build, every, give_gradients, parameters, tensors
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import lr_scheduler

from memory.offload import offload
from model import GPT, GPTConfig, initial_weight
from optim import adamw, muon, schedule_free, sgd
from optim import param_groups as groups_of
from parallel.fsdp import FSDP
from parallel.mesh import make_mesh
from parallel.shard import Shard
from parallel.sharded_optimizer import Adapter
from parallel.zero import ZeRO
from precision.stochastic import element_index, random_bits, round_to_bf16, stochastic

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ALL = torch.arange(2**16, dtype=torch.int32)  # every draw there is


def named(optimizer):
    for i, group in enumerate(optimizer.param_groups):
        group["names"] = [f"{i}.{j}" for j in range(len(group["params"]))]
    return optimizer


def make(cls, params, seed=0, chunk_mb=64.0, **options):
    return stochastic(named(build(cls, params, **options)), seed, chunk_mb=chunk_mb)


def assert_same(a, b):
    """Parameters and state of two (parameters, optimizer), bit for bit."""
    (ps, one), (qs, two) = a, b
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
    assert len(one.state) == len(two.state)
    for p, q in zip(ps, qs):
        for name, x in one.state.get(p, {}).items():
            y = two.state[q][name]
            if torch.is_tensor(x):  # an offloaded one is on the host
                assert torch.equal(x, y.to(x.device)) and x.dtype == y.dtype, name
            else:
                assert x == y, name


# ---- the rounding --------------------------------------------------------------------------------
@pytest.mark.gpu
def test_over_all_draws_the_mean_is_exact_and_both_neighbours_enclose_it(device):
    torch.manual_seed(0)
    values = [
        *torch.randn(12).tolist(),
        1 + 2**-23,
        -1 - 2**-9,
        3e38,
        1e-38,
        1e-40,
        -3e-41,
        0.0,
        7.0,
    ]
    for value in values:
        x = torch.tensor(value, device=device)
        rounded = round_to_bf16(x.expand(2**16), ALL.to(device))
        assert rounded.dtype == BF16
        # Sums of 2^16 numbers of 8 bits are exact
        assert rounded.double().mean().item() == x.double().item()
        near = rounded.double().unique()
        assert len(near) <= 2 and near[0] <= x.double() <= near[-1]
        if len(near) == 1:
            assert x.to(BF16).float() == x


@pytest.mark.gpu
def test_nothing_becomes_infinite_and_what_is_not_finite_stays(device):
    largest = torch.finfo(BF16).max
    draws = ALL.to(device)
    top = torch.tensor([3.4e38, -3.4e38, torch.finfo(torch.float32).max], device=device)
    rounded = round_to_bf16(top.view(3, 1).expand(3, 2**16), draws).float()
    assert rounded.isfinite().all() and (rounded.abs() == largest).all()
    assert (rounded.sign()[:, 0] == top.sign()).all()
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32, device=device)
    infinite = torch.tensor([torch.inf, -torch.inf], device=device)
    for bits in (draws[:1], draws[-1:]):
        assert round_to_bf16(infinite, bits).tolist() == [torch.inf, -torch.inf]
        assert round_to_bf16(payload.view(torch.float32), bits).isnan().all()
    zero = torch.tensor([-0.0], device=device)
    assert round_to_bf16(zero, draws[-1:]).view(torch.int16).item() == -(2**15)


def hashed(seed, step, name, i):
    """random_bits in plain integers."""
    import hashlib

    digest = hashlib.sha256(f"{seed}:stochastic:{step}:{name}".encode()).digest()
    h = i * 0x9E3779B9
    for at in (0, 4):
        h = (h + int.from_bytes(digest[at : at + 4], "little")) % 2**32
        h = (h ^ h >> 16) * 0x45D9F3B % 2**32
    return h >> 16


@pytest.mark.gpu
def test_the_bits_are_a_known_function_that_no_device_changes(device):
    index = torch.tensor([0, 1, 2, 1000, 2**31 - 1, -1], dtype=torch.int32)  # -1: element 2^32 - 1
    index = index.to(device)
    assert random_bits(3, 7, "blocks.0.attn.q.weight", index).tolist() == [
        hashed(3, 7, "blocks.0.attn.q.weight", i % 2**32) for i in index.tolist()
    ]


def test_the_bits_are_uniform_and_know_nothing_of_each_other():
    index = torch.arange(2**18, dtype=torch.int32)
    draws = [
        random_bits(seed, step, name, index).double()
        for seed in (0, 1)
        for step in (0, 1)
        for name in ("a", "b")
    ]
    flat = torch.stack(draws)
    assert flat.min() >= 0 and flat.max() <= 65535
    assert ((flat.mean(1) - 32767.5).abs() < 5 * 18918.6 / 2**9).all()
    for x in draws:
        histogram = torch.bincount((x / 256).long(), minlength=256)
        # Chi-square
        assert ((histogram - 1024.0).square() / 1024).sum() < 255 + 5 * (2 * 255) ** 0.5
        for distance in (1, 2, 8, 64, 768):
            assert torch.corrcoef(torch.stack([x[distance:], x[:-distance]]))[0, 1].abs() < 0.01
    assert (torch.corrcoef(flat) - torch.eye(8)).abs().max() < 0.01


def test_a_box_has_the_indices_of_the_whole():
    whole = torch.arange(5 * 4 * 6, dtype=torch.int32).view(5, 4, 6)
    assert torch.equal(element_index((5, 4, 6), (5, 4, 6), (0, 0, 0), CPU), whole)
    assert torch.equal(element_index((2, 3, 6), (5, 4, 6), (3, 1, 0), CPU), whole[3:, 1:])
    assert element_index((), (), (), CPU).item() == 0
    assert element_index((0, 4), (5, 4), (5, 0), CPU).shape == (0, 4)
    # 2^34 elements: modulo 2^32
    far = element_index((1, 2), (2**20, 2**14), (2**20 - 1, 2**14 - 2), CPU)
    assert far.tolist() == [[-2, -1]]


# ---- around an optimizer -------------------------------------------------------------------------
@every
def test_the_expected_step_is_the_float32_step(cls):
    start, n = parameters(BF16), 64
    exact = [p.detach().float().requires_grad_() for p in start]
    reference = build(cls, exact)
    give_gradients(start, 1)
    for p, q in zip(start, exact):
        q.grad = p.grad.float()
    reference.step()
    sums, signs = [torch.zeros(p.shape, dtype=torch.float64) for p in start], 0.0
    for seed in range(n):
        params = parameters(BF16)
        optimizer = make(cls, params, seed)
        give_gradients(params, 1)
        optimizer.step()
        for p, q, total in zip(params, exact, sums):
            total += p.double()
            low, high = round_to_bf16(q.detach(), ALL[:1]), round_to_bf16(q.detach(), ALL[-1:])
            assert ((p == low) | (p == high)).all()
    for q, total in zip(exact, sums):
        low, high = (round_to_bf16(q.detach(), bits).double() for bits in (ALL[:1], ALL[-1:]))
        gap, up = (
            (high - low).abs(),
            (q.double() - low).abs() / (high - low).abs().clamp(min=1e-300),
        )
        sd = gap * (up * (1 - up) / n).sqrt()
        z = (total / n - q.double()) / sd.clamp(min=1e-12)
        assert z.abs().max() < 5
        signs += z.sum().item()
    count = sum(p.numel() for p in exact)
    assert abs(signs) < 5 * count**0.5


@every
def test_step_by_step_state_is_that_of_float32_weights(cls):
    """The float32 run takes each step from the rounded weights, but with the state it has."""
    params, exact = (
        parameters(BF16),
        [p.detach().float().requires_grad_() for p in parameters(BF16)],
    )
    optimizer, reference = make(cls, params), build(cls, exact)
    for t in range(5):
        with torch.no_grad():
            for p, q in zip(params, exact):
                q.copy_(p)
        give_gradients(params, t)
        for p, q in zip(params, exact):
            q.grad = p.grad.float()
        optimizer.step(), reference.step()
        for p, q in zip(params, exact):
            low, high = round_to_bf16(q.detach(), ALL[:1]), round_to_bf16(q.detach(), ALL[-1:])
            assert ((p == low) | (p == high)).all()
            assert optimizer.state[p].keys() == reference.state[q].keys()
            for name, x in reference.state[q].items():
                y = optimizer.state[p][name]
                assert (y.dtype == x.dtype and torch.equal(x, y)) if torch.is_tensor(x) else x == y


def train(optimizer, params, steps):
    for t in steps:
        give_gradients(params, t)
        optimizer.step()


@every
def test_a_resume_through_a_file_is_bitwise_and_keeps_float32_state(cls):
    params = parameters(BF16)
    optimizer = make(cls, params)
    train(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [p.requires_grad_() for p in saved["params"]]
    other = make(cls, resumed)
    other.load_state_dict(saved["optimizer"])
    assert [g["sr_step"] for g in other.param_groups] == [4] * len(other.param_groups)
    assert_same((params, optimizer), (resumed, other))
    for pair in ((params, optimizer), (resumed, other)):
        train(pair[1], pair[0], range(4, 8))
    assert_same((params, optimizer), (resumed, other))
    assert all(x.dtype == torch.float32 for x in tensors(other) if x.is_floating_point())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "cls, options",
    [
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_torchs_own_optimizers_fit_and_their_state_comes_back_in_float32(cls, options, device):
    runs = []
    for stops in ((), (3,)):
        params = parameters(BF16, device=device)
        optimizer = stochastic(named(cls(params, lr=0.01, **options)), 0)
        for t in range(6):
            if t in stops:
                saved = optimizer.state_dict()
                params = [p.detach().clone().requires_grad_() for p in params]
                optimizer = stochastic(named(cls(params, lr=0.01, **options)), 0)
                optimizer.load_state_dict(saved)
            train(optimizer, params, [t])
        runs.append((params, optimizer))
        assert all(
            x.dtype == torch.float32 for state in optimizer.state.values() for x in state.values()
        )
    assert_same(*runs)


@every
@pytest.mark.parametrize("chunk_mb", [1e-6, 1e-4])
def test_chunks_change_nothing(cls, chunk_mb):
    pairs = []
    for size in (64.0, chunk_mb):
        params = parameters(BF16, ((6, 4), (4, 6), (5,), (2, 3, 4), (), (6, 4), (6, 4)))
        pairs.append((params, make(cls, params, chunk_mb=size)))
        for t in range(4):
            give_gradients(params, t)
            params[0].grad = None if t in (0, 2) else params[0].grad
            pairs[-1][1].step()
    assert_same(*pairs)
    for g, h in zip(pairs[0][1].param_groups, pairs[1][1].param_groups, strict=True):
        assert {**g, "params": 0} == {**h, "params": 0} and g["sr_step"] == 4


def test_what_a_group_counts_is_the_same_in_chunks():
    for runs in with_counts(lambda o, whole: stochastic(o, 0, chunk_mb=64.0 if whole else 1e-6)):
        assert_same(*runs)
        groups = [[{**g, "params": 0} for g in optimizer.param_groups] for _, optimizer in runs]
        assert groups[0] == groups[1]


@pytest.mark.parametrize(
    "cls", [cls for cls in CASES if cls.elementwise], ids=lambda cls: cls.__name__
)
def test_a_shard_with_its_offsets_gets_the_bits_of_the_whole(cls):
    torch.manual_seed(0)
    whole = torch.randn(9, 6).to(BF16)
    runs = {}
    for rows in (slice(0, 9), slice(0, 4), slice(4, 9)):
        p = whole[rows].clone().requires_grad_()
        optimizer = build(cls, [p])
        shards = {"0.0": ((9, 6), (rows.start, 0))} if p.shape[0] < 9 else None
        optimizer = stochastic(named(optimizer), 5, shards)
        for t in range(5):
            gradient = torch.randn(9, 6, generator=torch.Generator().manual_seed(t)).to(BF16)
            p.grad = gradient[rows].clone()
            optimizer.step()
        runs[rows.start, rows.stop] = p.detach()
    assert torch.equal(torch.cat([runs[0, 4], runs[4, 9]]), runs[0, 9])


@pytest.mark.parametrize("cls", [gpu(adamw.AdamW), gpu(schedule_free.AdamWScheduleFree), muon.Muon])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloading_around_it_changes_nothing(cls, place, tmp_path, device):
    pairs = []
    for offloaded in (False, True):
        params = parameters(BF16, device=device)
        optimizer = make(cls, params)
        optimizer = offload(optimizer, place, tmp_path, device, 1e-6) if offloaded else optimizer
        train(optimizer, params, range(3))
        if offloaded:
            optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, params, range(3, 5))
        pairs.append((params, optimizer))
    assert_same(*pairs)
    assert [g["sr_step"] for g in pairs[1][1].param_groups][0] == 5


@pytest.mark.gpu
def test_it_learns_where_rounding_to_nearest_stands_still(device):
    ends = {}
    for rounding in ("nearest", "stochastic"):
        p = torch.full((64, 64), 1.0, dtype=BF16, device=device).requires_grad_()
        optimizer = named(sgd.SGD([p], lr=1e-3))
        optimizer = stochastic(optimizer, 0) if rounding == "stochastic" else optimizer
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()  # 0.001 a step; bf16 below 1 has gaps of 0.0039
        ends[rounding] = p.detach().double().mean().item()
    assert ends["nearest"] == 1.0
    assert abs(ends["stochastic"] - 0.8) < 2e-3


def test_only_bf16_parameters_with_a_gradient_change_and_the_gradient_stays():
    a, b, c = (
        torch.ones(3, dtype=dtype, requires_grad=True) for dtype in (BF16, torch.float32, BF16)
    )
    optimizer = stochastic(named(sgd.SGD([a, b, c], lr=0.1)), 0)
    a.grad, b.grad = torch.full_like(a, 0.3), torch.full_like(b, 0.3)
    before = a.grad.clone()
    optimizer.step()
    torch.testing.assert_close(b.detach(), torch.full((3,), 0.97))
    assert b.dtype == torch.float32 and torch.equal(c, torch.ones(3, dtype=BF16))
    assert a.dtype == BF16 and torch.equal(a.grad, before) and a.grad.dtype == BF16
    assert optimizer.param_groups[0]["params"] == [a, b, c] and c not in optimizer.state


def test_hooks_run_once_the_closure_too_and_a_failed_step_leaves_groups_in_place():
    params, calls = parameters(BF16), []
    optimizer = named(build(adamw.AdamW, params))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer = stochastic(optimizer, 0, chunk_mb=1e-6)
    assert isinstance(optimizer, adamw.AdamW) and type(optimizer).__name__ == "AdamW"

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = sum(p.float().square().sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and calls == ["pre", True, "post"]
    calls.clear()
    # Where torch wraps step(), if it is not wrapped yet
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.step() is None and calls == ["pre", "post"]
    groups, state = optimizer.param_groups, optimizer.state
    params[2].grad = torch.ones(5, dtype=BF16).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert (
        optimizer.param_groups is groups
        and optimizer.state is state
        and groups[0]["params"] == params
    )
    another = torch.ones(2, requires_grad=True)  # a plain one is what it was
    another.grad = torch.ones(2)
    adamw.AdamW([another]).step()


def test_looking_at_schedule_free_s_average_changes_nothing():
    params = parameters(BF16)
    optimizer = make(schedule_free.AdamWScheduleFree, params)
    train(optimizer, params, range(3))
    before = [p.detach().clone() for p in params]
    with groups_of.evaluation_weights(optimizer):
        assert not all(torch.equal(p, q) for p, q in zip(params, before))
    assert all(torch.equal(p, q) for p, q in zip(params, before))
    assert not any("lost" in state for state in optimizer.state.values())


def test_groups_without_names_are_refused_and_empty_ones_count():
    with pytest.raises(ValueError, match="names"):
        stochastic(sgd.SGD(parameters(BF16), lr=0.1), 0)
    optimizer = stochastic(schedule_free.AdamWScheduleFree([{"params": [], "names": []}]), 0)
    optimizer.train()
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 0 and optimizer.param_groups[0]["sr_step"] == 1


# ---- what else of torch people put around it -----------------------------------------------------
TORCHS = [
    getattr(torch.optim, name)
    for name in (
        "AdamW",
        "Adam",
        "SGD",
        "Adagrad",
        "Adadelta",
        "Adafactor",
        "Adamax",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "Muon",
    )
]
all_of_them = pytest.mark.parametrize(
    "cls", [*CASES, *TORCHS], ids=lambda cls: f"{cls.__module__}.{cls.__name__}"
)


def plain(cls, shapes=((6, 4), (4, 6), (5,), ())):
    """(parameters, the optimizer before stochastic()), of torch's classes too."""
    params = parameters(BF16, shapes[:2] if cls is torch.optim.Muon else shapes)
    return params, named(build(cls, params) if cls in CASES else cls(params, lr=0.01))


def twin(cls, **shapes):
    params, optimizer = plain(cls, **shapes)
    return params, stochastic(optimizer, 0)


@all_of_them
@pytest.mark.parametrize("before", [True, False])
def test_schedulers_may_come_before_or_after_and_say_nothing(cls, before):
    params, optimizer = plain(cls)

    def schedulers():
        return [lr_scheduler.ConstantLR(optimizer, 1.0) for _ in range(2)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = schedulers() if before else []
        optimizer = stochastic(optimizer, 0)
        made = made or schedulers()
        for t in range(4):
            train(optimizer, params, [t])
            for scheduler in made:
                scheduler.step()
    reference = twin(cls)
    train(reference[1], reference[0], range(4))
    assert_same((params, optimizer), reference)
    assert optimizer.param_groups[0]["sr_step"] == 4 and isinstance(optimizer, cls)


def test_a_scheduler_that_steps_first_is_still_told():
    for before in (True, False):
        _, optimizer = plain(adamw.AdamW)
        scheduler = lr_scheduler.ConstantLR(optimizer, 1.0) if before else None
        optimizer = stochastic(optimizer, 0)
        scheduler = scheduler or lr_scheduler.ConstantLR(optimizer, 1.0)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_step_that_something_else_has_replaced_is_refused(scheduled, tmp_path):
    def by_hand(optimizer):
        step = optimizer.step
        optimizer.step = type(step)(lambda self, *args: step(*args), optimizer)
        return optimizer

    def offloaded(optimizer):
        return offload(optimizer, "cpu", tmp_path, CPU)

    for replace in (offloaded, by_hand, lambda o: stochastic(o, 0)):
        optimizer = replace(plain(torch.optim.AdamW)[1])
        if scheduled:
            lr_scheduler.ConstantLR(optimizer, 1.0)
        cls, own = type(optimizer), vars(optimizer).get("step")
        with pytest.raises(ValueError, match="replaced"):
            stochastic(optimizer, 0)
        assert type(optimizer) is cls and vars(optimizer).get("step") is own


@all_of_them
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_and_a_pickle_go_on_rounding_bit_for_bit(cls, how):
    params, optimizer = plain(cls)
    scheduler = lr_scheduler.ConstantLR(optimizer, 1.0)
    optimizer = stochastic(optimizer, 3, {"0.0": ((60, 4), (6, 0))}, chunk_mb=1e-6)
    train(optimizer, params, range(3))
    scheduler.step()
    other = how(how(optimizer))
    copies = [p for group in other.param_groups for p in group["params"]]
    assert copies[0] is not params[0] and type(other) is not cls
    assert isinstance(other, cls) and type(other).__name__ == cls.__name__
    for ps, o in ((params, optimizer), (copies, other)):
        train(o, ps, range(3, 7))
    assert_same((params, optimizer), (copies, other))
    assert other.param_groups[0]["sr_step"] == 7


@every
def test_a_group_that_joins_late_rounds_as_in_a_new_optimizer(cls):
    shapes = ((6, 4), (4, 6), (3, 5))
    params, alone = parameters(BF16, shapes), parameters(BF16, shapes)[2:]
    optimizer = make(cls, params[:2])
    train(optimizer, params[:2], range(3))
    for group in ({"params": iter(params[2:])}, {"params": params[2], "names": ["a", "b"]}):
        before = [{**g} for g in optimizer.param_groups]
        with pytest.raises(ValueError, match="full `names`"):
            optimizer.add_param_group(group)
        assert optimizer.param_groups == before and len(optimizer.full_names) == 2
    optimizer.add_param_group({"params": iter(params[2:]), "names": ["late"], "sr_step": 9})
    assert [g["sr_step"] for g in optimizer.param_groups] == [3, 0]
    fresh = named(build(cls, alone))
    fresh.param_groups[0]["names"] = ["late"]
    fresh = stochastic(fresh, 0)
    for t in range(3, 7):
        give_gradients(params, t)
        alone[0].grad = params[2].grad.clone()
        optimizer.step(), fresh.step()
    assert torch.equal(params[2], alone[0])
    assert [g["sr_step"] for g in optimizer.param_groups] == [7, 4]
    train(copy.deepcopy(optimizer), params, [7])


@all_of_them
def test_hooks_of_load_state_dict_are_obeyed_and_what_was_given_is_left_alone(cls):
    (params, optimizer), (copies, other) = (twin(cls, shapes=((4, 4), (4, 4))) for _ in range(2))
    seen = []
    train(optimizer, params, range(3))
    saved = optimizer.state_dict()
    given = copy.deepcopy(saved)
    del given["param_groups"][0]["sr_step"]  # as saved before it existed
    other.param_groups[0]["sr_step"] = 3

    def exchange(_, state_dict):
        state = state_dict["state"]
        return {**state_dict, "state": {1 - i: x for i, x in state.items()}}

    other.register_load_state_dict_pre_hook(exchange)
    other.register_load_state_dict_post_hook(lambda o: seen.append(copy.deepcopy(o.state_dict())))
    other.load_state_dict(given)
    assert [g["sr_step"] for g in other.param_groups] == [3] and len(seen) == 1
    for i, p in enumerate(copies):
        for name, x in saved["state"].get(1 - i, {}).items():
            y = other.state[p][name]
            assert (torch.equal(x, y) and x.dtype == y.dtype) if torch.is_tensor(x) else x == y
            assert not torch.is_tensor(x) or seen[0]["state"][i][name].dtype == x.dtype
    train(other, copies, range(2))
    for i, state in saved["state"].items():
        for name, x in state.items():
            y = given["state"][i][name]
            assert (torch.equal(x, y) and x is not y) if torch.is_tensor(x) else x == y


@pytest.mark.parametrize("cls", TORCHS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("loaded", [True, False])
def test_state_that_was_bf16_goes_on_in_float32(cls, loaded):
    params, optimizer = plain(cls)
    train(optimizer, params, range(2))
    if loaded:
        saved = copy.deepcopy(optimizer.state_dict())
        params, optimizer = twin(cls)
        saved["param_groups"][0] |= {k: optimizer.param_groups[0][k] for k in ("names", "sr_step")}
        optimizer.load_state_dict(saved)
    else:
        optimizer = stochastic(optimizer, 0)
    train(optimizer, params, range(2, 4))
    assert all(x.dtype == torch.float32 for x in tensors(optimizer))


@all_of_them
def test_weights_loaded_after_it_was_made_are_kept(cls):
    (params, optimizer), (others, reference) = twin(cls), plain(cls)
    train(optimizer, params, range(2))
    with torch.no_grad():
        for p, q in zip(params, others):
            q.copy_(p.copy_(p.roll(1) * 3 + 1))
    reference = stochastic(reference, 0)  # here they were there first
    reference.load_state_dict(optimizer.state_dict())
    for ps, o in (params, optimizer), (others, reference):
        train(o, ps, range(2, 4))
    assert_same((params, optimizer), (others, reference))


@pytest.mark.parametrize("cls", [schedule_free.AdamWScheduleFree, schedule_free.SGDScheduleFree])
@pytest.mark.parametrize("chunk_mb", [64.0, 1e-6])
def test_schedule_free_s_eval_and_train_do_no_harm(cls, chunk_mb):
    pairs = []
    for looks in (0, 1, 3):
        params = parameters(BF16)
        optimizer = make(cls, params, lr=0.02, warmup_steps=3, chunk_mb=chunk_mb)
        for t in range(30):
            train(optimizer, params, [t])
            before = [p.detach().clone() for p in params]
            assert not any("lost" in state for state in optimizer.state.values())
            for _ in range(looks):
                optimizer.eval()
                for p, y in zip(params, before):  # x to nearest
                    x = y.float().lerp(optimizer.state[p]["z"], 1 - 1 / 0.9)
                    torch.testing.assert_close(p.float(), x.to(BF16).float(), rtol=2**-8, atol=1e-6)
                optimizer.train()
            assert all(torch.equal(p, y) for p, y in zip(params, before))
        pairs.append((params, optimizer))
    assert_same(pairs[0], pairs[1])
    assert_same(pairs[0], pairs[2])


def test_grad_scaler_autocast_and_hooks_around_the_step_change_nothing():
    for cls in (adamw.AdamW, torch.optim.AdamW, schedule_free.AdamWScheduleFree):
        (params, optimizer), reference = twin(cls), twin(cls)
        scaler, calls = torch.amp.GradScaler("cpu", init_scale=4.0), []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        scaler.scale(torch.ones(()))
        for t in range(4):
            train(reference[1], reference[0], [t])
            give_gradients(params, t)
            for p in params:
                p.grad *= 4
            with torch.autocast("cpu", torch.bfloat16):
                scaler.step(optimizer)
            scaler.update()
        assert_same((params, optimizer), reference)
        assert calls == ["pre", "post"] * 4


def test_torchs_distributed_checkpoint_of_it_goes_on_bit_for_bit():
    for cls in (adamw.AdamW, torch.optim.AdamW, schedule_free.AdamWScheduleFree):
        pairs = []
        for _ in range(2):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(BF16)
            params = [*model.parameters()]
            pairs.append((model, params, stochastic(named(cls(params, lr=0.01)), 0)))
            if hasattr(pairs[-1][2], "train"):
                pairs[-1][2].train()
        train(pairs[0][2], pairs[0][1], range(3))
        pairs[1][0].load_state_dict(pairs[0][0].state_dict())
        saved = dcp.get_optimizer_state_dict(*pairs[0][::2])
        dcp.set_optimizer_state_dict(*pairs[1][::2], saved)
        for _, params, optimizer in pairs:
            train(optimizer, params, range(3, 6))
        assert_same(*(pair[1:] for pair in pairs))
        assert pairs[1][2].param_groups[0]["sr_step"] == 6


def dtensors_refused(rank, world):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Linear(4, 4, dtype=BF16))
    said = []
    for late in (False, True):
        first = [nn.Parameter(torch.ones(2))]
        optimizer = named(adamw.AdamW(first if late else model.parameters()))
        try:
            optimizer = stochastic(optimizer, 0)
            optimizer.add_param_group({"params": [*model.parameters()], "names": ["a", "b"]})
        except ValueError as error:
            said.append(str(error))
    return said


def test_dtensors_are_refused_with_what_to_take():
    for said in run_ranks(1, dtensors_refused):
        assert len(said) == 2 and all("Adapter" in text and "shards" in text for text in said)


# ---- on several ranks ----------------------------------------------------------------------------
SHAPE = dict(
    n_layer=2, n_head=2, n_kv_head=2, n_embd=8, block_size=8, vocab_size=16, zero_init=False
)


def start(name, shape):
    return initial_weight(GPTConfig(**SHAPE), name, shape)


def gradient(name, shape, step):
    generator = torch.Generator().manual_seed(len(name) * 100 + step)
    return torch.randn(shape, generator=generator).to(BF16)


def trained(rank, world, layout, cls):
    """The whole weights after steps whose summed gradients are the same in every layout: no sums to
    round."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPE)).to(BF16)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    group = dist.group.WORLD if world > 1 else None
    replicas = FSDP(group, CPU) if layout == "fsdp" else ZeRO(group, CPU, int(layout[-1]))
    model = fitted(replicas, cls, model).parallelize(model)
    replicas.init_weights(start)
    lrs = dict.fromkeys(("embedding", "head", "matrix", "scalar"), 1e-3)
    groups = groups_of.param_groups(model, lrs, 0.1, muon=getattr(cls, "matrices_only", False))
    optimizer = stochastic(replicas.make_optimizer(cls, groups), 1, replicas.shards)
    for step in range(4):
        replicas.last_micro_batch(True)
        ids = torch.arange(8).view(1, 8)
        (model(ids, ids) * 0).backward()
        replicas.finish_gradients()
        for name, g in replicas.gradients().items():
            full = gradient(name, shapes[name], step)
            if layout == "fsdp" and world > 1:
                rows = -(-full.shape[0] // world)
                full = full[rank * rows : rank * rows + g.shape[0]]
            elif name in replicas.shards:
                full = Shard(*replicas.shards[name]).narrow(full, g.shape)
            g.copy_(full)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    if layout == "fsdp":
        whole = {n: w.full_tensor().float() for n, w in replicas.weights().items()}
        return {n: (w, w.shape, (0,) * w.ndim) for n, w in whole.items()} if rank == 0 else {}
    return placed(replicas, {n: w.float() for n, w in replicas.weights().items()})


@pytest.mark.parametrize("layout", ["zero1", "zero3", "fsdp"])
@pytest.mark.parametrize("cls", [adamw.AdamW, muon.Muon], ids=lambda cls: cls.__name__)
def test_every_layout_rounds_alike(layout, cls):
    alone = joined([trained(0, 1, "zero1", cls)])
    merged = joined(run_ranks(2, trained, layout, cls))
    assert merged.keys() == alone.keys()
    for name, w in alone.items():
        assert torch.equal(merged[name], w), name


def cut_in_two(rank, world):
    whole = torch.linspace(-1, 1, 24).view(4, 6).to(BF16)
    p = nn.Parameter(whole[:, 3 * rank : 3 * rank + 3].clone())
    groups = [{"params": [p], "names": ["w"]}]
    shards = {"w": Shard((4, 6), (0, 3 * rank))}
    adapter = Adapter(adamw.AdamW, groups, tp_shards=shards, tp_group=dist.group.WORLD)
    optimizer = stochastic(adapter.optimizer, 2, adapter.shards)
    for t in range(4):
        p.grad = gradient("w", (4, 6), t)[:, 3 * rank : 3 * rank + 3].clone()
        optimizer.step()
    return p.detach().float()


def test_a_matrix_cut_by_columns_rounds_as_the_whole_one():
    p = nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6).to(BF16))
    optimizer = stochastic(adamw.AdamW([{"params": [p], "names": ["w"]}]), 2)
    for t in range(4):
        p.grad = gradient("w", (4, 6), t)
        optimizer.step()
    assert torch.equal(torch.cat(run_ranks(2, cut_in_two), 1), p.detach().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_narrow_gradients_is_that_of_their_values(dtype):
    """In bfloat16 it would have three digits, and in float16 end at 65504."""
    torch.manual_seed(0)
    gradients = [torch.randn(300, 200), 300 * torch.ones(100_000), torch.ones(0)]
    gradients = [x.to(dtype) for x in gradients]
    found = make_mesh(torch.device("cpu")).norm(gradients)
    exact = torch.cat([x.double().flatten() for x in gradients]).norm()
    assert found.dtype == torch.float32 and abs(found / exact - 1) < 2e-4  # torch sums in float32
    mixed = make_mesh(torch.device("cpu")).norm([*gradients, torch.ones(4, dtype=torch.float64)])
    assert abs(mixed / exact - 1) < 2e-4
