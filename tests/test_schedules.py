import math

import pytest
import torch

import schedules
from schedules import SHAPES, follow, multiplier

FALLING = [name for name in SHAPES if name not in ("sgdr", "onecycle")]


@pytest.mark.parametrize("name", FALLING + ["sgdr"])
def test_warm_up_starts_above_zero_and_meets_the_peak(name):
    values = [multiplier(name, i, 100, warmup=10) for i in range(11)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == 1


@pytest.mark.parametrize("name", FALLING)
def test_no_schedule_rises_after_warm_up_or_leaves_its_range(name):
    values = [multiplier(name, i, 100, warmup=5, minimum=0.1) for i in range(5, 130)]
    assert (
        all(a >= b for a, b in zip(values, values[1:]))
        and min(values) >= 0.1 - 1e-12
        and values[0] == 1
    )


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "sqrt", "power"])
def test_wsd_is_flat_until_the_last_share_of_all_steps(shape):
    values = [
        multiplier("wsd", i, 100, warmup=10, minimum=0.1, decay_frac=0.3, shape=shape)
        for i in range(101)
    ]
    assert values[10:71] == [1.0] * 61 and values[71] < 1
    assert values[100] == pytest.approx(0.1)


def test_wsd_decays_as_its_formulas():
    half = {
        s: multiplier("wsd", 75, 100, 0, 0.0 if s != "exponential" else 0.01, 0.5, shape=s)
        for s in ("linear", "cosine", "exponential", "sqrt")
    }
    expected = dict(linear=0.5, cosine=0.5, exponential=0.1, sqrt=1 - math.sqrt(0.5))
    assert half == pytest.approx(expected)
    assert multiplier("wsd", 99, 100, 0, decay_frac=0.2) == pytest.approx(1 / 20)
    power = multiplier("wsd", 80, 100, 0, decay_frac=0.5, shape="power", power=1.2)
    assert power == pytest.approx((20 / 50) ** 1.2)
    assert [multiplier("wsd", i, 10, 0, decay_frac=0.0) for i in range(11)] == [1.0] * 11


def test_powercool_is_that_of_record_46():
    """min(lr0, c (T - t)^p) for 2900 steps, with the constants of its matrices and embeddings."""
    for lr0, c, share in (
        (0.0375, 3.3169534699576625e-06, 0.8229),
        (0.3, 4.976805410800738e-05, 0.48724),
    ):
        for t in (0, 513, 600, 1486, 1500, 2690, 2899):
            wanted = min(lr0, c * (2900 - t) ** 1.2)
            ours = multiplier("wsd", t, 2900, 0, decay_frac=share, shape="power", power=1.2)
            assert lr0 * ours == pytest.approx(wanted, rel=1e-3)


def test_each_kind_follows_its_own_factor_and_momentum_comes_back():
    def momenta(own=0.95, **options):
        groups = [dict(kind=kind, lr=1.0, momentum=own, params=[]) for kind in ("matrix", "head")]
        found = []
        for step in range(10):
            follow(groups, step, {"matrix": 0.5, "head": 0.1 * step}, steps=10, **options)
            assert [g["lr"] for g in groups] == [0.5, 0.1 * step]
            assert groups[0]["momentum"] == groups[1]["momentum"]
            found.append(groups[0]["momentum"])
        return found

    assert momenta() == [0.95] * 10
    down = [0.95 - 0.1 * max(0, t - 6) / 4 for t in range(10)]
    assert momenta(momentum_cooldown=4) == pytest.approx(down)
    both = [min(0.85 + 0.1 * t / 2, x) for t, x in enumerate(down)]
    assert momenta(momentum_warmup=2, momentum_cooldown=4) == pytest.approx(both)
    # Where the two meet, the one counts that has come less far.
    assert momenta(momentum_warmup=8, momentum_cooldown=8)[4] == pytest.approx(0.9)
    # A momentum below 0.85 comes down to itself.
    low = [0.85 - 0.05 * min(1, t / 2, (10 - t) / 4) for t in range(10)]
    assert momenta(0.8, momentum_warmup=2, momentum_cooldown=4) == pytest.approx(low)
    with pytest.raises(ValueError, match="counts from the end"):
        follow([], 0, 1.0, momentum_cooldown=4)


