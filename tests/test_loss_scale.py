"""The loss scaler against torch.amp.GradScaler, DeepSpeed's rule told another way, and two
ranks."""

import json
import random

import pytest
import torch
import torch.distributed as dist
from harness import gpu, run_ranks
from torch import nn

from parallel.mesh import make_mesh
from precision.loss_scale import LossScaler

CPU = torch.device("cpu")


def scales(scaler, pattern):
    seen = []
    for finite in pattern:
        assert scaler.update(finite) is finite
        seen.append(scaler.scale)
    return seen


def torchs(pattern, device, **options):
    """The scales of torch's own, whose parameter's gradient overflows as the pattern says."""
    p = nn.Parameter(torch.ones(2, device=device))
    optimizer = torch.optim.SGD([p], lr=0.1)
    scaler = torch.amp.GradScaler(device=device.type, **options)
    scaler.scale(torch.ones((), device=device))  # makes its state
    seen = []
    for finite in pattern:
        p.grad = torch.tensor([1.0, 1.0 if finite else float("inf")], device=device)
        scaler.step(optimizer)
        scaler.update()
        seen.append(scaler.get_scale())
    return seen


@pytest.mark.parametrize(
    "growth, backoff, window, likely",
    [
        (2.0, 0.5, 1, 0.5),
        gpu(2.0, 0.5, 3, 0.7),
        (2.0, 0.5, 5, 0.95),
        (1.7, 0.3, 2, 0.6),
        (1.1, 0.9, 1, 0.9),
        (4.0, 0.25, 2, 1.0),
    ],
)
def test_without_hysteresis_the_scales_are_gradscalers_to_the_bit(
    growth, backoff, window, likely, device
):
    draw = random.Random(f"{growth}{window}")
    pattern = [draw.random() < likely for _ in range(300)]
    ours = LossScaler(16, window, 1, 2.0**-126, growth, backoff, patience=10**6)
    theirs = torchs(
        pattern,
        device,
        init_scale=2.0**16,
        growth_factor=growth,
        backoff_factor=backoff,
        growth_interval=window,
    )
    assert scales(ours, pattern) == theirs
    assert len(set(theirs)) > 3


def deepspeeds(pattern, window, hysteresis, minimum):
    """DeepSpeed's rule from its counters of iterations, which ours does not have."""
    scale, last_overflow, left, seen = 2.0**16, -1, hysteresis, []
    for i, finite in enumerate(pattern):
        if finite:
            if (i - last_overflow) % window == 0:
                left, scale = hysteresis, scale * 2
        else:
            scale = max(scale / 2, minimum) if left == 1 else scale
            left, last_overflow = max(left - 1, 1), i
        seen.append(scale)
    return seen


@pytest.mark.parametrize("hysteresis", (1, 2, 3, 5))
@pytest.mark.parametrize("window, likely", [(1, 0.5), (3, 0.7), (4, 0.9), (2, 0.3)])
def test_hysteresis_is_deepspeeds(window, likely, hysteresis):
    draw = random.Random(f"{window}{hysteresis}")
    pattern = [draw.random() < likely for _ in range(160)]  # no scale overflows
    ours = LossScaler(window=window, hysteresis=hysteresis, min_scale=2.0**10, patience=10**6)
    assert scales(ours, pattern) == deepspeeds(pattern, window, hysteresis, 2.0**10)


def test_forgiven_overflows_need_not_be_neighbours_and_growth_brings_new_chances():
    scaler = LossScaler(init_power=4, window=3, hysteresis=2)
    o, x = True, False
    assert scales(scaler, [x, o, o, x, x, o, o, o, x, x]) == [16, 16, 16, 8, 4, 4, 4, 8, 8, 4]


def test_the_scale_stays_finite_and_at_or_above_its_minimum():
    assert scales(LossScaler(126, window=1), [True] * 5) == [2.0**127] * 5
    assert scales(LossScaler(2, hysteresis=1, min_scale=3), [False] * 3) == [3, 3, 3]


def test_a_fixed_scale_never_changes_and_still_skips():
    scaler = LossScaler(window=1, fixed=1000)
    assert scales(scaler, [True, False, False, True] * 4) == [1000] * 16


@pytest.mark.parametrize(
    "options, word", [({"fixed": 8.0}, "fixed"), ({"init_power": 0}, "min_scale")]
)
def test_a_run_that_only_skips_ends_with_a_sentence(options, word):
    scaler = LossScaler(hysteresis=1, patience=4, **options)
    for pattern in ([False] * 3 + [True], [False] * 3):  # a finite step between forgives
        scales(scaler, pattern)
    with pytest.raises(ValueError, match=f"4 steps in a row.*{word}.*--precision=bf16") as error:
        scaler.update(False)
    assert "\n" not in str(error.value)
    # As long as the scale can fall, it may
    falling = LossScaler(init_power=10, hysteresis=1, patience=2)
    scales(falling, [False] * 11)


def test_a_resume_is_bitwise():
    draw = random.Random(1)
    pattern = [draw.random() < 0.7 for _ in range(200)]
    options = dict(window=3, hysteresis=3, growth=1.3, backoff=0.7, min_scale=0.1)
    whole = scales(LossScaler(**options), pattern)
    for stop in range(0, 60):
        first = LossScaler(**options)
        scales(first, pattern[:stop])
        resumed = LossScaler(**options)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert resumed.state_dict() == first.state_dict()
        assert scales(resumed, pattern[stop:]) == whole[stop:]


