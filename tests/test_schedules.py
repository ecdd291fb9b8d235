import math

import pytest
import torch

from schedules import SHAPES, multiplier


@pytest.mark.parametrize("name", SHAPES)
def test_warm_up_starts_above_zero_and_meets_the_peak(name):
    values = [multiplier(name, i, 100, warmup=10) for i in range(11)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == 1


@pytest.mark.parametrize("name", SHAPES)
def test_no_schedule_rises_after_warm_up_or_leaves_its_range(name):
    values = [multiplier(name, i, 100, warmup=5, minimum=0.1) for i in range(5, 130)]
    assert all(a >= b for a, b in zip(values, values[1:])) and min(values) >= 0.1 - 1e-12 and values[0] <= 1


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "sqrt"])
def test_wsd_is_flat_until_the_last_share_of_all_steps(shape):
    values = [
        multiplier("wsd", i, 100, warmup=10, minimum=0.1, decay_frac=0.3, shape=shape) for i in range(101)
    ]
    assert values[10:71] == [1.0] * 61 and values[71] < 1
    assert values[100] == pytest.approx(0.1)


def test_wsd_decays_as_its_formulas():
    half = {s: multiplier("wsd", 75, 100, 0, 0.0 if s != "exponential" else 0.01, 0.5, shape=s)
            for s in ("linear", "cosine", "exponential", "sqrt")}  # fmt: skip
    expected = dict(linear=0.5, cosine=0.5, exponential=0.1, sqrt=1 - math.sqrt(0.5))
    assert half == pytest.approx(expected)


def test_cosine_and_linear_equal_torch():
    p = torch.nn.Parameter(torch.zeros(1))
    for name, make in [
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.2)),
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=40)),
    ]:
        optimizer = torch.optim.SGD([p], lr=1.0)
        scheduler = make(optimizer)
        for i in range(41):
            assert multiplier(name, i, 40, 0, 0.2) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            scheduler.step()


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="linear, cosine"):
        multiplier("wsd", 3, 10, shape="cubic")
