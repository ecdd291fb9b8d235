"""AdEMAMix against its paper's formula, in float64; its warm-ups; states of the authors' class."""

import copy
import math

import pytest
import test_mup
import torch
from test_optim_contract import parameters, steps
from test_optim_oracles import SHAPES, agree, run, transcribe

from optim.adamw import AdamW
from optim.ademamix import AdEMAMix, grown_alpha, grown_beta3


def formula(p, g, s, t, h):
    """Algorithm 1 with its two schedules, written out."""
    b1, b2, b3 = h.get("betas", (0.9, 0.999, 0.9999))
    alpha = h.get("alpha", 2.0)
    if h.get("alpha_warmup"):
        alpha = min(t * alpha / h["alpha_warmup"], alpha)
    T = h.get("beta3_warmup")
    if T:
        part = min(t / T, 1)
        below = (1 - part) * math.log(b3) + part * math.log(b1)
        b3 = min(math.exp(math.log(b1) * math.log(b3) / below), b3)
    s["m1"] = b1 * s.get("m1", 0) + (1 - b1) * g
    s["m2"] = b3 * s.get("m2", 0) + (1 - b3) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    m1, v = s["m1"] / (1 - b1**t), s["v"] / (1 - b2**t)
    u = (m1 + alpha * s["m2"]) / (v.sqrt() + h.get("eps", 1e-8))
    return p - h["lr"] * (u + h["weight_decay"] * p)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.0, "alpha": 8.0, "alpha_warmup": 20, "beta3_warmup": 20},
        {"weight_decay": 0.1, "betas": (0.8, 0.95, 0.99), "alpha_warmup": 5, "eps": 1e-3},
        {"weight_decay": 0.1, "alpha": 5.0, "beta3_warmup": 40},
    ],
)
def test_ademamix_equals_its_formula(options):
    options = {"lr": 0.01, **options}
    agree(run(AdEMAMix, options, SHAPES), transcribe(formula, options, SHAPES))


def test_alpha_zero_is_adamw():
    options = {"lr": 0.01, "weight_decay": 0.1}
    zero = run(AdEMAMix, options | {"alpha": 0.0}, SHAPES)
    agree(zero, run(AdamW, options, SHAPES), 1e-14)


def test_the_half_life_grows_by_the_same_number_of_steps_at_each_step():
    lives = [math.log(0.5) / math.log(grown_beta3(t, 0.9, 0.9999, 50)) for t in range(1, 52)]
    first, last = (math.log(0.5) / math.log(beta) for beta in (0.9, 0.9999))
    for t, life in enumerate(lives[:50], 1):
        assert life == pytest.approx(first + (last - first) * t / 50)
    assert lives[50] == lives[49] == last
    assert [grown_alpha(t, 8.0, 50) for t in (1, 25, 50, 51)] == [0.16, 4.0, 8.0, 8.0]


@pytest.mark.parametrize("warmup", [None, 0])
def test_without_warm_up_alpha_and_beta3_are_there_at_once(warmup):
    assert grown_alpha(1, 8.0, warmup) == 8.0 and grown_beta3(1, 0.9, 0.99, warmup) == 0.99


def test_betas_of_zero_have_half_lives_of_zero():
    assert grown_beta3(5, 0.0, 0.0, 10) == 0.0
    half = grown_beta3(5, 0.0, 0.5, 10)
    assert half == pytest.approx(0.25)  # half of .5's half-life of one step
    params = parameters(torch.float64)
    optimizer = AdEMAMix(params, betas=(0.0, 0.9, 0.0), beta3_warmup=3, alpha_warmup=3)
    steps(optimizer, params, range(5))
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.999, 1.0), (0.9, 0.999, -0.1)])
def test_betas_are_three_below_one(betas):
    with pytest.raises(ValueError, match=r"AdEMAMix: betas.*not allowed"):
        AdEMAMix([torch.zeros(2, requires_grad=True)], betas=betas)


def test_a_state_of_the_authors_class_loads():
    """Theirs calls the fast average exp_avg_fast, and keeps None for it where β₁ is 0."""
    params, copies = parameters(torch.float64), parameters(torch.float64)
    ours = AdEMAMix(params, betas=(0.0, 0.9, 0.99))
    steps(ours, params, range(3))
    theirs = copy.deepcopy(ours.state_dict())
    for i, state in theirs["state"].items():
        state["exp_avg_fast"] = None if i % 2 else state["exp_avg"]
        del state["exp_avg"]
    loaded = AdEMAMix(copies, betas=(0.0, 0.9, 0.99))
    loaded.load_state_dict(theirs)
    with torch.no_grad():
        for p, q in zip(copies, params):
            p.copy_(q)
    for optimizer, ps in (ours, params), (loaded, copies):
        steps(optimizer, ps, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, copies))
    del theirs["state"][0]["exp_avg_slow"]
    with pytest.raises(ValueError, match="another method's"):
        AdEMAMix(copies).load_state_dict(theirs)


def test_under_mup_the_change_does_not_depend_on_the_width(monkeypatch):
    monkeypatch.setitem(test_mup.RUNS, "ademamix", (AdEMAMix, 0.01, {"alpha_warmup": 3}))
    assert all(0.5 < factor < 2 for factor in test_mup.growth("ademamix", on=True).values())
    assert test_mup.growth("ademamix", on=False)["logits"] > 2.5