def test_what_this_run_asks_for_wins_over_what_was_saved():
    scaler = LossScaler(window=2, fixed=64)
    scaler.load_state_dict(LossScaler(window=100).state_dict() | {"good": 50})
    assert scaler.scale == 64 and scaler.good == 1
    higher = LossScaler(init_power=16, min_scale=2.0**15, hysteresis=1)
    higher.load_state_dict({"scale": 1.0, "good": 0, "stuck": 0, "chances": 7})
    assert higher.scale == 2.0**15 and higher.chances == 1
    fresh = LossScaler()
    fresh.load_state_dict({})
    assert fresh.state_dict() == LossScaler().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"init_power": 200},
        {"init_power": 1.5},
        {"init_power": True},
        {"window": 0},
        {"window": 2.5},
        {"hysteresis": 0},
        {"min_scale": 0},
        {"min_scale": -1.0},
        {"growth": 0.5},
        {"growth": float("inf")},
        {"backoff": 0},
        {"backoff": 1},
        {"backoff": float("nan")},
        {"fixed": 0},
        {"fixed": "no"},
        {"fixed": True},
        {"fixed": float("inf")},
        {"patience": 0},
        {"min_scale": 2.0**17},
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(options):
    with pytest.raises(ValueError, match=f"--scaler.{[*options][0]}=.*(must be|start higher)"):
        LossScaler(**options)


@pytest.mark.gpu
def test_unscale_takes_dicts_and_lists_and_nothing_and_no_fp16(device):
    scaler = LossScaler(init_power=3)
    a = torch.tensor([8.0, float("inf")], device=device)
    b = torch.tensor(4.0, dtype=torch.float64, device=device)
    scaler.unscale({"a": a, "b": b})
    assert a.tolist() == [1.0, float("inf")] and b.item() == 0.5
    scaler.unscale(x for x in [a])
    assert a[0] == 0.125
    scaler.unscale({})
    with pytest.raises(ValueError, match="fp16"):
        scaler.unscale([torch.ones(1, dtype=torch.float16, device=device)])


# ---- in a training loop --------------------------------------------------------------------------
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(net, step):
    """Overflows in fp16's backward at some steps, by a loss that is far too large."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)
    device = net[0].weight.device
    x, y = x.to(device), y.to(device)
    with torch.autocast(device.type, torch.float16):
        out = net(x)
    return (out.float() - y).square().mean() * (1e4 if step % 5 == 3 else 1.0)


@pytest.mark.gpu
def test_a_model_in_fp16_trains_as_with_gradscaler_bit_for_bit(device, deterministic):
    ours, theirs = model().to(device), model().to(device)
    a, b = (torch.optim.AdamW(net.parameters(), lr=0.01) for net in (ours, theirs))
    scaler = LossScaler(init_power=12, window=4, hysteresis=1)
    grad_scaler = torch.amp.GradScaler(device=device.type, init_scale=2.0**12, growth_interval=4)
    skipped = 0
    for step in range(20):
        (loss_of(ours, step) * scaler.scale).backward()
        gradients = {name: p.grad for name, p in ours.named_parameters()}
        scaler.unscale(gradients)
        norm = torch.nn.utils.get_total_norm(gradients.values())
        torch._foreach_mul_([*gradients.values()], (0.5 / (norm + 1e-6)).clamp(max=1.0))
        if scaler.update(bool(norm.isfinite())):
            a.step()
        else:
            skipped += 1
        grad_scaler.scale(loss_of(theirs, step)).backward()
        grad_scaler.unscale_(b)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        grad_scaler.step(b)
        grad_scaler.update()
        a.zero_grad(), b.zero_grad()
        assert scaler.scale == grad_scaler.get_scale()
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert 1 < skipped < 15


@pytest.mark.gpu
def test_gradients_that_vanish_in_fp16_arrive_with_scaling(device):
    found = {}
    for name, scale in (("plain", 1.0), ("scaled", LossScaler().scale)):
        w = torch.ones(3, 2, device=device, requires_grad=True)
        with torch.autocast(device.type, torch.float16):
            out = torch.ones(4, 3, device=device) @ w
        (out.float().sum() * 1e-9 * scale).backward()
        found[name] = w.grad
    assert not found["plain"].any()
    LossScaler().unscale([found["scaled"]])
    expected = torch.full((3, 2), 4e-9, device=device)
    torch.testing.assert_close(found["scaled"], expected, rtol=1e-3, atol=0)


def several(rank, world):
    """Each rank holds one gradient of its own (as in ZeRO); rank 1's overflows in the steps 2 and
    5."""
    mesh, scaler, taken = make_mesh(CPU), LossScaler(init_power=4, window=2, hysteresis=1), []
    for step in range(8):
        g = torch.full((3,), 16.0 * (rank + 1))
        if rank == 1 and step in (2, 5):
            g[1] = float("inf") if step == 2 else float("nan")
        scaler.unscale([g])
        taken.append(scaler.update(bool(mesh.norm([g]).isfinite())))
    return taken, scaler.state_dict()


def test_an_overflow_on_one_rank_skips_on_all():
    results = run_ranks(2, several)
    assert results[0] == results[1]
    assert results[0][0] == [True, True, False, True, True, False, True, True]
    assert not dist.is_initialized()