LR = torch.optim.lr_scheduler
TORCH = {
    "cosine": (
        dict(name="cosine", minimum=0.2),
        lambda o: LR.CosineAnnealingLR(o, 40, eta_min=0.2),
    ),
    "linear": (
        dict(name="linear", minimum=0.2),
        lambda o: LR.LinearLR(o, 1.0, 0.2, total_iters=40),
    ),
    "warm-up from a start factor": (
        dict(name="constant", warmup=8, warmup_start=1 / 32),
        lambda o: LR.LinearLR(o, 1 / 32, 1.0, total_iters=8),
    ),
    "sgdr": (
        dict(name="sgdr", minimum=0.1, T_0=5, T_mult=2),
        lambda o: LR.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=0.1),
    ),
    "sgdr of equal cycles": (
        dict(name="sgdr", T_0=7, T_mult=1),
        lambda o: LR.CosineAnnealingWarmRestarts(o, 7, 1),
    ),
    "onecycle": (dict(name="onecycle"), lambda o: LR.OneCycleLR(o, 1.0, 40)),
    "onecycle with options": (
        dict(name="onecycle", pct_start=0.1, div_factor=10.0, final_div_factor=100.0),
        lambda o: LR.OneCycleLR(o, 1.0, 40, pct_start=0.1, div_factor=10.0, final_div_factor=100.0),
    ),
}


@pytest.mark.parametrize("case", TORCH)
def test_equal_to_torch(case):
    ours, make = TORCH[case]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = make(optimizer)
    for i in range(40):
        assert multiplier(step=i, steps=40, **ours) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        ), i
        optimizer.step()
        scheduler.step()


def test_inverse_sqrt_is_the_transformer_papers():
    for i in (0, 3, 9, 10, 11, 500):
        paper = min((i + 1) / 10, 1.0) if i < 10 else math.sqrt(10 / i)
        assert multiplier("inverse_sqrt", i, 1000, warmup=10) == pytest.approx(paper)


def test_cosine_cycles_are_waves():
    assert multiplier("cosine", 50, 100, cycles=1.0) == pytest.approx(0)
    assert multiplier("cosine", 100, 100, cycles=1.0) == pytest.approx(1)


def test_sgdr_fills_the_run_with_three_cycles():
    tops = [i for i in range(700) if multiplier("sgdr", i, 700) == 1]
    assert tops == [0, 100, 300]


@pytest.mark.parametrize(
    "name, options",
    [
        ("wsd", dict(shape="cubic")),
        ("sgdr", dict(T_0=-1)),
        ("sgdr", dict(T_mult=0)),
        ("inverse_sqrt", dict(timescale=0)),
        ("onecycle", dict(pct_start=1.5)),
        ("onecycle", dict(div_factor=0.5)),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        multiplier(name, 3, 10, **options)


def test_momentum_warms_up():
    assert [schedules.momentum_at(i, 10, 0.85, 0.95) for i in (0, 5, 10, 99)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )


def test_lr_scaling_rules():
    assert schedules.scaled_lr(0.1, "linear", 8192, 256) == pytest.approx(3.2)  # Goyal et al.
    assert schedules.scaled_lr(0.1, "sqrt", 1024, 256) == pytest.approx(0.2)
    assert schedules.scaled_lr(0.1, None, 1024, None) == 0.1


def test_the_batch_ramps_up_in_equal_parts():
    sizes = [schedules.batch_at(i, 32, 8, 20) for i in range(25)]
    assert sizes == [8] * 5 + [16] * 5 + [24] * 5 + [32] * 10
